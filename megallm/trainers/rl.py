"""An iteration of PPO and GRPO: roll out, score, train on it. What differs is where advantages come from.

    answers         rollouts.py        prompts answered by the policy, and what the answers are worth
    experience      experience.py      log-probabilities of every token, of the policy as it was and of the reference
    advantages      ppo.py, grpo.py    from a critic, or from the other answers to the same prompt
    updates         policy_losses.py   minibatches of the answers, some epochs of them

Letters: N answers, S places of the longest row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from megallm.checkpoint.sharded import TrainState
from megallm.config.rl import RlConfig
from megallm.data.permutation import hash_ints, permutation
from megallm.optim.clip import GradientNorm
from megallm.parallel.logprobs import IGNORE_INDEX
from megallm.runtime.failure import RunStopped
from megallm.trainers.engine import Engine
from megallm.trainers.experience import (
    answer_rows,
    choose_rows,
    is_answer,
    logprobs_and_entropy,
    own_rows,
    token_logprobs,
)
from megallm.trainers.frozen import Frozen
from megallm.trainers.iteration import IterationResult, Metrics, Timer, Updates, mean
from megallm.trainers.loop import Validate
from megallm.trainers.losses import Batch
from megallm.trainers.policy_losses import PolicyLoss
from megallm.trainers.ptx import PretrainingRows
from megallm.trainers.rollout_maths import AdaptiveKl, kl_estimate
from megallm.trainers.rollouts import Answerer, Answers, RunningMoments, ScoreShaping

_MOST_EMPTY = 3
"""Iterations in a row with nothing to train on, at which a run stops."""
_MINIBATCHES = 4
"""Which of the random orders of an epoch a hash is for; data/finetune.py and data/prompts.py have 1 to 3."""


class Advantages(Protocol):
    """Where they come from, and what is trained for them beside the policy."""

    @property
    def policy_waits(self) -> int:
        """Iterations in which the policy is not yet trained."""
        ...

    def collect(
        self, answerer: Answerer, consumed: int, num_prompts: int, timer: Timer
    ) -> tuple[Answers, int, Metrics]:
        """(answers to so many prompts, prompts consumed for them, metrics of all that was sampled). A collective."""
        ...

    def add_to(self, rows: Batch, scores: torch.Tensor, groups: torch.Tensor, cost: torch.Tensor) -> Metrics:
        """Adds `advantages` [N, S] to the rows, and what else the losses read; its metrics. A collective.

        scores [N]; groups [N]; cost [N, S]: of the KL, in the units of the scores. Rows without labels count nowhere.
        """
        ...

    def train(self, minibatch: Batch, learning_rate: float) -> None:
        """An update of what is trained beside. A collective."""
        ...

    def take_updates(self) -> Updates | None:
        """Those since the last call; None if nothing is trained beside."""
        ...

    def save(self, directory: Path, state: TrainState, *, keep: int) -> dict[str, float]:
        """Writes what is trained beside; numbers to keep. A collective."""
        ...


class RlProgram:
    """See loop.Program."""

    def __init__(
        self,
        engine: Engine,
        run: RlConfig,
        *,
        answerer: Answerer,
        advantages: Advantages,
        reference: Frozen | None = None,
        ptx: PretrainingRows | None = None,
        resumed: Mapping[str, float] | None = None,
        show: Callable[[int, Answers, Metrics], None] = lambda step, answers, metrics: None,
        validate: Validate | None = None,
    ) -> None:
        """resumed: what `save` left in the state. show: is given every iteration's answers and metrics."""
        self.validate = validate
        """See loop.Program."""
        self._engine, self._run, self._answerer, self._advantages = engine, run, answerer, advantages
        self._reference, self._ptx, self._show = reference, ptx, show
        policy, rollout, before = run.policy, run.rollout, resumed or {}
        self._loss = PolicyLoss(
            clip_low=policy.clip_low, clip_high=policy.clip_high, dual_clip=policy.dual_clip, ratio=policy.importance,
            aggregation=policy.aggregation, max_length=rollout.max_new_tokens, kl_estimator=policy.kl_estimator,
            entropy_coefficient=policy.entropy_coefficient, temperature=rollout.temperature,
        )  # fmt: skip
        adapted = policy.kl_target is not None and before.get("kl_start") == policy.kl_coefficient
        self._kl = AdaptiveKl(
            coefficient=before["kl_coefficient"] if adapted else policy.kl_coefficient,
            target=policy.kl_target or 6.0, horizon=policy.kl_horizon,
        )  # fmt: skip
        seen = RunningMoments(*(before.get(f"score_{name}", 0.0) for name in ("count", "mean", "squares")))
        self._shaping = ScoreShaping(run.rewards, rollout.max_new_tokens, seen)
        self._empty = 0
        self._tokens_at_once = run.train.micro_batch_size * run.train.seq_length
        engine.step = int(before.get("updates", engine.step))

    def step(self, state: TrainState, learning_rate: float) -> tuple[IterationResult, int]:
        """See loop.Program."""
        timer = Timer(self._engine.mesh.device)
        num_prompts = self._run.rollout.rollout_batch_size
        answers, consumed, sampled = self._advantages.collect(
            self._answerer, state.consumed_samples, num_prompts, timer
        )
        if self._is_empty(answers):
            return self._left_out(state.step + 1, answers, sampled, timer), consumed
        self._empty = 0
        coefficient = self._kl.coefficient
        with timer.phase("score"):
            rows, metrics = self._experience(answers, coefficient, step=state.step)
        metrics |= sampled
        self._show(state.step + 1, answers, metrics)
        with timer.phase("train"):
            updates = self._update(rows, state.step, learning_rate, coefficient)
            beside = self._advantages.take_updates()
        metrics |= value_metrics(beside) if beside is not None and beside.results else {}
        metrics |= policy_metrics(updates) if updates.results else {}
        counted = updates if updates.results else beside
        assert counted is not None
        metrics |= {name: counted.total(name) for name in ("count", "tokens")}
        metrics |= {name: counted.mean(name) for name in ("loss", "grad_norm", "clip_coefficient")}
        metrics |= counted.overflows()
        return IterationResult(values=metrics | timer.shares(), grad_norm=counted.norm()), consumed

    def save(self, directory: Path, state: TrainState, *, keep: int) -> TrainState:
        """See loop.Program."""
        beside = self._advantages.save(directory, state, keep=keep)
        seen = self._shaping.seen
        extra = {
            "updates": float(self._engine.step), "kl_coefficient": self._kl.coefficient,
            "kl_start": self._run.policy.kl_coefficient, "score_count": seen.count,
            "score_mean": seen.mean, "score_squares": seen.squares,
        }  # fmt: skip
        return replace(state, extra=extra | beside)

    def _is_empty(self, answers: Answers) -> bool:
        """Whether there is no answer to train on; other text alone is no iteration."""
        is_trained = ~torch.isnan(answers.total)
        if self._run.rewards.overlong == "mask":
            is_trained &= answers.has_ended
        return not bool(is_trained.any())

    def _left_out(self, number: int, answers: Answers, sampled: Metrics, timer: Timer) -> IterationResult:
        """An iteration without updates; RunStopped at some in a row."""
        reason = (
            f"iteration {number} has no answer to train on: none has a score (on_reward_error skip), or none ended by "
            "itself (overlong mask)"
        )
        self._empty += 1
        if self._empty == _MOST_EMPTY:
            raise RunStopped(
                f"{reason}, the {_MOST_EMPTY}rd such one in a row: mend the reward, or allow longer answers"
            )
        self._answerer.warn(f"{reason}: it changes nothing")
        metrics = score_metrics(answers, answers.total) | sampled
        self._show(number, answers, metrics)
        metrics |= {"count": 0.0, "tokens": 0.0, "loss": math.nan, "grad_norm": 0.0, "clip_coefficient": 1.0}
        mesh = self._engine.mesh
        norm = GradientNorm(value=torch.zeros((), dtype=torch.float64), slices=[], parts=None, mesh=mesh)
        return IterationResult(values=metrics | {"updates": 0.0} | timer.shares(), grad_norm=norm)

    def _experience(self, answers: Answers, coefficient: float, *, step: int) -> tuple[Batch, Metrics]:
        """(rows with all that the losses read, metrics). A collective."""
        rows = answer_rows([prompt.ids for prompt in answers.prompts], answers.token_ids)
        sampled = is_answer(rows)
        sampler = torch.tensor([each for own in answers.logprobs for each in own])
        sampler = torch.zeros(sampled.shape).masked_scatter(sampled, sampler)
        scores = self._shaping.shaped(answers)
        rows["labels"][torch.isnan(scores)] = IGNORE_INDEX
        mask, temperature = is_answer(rows), self._run.rollout.temperature
        old, entropy = logprobs_and_entropy(
            self._engine, rows, temperature=temperature, tokens_at_once=self._tokens_at_once
        )
        rows["old_logprobs"] = old
        metrics = score_metrics(answers, scores)
        metrics |= {"entropy": mean(entropy, mask), "mismatch": mean((sampler - old).abs().exp(), mask)}
        cost = torch.zeros_like(old)
        if self._reference is not None:
            with self._reference.here() as reference:
                rows["ref_logprobs"] = token_logprobs(
                    reference, rows, temperature=temperature, tokens_at_once=self._tokens_at_once
                )
            metrics |= self._look_at_kl(torch.where(mask, old - rows["ref_logprobs"], 0.0), mask, step=step)
            if self._run.policy.kl_in == "reward":
                cost = coefficient * kl_estimate(old, rows["ref_logprobs"], self._run.policy.kl_estimator)
        metrics |= self._advantages.add_to(rows, torch.nan_to_num(scores, nan=0.0), answers.groups, cost)
        if self._run.rewards.overlong == "mask":
            rows["labels"][~answers.has_ended] = IGNORE_INDEX
        return rows, metrics

    def _look_at_kl(self, difference: torch.Tensor, mask: torch.Tensor, *, step: int) -> Metrics:
        """Of log p - log p_ref [N, S], 0 beyond the mask; adapts the coefficient of the next iteration, unless the
        policy still waits."""
        num_answers = int(mask.any(dim=1).sum())
        summed = float(difference.double().sum()) / max(num_answers, 1)
        used = self._kl.coefficient
        if self._run.policy.kl_target is not None and step >= self._advantages.policy_waits:
            self._kl.update(summed, episodes=num_answers)
        return {"kl": summed, "kl_per_token": mean(difference, mask), "kl_coefficient": used}

    def _update(self, rows: Batch, step: int, learning_rate: float, coefficient: float) -> Updates:
        """All minibatches of all epochs, unless the policy goes too far. A collective."""
        loss, updates = self._loss, Updates()
        if self._reference is not None and self._run.policy.kl_in == "loss":
            loss = replace(loss, kl_coefficient=coefficient)
        most = self._run.policy.max_approx_kl
        for number, minibatch in self._minibatches(rows, step):
            count = int(loss.count(minibatch))
            if count:  # else momentum alone would move
                self._advantages.train(minibatch, learning_rate)
            if step < self._advantages.policy_waits or (not count and self._ptx is None):
                continue
            if self._ptx is not None:
                minibatch = self._ptx.add_to(minibatch, number=number, count=count)
            batch = own_rows(minibatch, self._engine.mesh)
            updates.add(self._engine.train_step(batch, loss, learning_rate=learning_rate, count_fn=loss.count))
            if most is not None and updates.approx_kl() > most:
                break
        return updates

    def _minibatches(self, rows: Batch, step: int) -> Iterator[tuple[int, Batch]]:
        """(number in the run, rows) of each."""
        run, num_rows = self._run, len(rows["input_ids"])
        per_epoch = num_rows // run.train.global_batch_size
        for epoch in range(run.policy.update_epochs):
            key = hash_ints(run.train.seed, step * run.policy.update_epochs + epoch, _MINIBATCHES)
            order = torch.from_numpy(permutation(num_rows, key))
            for number, index in enumerate(order.split(run.train.global_batch_size)):
                yield (step * run.policy.update_epochs + epoch) * per_epoch + number, choose_rows(rows, index)


