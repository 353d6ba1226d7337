"""Losses on preferences: DPO and its relatives, and the Bradley-Terry loss of reward models.

A batch holds responses, B rows as data/finetune.py's PairDataset makes them: rows with the same `sample_ids` answer one
prompt and lie in one microbatch, best first (`ranks` 0, 1, ...; -1 in rows that only fill up, whose labels are -100).
Sums count prompts.

Letters: B sequences, S positions; c chosen, r rejected; d = log-probability of a response under the policy minus that
under the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from megallm.parallel.logprobs import IGNORE_INDEX, VocabLogits
from megallm.trainers.losses import Batch, LossResult
from megallm.trainers.rows import last_values, row_sums

DpoKind = Literal["sigmoid", "ipo", "hinge"]


def count_prompts(batch: Batch) -> torch.Tensor:
    """0-d int64: prompts of the batch, every one counted at its first row."""
    return first_rows(batch).sum()


def first_rows(batch: Batch) -> torch.Tensor:
    """[B] bool: the first row of each prompt, which is a best response (others may be as good)."""
    prompts = batch["sample_ids"]
    is_first = torch.ones_like(prompts, dtype=torch.bool)
    is_first[1:] = prompts[1:] != prompts[:-1]
    return is_first & (batch["ranks"] >= 0)


def response_logprobs(logits: VocabLogits, batch: Batch) -> torch.Tensor:
    """[B]: the sum of the log-probabilities of the trained tokens of each row, fp32."""
    return row_sums(logits.token_logprobs(batch["labels"]), batch)


@dataclass(frozen=True, kw_only=True)
class DpoLoss:
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290, equation 7) and relatives, of h = d_c - d_r.

        sigmoid    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)     e > 0: conservative DPO (label smoothing)
        ipo        (h - 1 / (2 beta))^2                                      arXiv 2310.12036, equation 17
        hinge      max(0, 1 - beta h)                                        SLiC, arXiv 2305.10425

    Batch: `labels` [B, S]; `ref_logprobs` [B] fp32, unless reference_free; pairs of rows, chosen then rejected.
    """

    kind: DpoKind = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    reference_free: bool = False
    length_normalised: bool = True
    """ipo: d are means over tokens (as its authors and TRL have it) and not sums."""

    def __call__(self, logits: VocabLogits, batch: Batch) -> LossResult:
        """(sum over pairs, number of pairs, metrics' sums over pairs)."""
        logprobs = response_logprobs(logits, batch)
        against = logprobs.new_zeros(()) if self.reference_free else batch["ref_logprobs"].to(logprobs.dtype)
        d, real = logprobs - against, first_rows(batch).to(logprobs.dtype)[0::2]
        if self.kind == "ipo" and self.length_normalised:
            d_loss = d / row_sums((batch["labels"] != IGNORE_INDEX).to(d.dtype), batch).clamp(min=1)
        else:
            d_loss = d
        h = d_loss[0::2] - d_loss[1::2]
        reward = self.beta * d.detach()
        margin = reward[0::2] - reward[1::2]
        metrics = {
            "reward_chosen": (reward[0::2] * real).sum(),
            "reward_rejected": (reward[1::2] * real).sum(),
            "reward_margin": (margin * real).sum(),
            "reward_accuracy": ((margin > 0) * real).sum(),
            "logprob_chosen": (logprobs.detach()[0::2] * real).sum(),
            "logprob_rejected": (logprobs.detach()[1::2] * real).sum(),
        }
        return (self._of(h) * real).sum(), count_prompts(batch), metrics

    def _of(self, h: torch.Tensor) -> torch.Tensor:
        if self.kind == "ipo":
            return (h - 1.0 / (2.0 * self.beta)).square()
        if self.kind == "hinge":
            return F.relu(1.0 - self.beta * h)
        smooth, scaled = self.label_smoothing, self.beta * h
        return -(1.0 - smooth) * F.logsigmoid(scaled) - smooth * F.logsigmoid(-scaled)


@dataclass(frozen=True, kw_only=True)
class RewardLoss:
    """Bradley-Terry over all pairs of a prompt's K ranked responses, divided by their number K (K-1) / 2.

    mean over pairs (i better than j) of -log sigmoid(s_i - s_j - margin) + centering (s_i + s_j)^2
    (Ouyang et al., arXiv 2203.02155, section 3.5; centering: Eisenstein et al., arXiv 2312.09244)

    Batch: `lengths` [B] int64, tokens of each row, whose last one scores it; `ranks`, `sample_ids` [B] int64; `margins`
    [B] fp32, those of the row's prompt, optional.
    """

    centering: float = 0.0

    def __call__(self, values: Any, batch: Batch) -> LossResult:
        """values [B, S] or [1, T] fp32 -> (sum over prompts, number of prompts, metrics' sums over prompts)."""
        scores = last_values(values, batch)
        prompts, ranks = batch["sample_ids"], batch["ranks"]
        same = (prompts.unsqueeze(1) == prompts) & (ranks >= 0)
        is_pair = (same & (ranks.unsqueeze(1) >= 0) & (ranks.unsqueeze(1) < ranks)).to(scores.dtype)  # [better, worse]
        num_pairs = same.to(scores.dtype) @ is_pair.sum(1)  # [B], of the row's prompt
        weight = is_pair / num_pairs.clamp(min=1).unsqueeze(1)
        difference = scores.unsqueeze(1) - scores
        margins = batch["margins"].to(scores.dtype) if "margins" in batch else scores.new_zeros(scores.shape)
        loss = -F.logsigmoid(difference - margins)
        if self.centering:
            loss = loss + self.centering * (scores.unsqueeze(1) + scores).square()
        detached = difference.detach()
        metrics = {
            "reward_margin": (detached * weight).sum(),
            "reward_accuracy": ((detached > 0) * weight).sum(),
            "reward_chosen": (scores.detach() * first_rows(batch)).sum(),
        }
        return (loss * weight).sum(), count_prompts(batch), metrics
