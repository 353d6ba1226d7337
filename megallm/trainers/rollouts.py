"""Answers to prompts and what they are worth: the first half of an iteration of PPO and GRPO.

    prompts -> engine.rollout -> texts -> rewards -> shaped scores

Everything of an iteration follows from the seed, the prompts consumed before and the policy's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megallm.config.rl import RewardsConfig
from megallm.data.chat_model import ChatModel
from megallm.data.prompts import Prompt, PromptDataset
from megallm.generate.decode import FinishReason
from megallm.generate.rollout import Limits, Rollout
from megallm.generate.sampling import Sampling
from megallm.parallel import random
from megallm.trainers.engine import Engine
from megallm.trainers.rewards import Response, RewardMixture
from megallm.trainers.rollout_maths import missing_end

_SHOWN_FAILURES = 1


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Of an iteration, on every rank alike; N of them."""

    prompts: list[Prompt]
    """[N]: each one's prompt."""
    groups: torch.Tensor
    """[N] int64: answers to the same prompt have the same number."""
    token_ids: list[list[int]]
    logprobs: list[list[float]]
    """As the sampler has them."""
    finish_reasons: list[FinishReason]
    texts: list[str]
    total: torch.Tensor
    """[N] fp64: what the rewards say; NaN of answers to leave out."""
    parts: dict[str, torch.Tensor]
    """[N] fp64: each reward alone, without its weight."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def has_ended(self) -> torch.Tensor:
        """[N] bool: whether an answer ends by itself."""
        return torch.tensor([reason != "length" for reason in self.finish_reasons])

    @property
    def lengths(self) -> torch.Tensor:
        """[N] int64: tokens of the answers."""
        return torch.tensor([len(ids) for ids in self.token_ids])

    def select(self, index: Sequence[int]) -> Answers:
        """Those at these places."""

        def pick(values: list[Any]) -> list[Any]:
            return [values[i] for i in index]

        return Answers(
            prompts=pick(self.prompts), groups=self.groups[list(index)], token_ids=pick(self.token_ids),
            logprobs=pick(self.logprobs), finish_reasons=pick(self.finish_reasons), texts=pick(self.texts),
            total=self.total[list(index)], parts={name: part[list(index)] for name, part in self.parts.items()},
        )  # fmt: skip

    @staticmethod
    def joined(parts: Sequence[Answers]) -> Answers:
        """All of them, with groups numbered on."""
        groups, above = [], 0
        for part in parts:
            groups.append(part.groups + above)
            above = max([above, *(groups[-1] + 1).tolist()])
        return Answers(
            prompts=[p for part in parts for p in part.prompts],
            groups=torch.cat(groups),
            token_ids=[ids for part in parts for ids in part.token_ids],
            logprobs=[each for part in parts for each in part.logprobs],
            finish_reasons=[each for part in parts for each in part.finish_reasons],
            texts=[text for part in parts for text in part.texts],
            total=torch.cat([part.total for part in parts]),
            parts={name: torch.cat([part.parts[name] for part in parts]) for name in parts[0].parts},
        )


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """Makes them."""

    engine: Engine
    prompts: PromptDataset
    chat: ChatModel
    rewards: RewardMixture
    sampling: Sampling
    """But for the seed."""
    num_samples: int
    max_new_tokens: int
    decode_batch: int
    warn: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        if not self.sampling.is_plain:
            raise ValueError(
                "answers to train on are sampled with a temperature above 0 and no other filter (top_k, top_p, min_p, "
                "repetition_penalty): the ratios of the loss are of the whole softmax"
            )

    def sample(self, consumed: int, num_prompts: int) -> tuple[list[Prompt], Rollout]:
        """The prompts that follow `consumed` ones, and the policy's answers. A collective."""
        chosen = [self.prompts.prompt(consumed + i) for i in range(num_prompts)]
        sampling = replace(self.sampling, seed=random.key(self.sampling.seed, "rollout", consumed))
        found = self.engine.rollout(
            [prompt.ids for prompt in chosen], max_new_tokens=self.max_new_tokens, sampling=sampling,
            num_samples=self.num_samples, limits=Limits(max_batch=self.decode_batch), tokenizer=self.chat.tokenizer,
        )  # fmt: skip
        return chosen, found

    def answers(self, chosen: Sequence[Prompt], found: Rollout) -> Answers:
        """The rollout with its texts and what they are worth. A collective."""
        return scored(chosen, found, num_samples=self.num_samples, chat=self.chat, rewards=self.rewards, warn=self.warn)