def score_metrics(answers: Answers, shaped: torch.Tensor) -> Metrics:
    """Of what the rewards say, and of the answers themselves."""
    total = answers.total.double()
    known = ~torch.isnan(total)
    metrics = {
        "score": mean(total, known),
        "score_std": float(total[known].std()) if int(known.sum()) > 1 else 0.0,
        "reward": mean(shaped, known),
    }
    if len(answers.parts) > 1:
        metrics |= {f"score_{name}": mean(part, ~torch.isnan(part)) for name, part in answers.parts.items()}
    metrics |= {
        "response_length": float(answers.lengths.double().mean()),
        "ended": float(answers.has_ended.double().mean()),
    }
    failed = int((~known).sum())
    return metrics | ({"left_out": float(failed)} if failed else {})


def policy_metrics(updates: Updates) -> Metrics:
    """Means over the policy's tokens of all updates of an iteration."""
    names = ["policy_loss", "approx_kl", "clip_fraction", "clip_fraction_low", "clip_fraction_high", "ratio"]
    metrics = {name: updates.per_token(name) for name in names}
    if "kl_loss" in updates.names():
        metrics["kl_loss"] = updates.per_token("kl_loss")
    if "ptx_loss" in updates.names():
        metrics["ptx_loss"] = updates.per_token("ptx_loss", of="num_ptx_tokens")
    return metrics | {"updates": float(len(updates.results))}


def value_metrics(updates: Updates) -> Metrics:
    """The critic's, likewise."""
    metrics = {name: updates.per_token(name) for name in ("value_loss", "value_clip_fraction")}
    return metrics | {"critic_grad_norm": updates.mean("grad_norm")}
