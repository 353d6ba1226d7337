"""The loop: how many tokens a step has, how many steps, what is recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Batch geometry, length, recomputation, reporting."""

    steps: int = 100
    """Optimizer steps."""
    micro_batch_size: int = 1
    """Sequences a rank computes at once."""
    global_batch_size: int = 8
    """Sequences of one optimizer step over the whole job; a multiple of micro_batch_size * dp."""
    seq_length: int = 256
    """Tokens of a sequence."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in backward: `selective` = attention only, `full` = whole layers."""
    seed: int = 1234
    """Decides initial weights, data order and dropout, whatever the layout."""
    log_every: int = 1
    """Steps between log lines."""
    eval_every: int = 0
    """Steps between validation losses; 0 = only at the end."""
    eval_sequences: int = 64
    """Sequences of one validation loss."""
    metrics_file: str | None = None
    """Where the metrics go, one JSON object a line. auto = metrics.jsonl in the save directory."""
