"""The optimizer, the learning-rate schedule and clipping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with decoupled weight decay (arXiv 1711.05101)."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    min_learning_rate: float | None = None
    """Where the schedule ends. auto = a tenth of the peak."""
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after warm-up; `wsd` = warm-up, stable, then linear decay over the last `decay_steps` (arXiv
    2404.06395)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay_steps: int | None = None
    """Length of the decay, steps. auto = all steps after warm-up; for `wsd` a tenth of all steps."""
    weight_decay: float = 0.1
    """Applied to matrices only: not to norms, biases and learned positions."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment (GPT-3's 0.95)."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 = never."""