def scored(
    chosen: Sequence[Prompt],
    found: Rollout,
    *,
    num_samples: int = 1,
    chat: ChatModel,
    rewards: RewardMixture,
    warn: Callable[[str], None],
) -> Answers:
    """A rollout of the prompts with its texts and what they are worth. A collective."""
    prompts = [prompt for prompt in chosen for _ in range(num_samples)]
    texts = [chat.answer(ids) for ids in found.token_ids]
    scores = rewards.score([
        Response(prompt=prompt.text, completion=text, ids=[*prompt.ids, *ids], record=prompt.record)
        for prompt, ids, text in zip(prompts, found.token_ids, texts, strict=True)
    ])  # fmt: skip
    for failure in scores.failures[:_SHOWN_FAILURES]:
        warn(
            f"reward {failure.name} has no score ({failure.kind}: {failure.detail}) for prompt "
            f"{prompts[failure.index].text[:80]!a}, {len(scores.failures)} such"
        )
    return Answers(
        prompts=prompts, groups=torch.arange(len(chosen)).repeat_interleave(num_samples),
        token_ids=found.token_ids, logprobs=found.logprobs, finish_reasons=found.finish_reasons, texts=texts,
        total=scores.total.cpu(), parts={name: part.cpu() for name, part in scores.parts.items()},
    )  # fmt: skip


@dataclass
class RunningMoments:
    """Mean and variance of everything seen (Chan et al., 1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared differences from the mean."""

    def add(self, values: torch.Tensor) -> None:
        """[n]; not NaN."""
        count = float(len(values))
        if not count:
            return
        mean = float(values.double().mean())
        squares = float((values.double() - mean).square().sum())
        total, step = self.count + count, mean - self.mean
        self.squares += squares + step * step * self.count * count / total
        self.mean += step * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Unbiased; 1 where it is 0."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        is_rounding = variance <= (1e-9 * self.mean) ** 2
        return 1.0 if is_rounding else math.sqrt(variance)


@dataclass
class ScoreShaping:
    """From what the rewards say to what is trained on."""

    config: RewardsConfig
    max_new_tokens: int
    seen: RunningMoments = field(default_factory=RunningMoments)
    """Of `normalize_scores running`."""

    def shaped(self, answers: Answers) -> torch.Tensor:
        """[N] fp64, NaN for answers to leave out: normalised, clipped, then less what a missing end and length cost."""
        scores = answers.total.double()
        known = ~torch.isnan(scores)
        if self.config.normalize_scores != "none":
            moments = self.seen if self.config.normalize_scores == "running" else RunningMoments()
            moments.add(scores[known])
            scores = (scores - moments.mean) / moments.std
        if self.config.score_clip:
            scores = scores.clamp(-self.config.score_clip, self.config.score_clip)
        ended = answers.has_ended
        if self.config.missing_end_score is not None:
            scores = torch.where(known & ~ended, self.config.missing_end_score, scores)
        else:
            scores = missing_end(scores, ended, penalty=self.config.missing_end_penalty)
        return scores - overlong_cost(answers.lengths, self.max_new_tokens, self.config.overlong_buffer)


def overlong_cost(lengths: torch.Tensor, most: int, buffer: int) -> torch.Tensor:
    """[N] fp64: 0 up to `most - buffer` tokens, from there in proportion up to 1 (arXiv 2503.14476, equation 13)."""
    if not buffer:
        return torch.zeros(len(lengths), dtype=torch.float64)
    return ((lengths.double() - (most - buffer)) / buffer).clamp(0.0, 1.0)
