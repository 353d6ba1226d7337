"""The optimizer, the learning-rate schedule and clipping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """One optimizer, its constants and schedule."""

    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    """`adamw`: decoupled weight decay (arXiv 1711.05101). `muon`: orthogonalised momentum for the layers' matrices,
    AdamW for the rest (arXiv 2502.16982). `sgd`: with momentum."""

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
    momentum: float | None = None
    """Decay of Muon's and SGD's momentum. auto = 0.95 for `muon`, 0.9 for `sgd`."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.95
    """AdamW: decay of the second moment (GPT-3's 0.95)."""
    eps: float = 1e-8
    """AdamW: added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 = never."""
