"""The maths between a rollout and its update: rewards of tokens, advantages, returns. Pure functions of tensors.

    score of a response, KL to the reference  ->  token_rewards  ->  gae  ->  whiten          PPO
    scores of a prompt's responses            ->  group_advantages                            GRPO, Dr.GRPO, RLOO
    score of a response, KL to the reference  ->  token_rewards  ->  returns_to_go -> whiten  REINFORCE++

`mask` [B, R] bool marks the tokens that the policy wrote; between them may lie others (a tool's answer), over which
values and advantages carry. What is not marked comes out as 0.

Letters: B responses, R positions of the longest, G groups (prompts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megallm.config.rl import KlEstimator
from megallm.parallel.collectives import all_reduce_
from megallm.parallel.mesh import Axis

GroupBaseline = Literal["grpo", "dr_grpo", "rloo"]
_EPS = 1e-8
LOG_RATIO_LIMIT = 20.0
"""Beyond it exp would leave fp32; such tokens are far outside any clip range."""


def kl_estimate(logprobs: torch.Tensor, reference: torch.Tensor, kind: KlEstimator = "k1") -> torch.Tensor:
    """Of the KL divergence of the policy from the reference, at samples of the policy, element by element.

    With d = log p - log p_ref: k1 = d, unbiased, of either sign; k2 = d^2 / 2, biased, its gradient is the KL's; k3 =
    exp(-d) - 1 + d, unbiased, never negative (Schulman, "Approximating KL divergence", 2020).
    """
    d = (logprobs - reference).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if kind == "k1":
        return d
    return 0.5 * d.square() if kind == "k2" else torch.expm1(-d) + d


def missing_end(
    scores: torch.Tensor, has_ended: torch.Tensor, *, penalty: float, replaces: bool = False
) -> torch.Tensor:
    """Scores [B] of which unfinished responses (has_ended [B] bool) lose `penalty`, or get -penalty instead."""
    worse = torch.full_like(scores, -penalty) if replaces else scores - penalty
    return torch.where(has_ended, scores, worse)


def token_rewards(
    scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, *, kl_coefficient: float
) -> torch.Tensor:
    """[B, R]: -kl_coefficient kl of each token, and the score [B] on top at the last token of the mask.

    (Ziegler et al., arXiv 1909.08593, equation 2, per token.) A response without tokens gets no reward.
    """
    rewards = torch.where(mask, -kl_coefficient * kl, torch.zeros_like(kl))
    place = last_place(mask)
    has_tokens = mask.any(dim=1)
    return rewards.scatter_add(1, place.unsqueeze(1), (scores.to(rewards.dtype) * has_tokens).unsqueeze(1))


def last_place(mask: torch.Tensor) -> torch.Tensor:
    """[B] int64: the place of the last token of each row of the mask; 0 where there is none."""
    places = torch.arange(mask.size(1), device=mask.device).expand_as(mask)
    return places.masked_fill(~mask, -1).amax(dim=1).clamp(min=0)


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns) [B, R], not whitened (Schulman et al., arXiv 1506.02438, equations 11 and 16).

        delta_t = r_t + gamma V_{t+1} - V_t       A_t = delta_t + gamma lam A_{t+1}       returns = A + V

    t + 1 is the next token of the mask; behind the last one V and A are 0.
    """
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.size(1))):
        own = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_value = torch.where(own, values[:, t], next_value)
        next_advantage = torch.where(own, advantage, next_advantage)
        advantages[:, t] = torch.where(own, advantage, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


@dataclass(frozen=True)
class Moments:
    """Of the marked elements of all ranks, 0-d each."""

    count: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    """Unbiased, over count - 1."""


def moments(values: torch.Tensor, mask: torch.Tensor, axis: Axis | None = None) -> Moments:
    """Mean and variance over the mask, over the ranks of `axis`: two passes, so that nothing cancels. A collective."""
    kept, one = values[mask].double(), torch.ones((), dtype=torch.float64, device=values.device)

    def total(x: torch.Tensor) -> torch.Tensor:
        return x if axis is None else all_reduce_(x, axis)

    sums = total(torch.stack([kept.sum(), one * kept.numel()]))
    mean = sums[0] / sums[1].clamp(min=1)
    squares = total((kept - mean).square().sum())
    return Moments(sums[1], mean, squares / (sums[1] - 1).clamp(min=1))


def whiten(
    values: torch.Tensor, mask: torch.Tensor, axis: Axis | None = None, *, shift_mean: bool = True
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over the masks of all ranks of `axis`; without shift_mean the mean is kept.

    A collective. Unbiased variance, as TRL and verl have it.
    """
    found = moments(values, mask, axis)
    mean = found.mean.to(values.dtype)
    scaled = (values - mean) * torch.rsqrt(found.variance + _EPS).to(values.dtype)
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0.0)


def group_advantages(
    scores: torch.Tensor, groups: torch.Tensor, *, kind: GroupBaseline = "grpo", eps: float = 1e-4
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantage of each response [B], whether its group tells anything [B] bool), of the scores of all ranks.

        grpo      (s - mean) / (std + eps) of the group       arXiv 2402.03300
        dr_grpo   s - mean of the group                       arXiv 2503.20783
        rloo      s - mean of the others of the group         arXiv 2402.14740

    groups [B] int64: the prompt of each response. std is unbiased. A group whose scores are all equal tells nothing.
    """
    wide = scores.double()
    _, place = torch.unique(groups, return_inverse=True)
    count = torch.bincount(place).double()
    total = torch.zeros_like(count).index_add_(0, place, wide)
    centred = wide - (total / count)[place]
    squares = torch.zeros_like(count).index_add_(0, place, centred.square())
    highest = torch.full_like(count, -torch.inf).scatter_reduce(0, place, wide, "amax")
    lowest = torch.full_like(count, torch.inf).scatter_reduce(0, place, wide, "amin")
    tells = (highest > lowest)[place]
    if kind == "grpo":
        found = centred / ((squares / (count - 1).clamp(min=1)).sqrt()[place] + eps)
    elif kind == "rloo":
        found = centred * (count / (count - 1).clamp(min=1))[place]
    else:
        found = centred
    return torch.where(tells, found, 0.0).to(scores.dtype), tells


def returns_to_go(rewards: torch.Tensor, mask: torch.Tensor, *, gamma: float = 1.0) -> torch.Tensor:
    """[B, R]: the discounted sum of a token's reward and those of the tokens behind it; whitened, the advantages of
    REINFORCE++ (arXiv 2501.03262, section 3)."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[1]


@dataclass
class AdaptiveKl:
    """The KL coefficient that keeps the KL near a target (Ziegler et al., arXiv 1909.08593, section 2.2)."""

    coefficient: float = 0.2
    target: float = 6.0
    """Nats, of whole responses."""
    horizon: float = 10_000.0
    """Episodes."""

    def update(self, kl: float, *, episodes: int) -> float:
        """The new coefficient, after `episodes` responses with a mean KL (summed over tokens) of `kl`."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coefficient *= 1.0 + error * episodes / self.horizon
        return self.coefficient


def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, axis: Axis | None = None
) -> float:
    """1 - Var(returns - values) / Var(returns): 1 of a perfect critic, 0 of a constant one. A collective."""
    spread = moments(returns, mask, axis).variance
    error = moments(returns - values, mask, axis).variance
    return float(1.0 - error / spread) if float(spread) > 0.0 else float("nan")
