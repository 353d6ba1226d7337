"""Losses: pure functions of the model's output and a microbatch, returning (sum, count, metrics).

The engine divides the sum by the count of the whole optimizer step, over all microbatches and ranks, before backward;
a loss never averages. `count` must be a function of the microbatch alone (`count_labels` unless told otherwise),
because it is needed before the first forward.

Letters: B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megallm.parallel.logprobs import IGNORE_INDEX, VocabLogits

Batch = dict[str, torch.Tensor]
LossResult = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
LossFunction = Callable[[Any, Batch], LossResult]


def count_labels(batch: Batch) -> torch.Tensor:
    """0-d int64: the tokens of `labels` [B, S] that are trained on (not -100)."""
    return (batch["labels"] != IGNORE_INDEX).sum()


def count_tokens(batch: Batch) -> torch.Tensor:
    """0-d int64: the tokens of the rows' `lengths` [B]; without, all places of `input_ids` [B, S]."""
    ids = batch["input_ids"]
    return batch["lengths"].sum() if "lengths" in batch else ids.new_tensor(ids.numel())


def language_model_loss(logits: VocabLogits, batch: Batch) -> LossResult:
    """Summed cross-entropy in nats of `labels` [B, S] (already shifted: the token that follows each position)."""
    return logits.summed_cross_entropy(batch["labels"]), count_labels(batch), {}
