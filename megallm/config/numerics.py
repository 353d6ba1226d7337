"""What numbers are kept in, and what happens when they overflow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp64", "fp32", "bf16", "fp16", "fp8"]


@dataclass(frozen=True, kw_only=True)
class NumericsConfig:
    """Precision of weights, activations and gradient sums; loss scaling; steps that are not finite."""

    precision: Precision = "fp32"
    """`bf16`, `fp16`: weights and activations, with fp32 master weights and moments; fp16 scales its losses. `fp8`:
    bf16, with the layers' linear products in fp8 (GPUs since Ada and Hopper). `fp64`: proofs on CPU."""
    grad_dtype: Literal["fp32", "bf16"] | None = None
    """What gradients are summed in, over microbatches and ranks. auto = fp32 (fp64 at precision fp64); `bf16` halves
    memory and traffic of bf16 and fp8 runs."""
    tf32: bool = False
    """Lets fp32 products run on a GPU's tensor cores with 10-bit mantissas (Ampere and newer)."""
    fp8_recipe: Literal["tensorwise", "rowwise"] = "tensorwise"
    """Scales of fp8 products: one a tensor (fastest), or one a row, with the weights' gradients in bf16 (tighter)."""
    fp8_keep_ends: bool = False
    """Leaves the linears of the first and the last layer in bf16."""
    fp8_emulate: bool = False
    """The same fp8 rounding without fp8 hardware, slow: for tests and study."""
    loss_scale: float = 65536.0
    """fp16: the scale to begin with (2^16); a power of 2."""
    loss_scale_window: int = 1000
    """fp16: the scale doubles after so many good steps in a row."""
    loss_scale_hysteresis: int = 2
    """fp16: the scale halves at this many bad steps since it last grew, and at every one after that."""
    max_bad_steps: int = 20
    """Steps in a row whose gradients are not finite before a run stops; each is skipped. 0 = never stop."""
