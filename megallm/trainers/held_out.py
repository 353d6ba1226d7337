"""The policy on prompts that it does not train on, answered greedily: is it better, or does it know its prompts?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megallm.data.chat_model import ChatModel
from megallm.data.prompts import PromptDataset
from megallm.generate.rollout import Limits
from megallm.generate.sampling import Sampling
from megallm.trainers.engine import Engine
from megallm.trainers.iteration import Metrics
from megallm.trainers.rewards import RewardMixture
from megallm.trainers.rl import score_metrics
from megallm.trainers.rollouts import scored


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """See loop.Validate."""

    engine: Engine
    prompts: PromptDataset
    most: int
    """The first so many are answered."""
    chat: ChatModel
    rewards: RewardMixture
    sampling: Sampling
    """Where answers end."""
    max_new_tokens: int
    decode_batch: int
    warn: Callable[[str], None] = lambda line: None

    def __call__(self) -> Metrics:
        """`score` and its parts, `response_length`, `ended`, of one answer to each. A collective."""
        chosen = [self.prompts.prompt(i) for i in range(min(self.most, self.prompts.num_prompts))]
        found = self.engine.rollout(
            [prompt.ids for prompt in chosen], max_new_tokens=self.max_new_tokens, sampling=self.sampling,
            limits=Limits(max_batch=self.decode_batch), tokenizer=self.chat.tokenizer,
        )  # fmt: skip
        answers = scored(chosen, found, chat=self.chat, rewards=self.rewards, warn=self.warn)
        metrics = score_metrics(answers, answers.total)
        return {name: value for name, value in metrics.items() if name != "reward"}  # nothing shapes them
