"""Losses of rollouts: the clipped policy loss of PPO and its relatives, and that of a critic.

A batch holds rows prompt + response. What is per token is [B, S] or, of rows end to end (rows.py), [1, T], and aligned
with `labels`: place t holds what belongs to the token t + 1 that it predicts. Tokens with labels are the policy's own,
but for rows of pretraining text, whose `ptx_weights` are above 0.

Sums count what the aggregation says. Metrics are sums over the policy's tokens, detached, and hold `num_tokens` and
`num_sequences`, so that they can be divided whatever the aggregation.

Letters: B rows, S positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megallm.config.rl import KlEstimator
from megallm.parallel.logprobs import IGNORE_INDEX, VocabLogits
from megallm.trainers.losses import Batch, LossResult
from megallm.trainers.rollout_maths import LOG_RATIO_LIMIT, kl_estimate
from megallm.trainers.rows import per_token, row_means, row_sums

Metrics = dict[str, torch.Tensor]


def policy_mask(batch: Batch) -> torch.Tensor:
    """bool, like labels: the tokens that the policy wrote."""
    mask = batch["labels"] != IGNORE_INDEX
    return mask & (batch["ptx_weights"] == 0) if "ptx_weights" in batch else mask


def count_policy_tokens(batch: Batch) -> torch.Tensor:
    """0-d int64."""
    return policy_mask(batch).sum()


def count_responses(batch: Batch) -> torch.Tensor:
    """0-d int64: rows with a token of the policy."""
    return (row_sums(policy_mask(batch).float(), batch) > 0).sum()


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """Of each token max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)) (Schulman et al., arXiv 1707.06347,
    equation 7) + kl_coefficient KL(policy, reference) - entropy_coefficient H, and then

        aggregation   sum                                   divided by
        token         of all tokens                         tokens                      PPO, DAPO (arXiv 2503.14476)
        sequence      of the means of rows                  rows with a response        GRPO (arXiv 2402.03300)
        constant      of all tokens                         those rows * max_length     Dr.GRPO (arXiv 2503.20783)

    and -ptx_weights log p of pretraining text, at temperature 1 (PPO-ptx, arXiv 2203.02155, equation 2).

    Batch: `labels`; `advantages`; `old_logprobs`, of the policy that wrote the responses (without: it is this one, and
    ratios are 1); `ref_logprobs` if kl_coefficient is not 0; `ptx_weights` if there is such text.
    """

    clip_low: float = 0.2
    clip_high: float | None = None
    """None = clip_low; above it, "clip-higher" of DAPO."""
    dual_clip: float | None = None
    """With a negative advantage the loss is -dual_clip A at most (arXiv 1912.09729, equation 5)."""
    ratio: Literal["token", "sequence"] = "token"
    """sequence: exp of the row's mean log-ratio, its gradient by token (GSPO-token, arXiv 2507.18071, section 4.3)."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    max_length: int | None = None
    """Tokens of the longest response that can be, of "constant"."""
    kl_coefficient: float = 0.0
    kl_estimator: KlEstimator = "k3"
    entropy_coefficient: float = 0.0
    temperature: float = 1.0
    """Of the rollout: every log-probability, old and reference too, is that of softmax(logits / temperature)."""

    def __post_init__(self) -> None:
        if self.aggregation == "constant" and not self.max_length:
            raise ValueError("aggregation constant divides by max_length: give the longest response's tokens")

    def __call__(self, logits: VocabLogits, batch: Batch) -> LossResult:
        """(sum, count, metrics' sums over the policy's tokens)."""
        mask, labels, entropy = policy_mask(batch), batch["labels"], None
        logits = logits.tempered(self._temperatures(batch))
        if self.entropy_coefficient:
            logprobs, entropy = logits.logprobs_and_entropy(labels)
        else:
            logprobs = logits.token_logprobs(labels)
        losses, metrics = self._clipped(logprobs, mask, batch)
        if self.kl_coefficient:
            kl = kl_estimate(logprobs, _masked(batch["ref_logprobs"].to(logprobs), mask), self.kl_estimator)
            losses = losses + self.kl_coefficient * kl
            metrics["kl_loss"] = kl
        if entropy is not None:
            losses = losses - self.entropy_coefficient * entropy
            metrics["entropy"] = entropy
        loss = self._sum(losses, mask, batch)
        sums = {name: _masked(values.detach(), mask).sum() for name, values in metrics.items()}
        sums |= {"num_tokens": mask.sum(), "num_sequences": count_responses(batch)}
        if "ptx_weights" in batch:
            weights = batch["ptx_weights"].to(logprobs)
            loss = loss - (weights * logprobs).sum()
            is_text = (labels != IGNORE_INDEX) & ~mask
            sums |= {"ptx_loss": -_masked(logprobs.detach(), is_text).sum(), "num_ptx_tokens": is_text.sum()}
        return loss, self.count(batch), sums

    def count(self, batch: Batch) -> torch.Tensor:
        """0-d int64: what the sum is divided by. Pretraining text counts nothing."""
        if self.aggregation == "token":
            return count_policy_tokens(batch)
        rows = count_responses(batch)
        return rows if self.aggregation == "sequence" else rows * self._length

    @property
    def _length(self) -> int:
        assert self.max_length is not None
        return self.max_length

    def _temperatures(self, batch: Batch) -> float | torch.Tensor:
        """1 on pretraining text."""
        if self.temperature == 1.0 or "ptx_weights" not in batch:
            return self.temperature
        is_text = batch["ptx_weights"].reshape(-1) > 0
        every = torch.full(is_text.shape, self.temperature, dtype=torch.float64, device=is_text.device)
        return every.masked_fill(is_text, 1.0)

    def _clipped(self, logprobs: torch.Tensor, mask: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        """(loss, metrics) of each token."""
        old = batch["old_logprobs"].to(logprobs) if "old_logprobs" in batch else logprobs.detach()
        d = _masked(logprobs - old, mask)
        if self.ratio == "sequence":
            d = (d - d.detach()) + per_token(row_means(d.detach(), mask, batch), batch, d)
        log_ratio = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        ratio, advantages = log_ratio.exp(), _masked(batch["advantages"].to(logprobs), mask)
        low, high = 1.0 - self.clip_low, 1.0 + (self.clip_low if self.clip_high is None else self.clip_high)
        free, clipped = -advantages * ratio, -advantages * ratio.clamp(low, high)
        loss = torch.maximum(free, clipped)
        is_clipped = clipped > free
        metrics = {
            "approx_kl": kl_estimate(old, logprobs.detach(), "k3"),
            "clip_fraction": is_clipped,
            "clip_fraction_low": is_clipped & (ratio < low),
            "clip_fraction_high": is_clipped & (ratio > high),
            "ratio": ratio,
        }
        if self.dual_clip is not None:
            bound = -advantages * self.dual_clip
            metrics["dual_clip_fraction"] = (advantages < 0) & (loss > bound)
            loss = torch.where(advantages < 0, torch.minimum(loss, bound), loss)
        return loss, metrics | {"policy_loss": loss}

    def _sum(self, losses: torch.Tensor, mask: torch.Tensor, batch: Batch) -> torch.Tensor:
        return (row_means(losses, mask, batch) if self.aggregation == "sequence" else _masked(losses, mask)).sum()


@dataclass(frozen=True, kw_only=True)
class ValueLoss:
    """Of each token max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2 (as PPO's authors have it in code).

    Batch: `labels`; `returns`; `old_values` unless clip is None.
    """

    clip: float | None = 0.2

    def __call__(self, values: torch.Tensor, batch: Batch) -> LossResult:
        """values [B, S] or [1, T] -> (sum, tokens, metrics' sums over the policy's tokens)."""
        mask, returns = policy_mask(batch), batch["returns"].to(values)
        free = (values - returns).square()
        losses = free
        if self.clip is not None:
            old = batch["old_values"].to(values)
            losses = torch.maximum(free, (values.clamp(old - self.clip, old + self.clip) - returns).square())
        loss = 0.5 * _masked(losses, mask).sum()
        metrics = {
            "value_loss": loss.detach(),
            "value_clip_fraction": _masked(losses.detach() > free.detach(), mask).sum(),
            "num_tokens": mask.sum(),
        }
        return loss, mask.sum(), metrics

    def count(self, batch: Batch) -> torch.Tensor:
        """0-d int64: tokens of the policy."""
        return count_policy_tokens(batch)


def _masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, values, 0.0)
