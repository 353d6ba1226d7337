"""Group relative policy optimisation and relatives: an answer is worth what it is above the others to its prompt.

No critic: GRPO (arXiv 2402.03300), Dr.GRPO (2503.20783), RLOO (2402.14740), REINFORCE++ (2501.03262: above all answers
of the iteration; with a baseline, above the others to its prompt first), DAPO's sampling (2503.14476).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megallm.checkpoint.sharded import TrainState
from megallm.config.rl import GrpoConfig, GrpoOptions
from megallm.runtime.environment import LaunchInfo
from megallm.trainers.engine import Engine
from megallm.trainers.experience import is_answer
from megallm.trainers.iteration import Metrics, Timer, mean
from megallm.trainers.losses import Batch
from megallm.trainers.rl_setup import RlPlan, plan_rl, train_rl
from megallm.trainers.rollout_maths import group_advantages, returns_to_go, token_rewards, whiten
from megallm.trainers.rollouts import Answerer, Answers


def plan(run: GrpoConfig, *, world_size: int, device: torch.device, local_world_size: int = 1) -> RlPlan:
    """The checked run. ValueError or FileNotFoundError, in one message, for everything a user can get wrong."""
    return plan_rl(
        run, embedded="arithmetic", world_size=world_size, device=device, local_world_size=local_world_size
    )


def train(plan: RlPlan, info: LaunchInfo, device: torch.device) -> Engine:
    """Trains as planned; leaves checkpoints, metrics, samples and plots. A collective of the job."""
    run = plan.job.run
    assert isinstance(run, GrpoConfig)
    groups = Groups(run.grpo)
    return train_rl(plan, info, device, advantages=lambda engine, state: groups)


@dataclass
class Groups:
    """Advantages of answers over their groups. See rl.Advantages."""

    options: GrpoOptions
    policy_waits: int = 0

    def collect(
        self, answerer: Answerer, consumed: int, num_prompts: int, timer: Timer
    ) -> tuple[Answers, int, Metrics]:
        """See rl.Advantages. With dynamic sampling, groups that say nothing are replaced by those of other prompts,
        as far as rounds go. `score` is that of all answers: those of the groups that are kept are worth half, whatever
        the policy does."""
        used = 0
        told: list[Answers] = []
        silent: list[Answers] = []
        totals: list[torch.Tensor] = []
        for _ in range(1 + self.options.dynamic_sampling):
            missing = num_prompts - sum(num_groups(each) for each in told)
            with timer.phase("rollout"):
                chosen, found = answerer.sample(consumed + used, missing)
            used += missing
            with timer.phase("score"):
                answers = answerer.answers(chosen, found)
            tells = telling(answers.total, answers.groups)
            totals.append(answers.total)
            told.append(answers.select(tells.nonzero().flatten().tolist()))
            silent.append(answers.select((~tells).nonzero().flatten().tolist()))
            if bool(tells.all()):
                break
        score = mean(torch.cat(totals), ~torch.isnan(torch.cat(totals)))
        kept = Answers.joined([*told, *silent])
        size = num_prompts * answerer.num_samples
        return (kept if len(kept) == size else kept.select(range(size))), used, {"score": score}

    def add_to(self, rows: Batch, scores: torch.Tensor, groups: torch.Tensor, cost: torch.Tensor) -> Metrics:
        """Adds `advantages` [N, S]: before whitening, the same for all tokens of an answer. See rl.Advantages."""
        mask, kind = is_answer(rows), self.options.advantage
        if kind == "reinforce++":
            rewards = token_rewards(scores.to(cost.dtype), cost, mask, kl_coefficient=1.0)
            rows["advantages"] = whiten(returns_to_go(rewards, mask), mask)
            return {}
        counted = mask.any(dim=1)
        worth = scores - torch.where(mask, cost, 0.0).double().sum(dim=1)
        over = "dr_grpo" if kind == "reinforce++_baseline" else kind
        found, tells = group_advantages(worth[counted], groups[counted], kind=over)
        advantages = torch.zeros(len(scores), dtype=torch.float64)
        advantages[counted] = found.double()
        spread = torch.where(mask, advantages.to(cost.dtype).unsqueeze(1), 0.0)
        rows["advantages"] = whiten(spread, mask) if kind == "reinforce++_baseline" else spread
        return {"silent_groups": 1.0 - float(tells.double().mean()) if len(tells) else 1.0}

    def train(self, minibatch: Batch, learning_rate: float) -> None:
        """Nothing is trained beside."""

    def take_updates(self) -> None:
        """See train."""

    def save(self, directory: Path, state: TrainState, *, keep: int) -> dict[str, float]:
        """Nothing is kept."""
        return {}


def telling(scores: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """[N] bool: whether the group's scores differ; NaN, of answers to leave out, is no score."""
    known = ~torch.isnan(scores)
    tells = torch.zeros(len(scores), dtype=torch.bool)
    for group in groups.unique():
        own = scores[(groups == group) & known]
        tells[groups == group] = len(own) > 1 and bool((own != own[0]).any())
    return tells


def num_groups(answers: Answers) -> int:
    """Different ones."""
    return len(answers.groups.unique())
