"""Rules on the optimizer and on precision: see check.py."""

from __future__ import annotations

import math
from dataclasses import fields

from megallm.config.numerics import NumericsConfig
from megallm.config.optim import OptimConfig
from megallm.config.parallel import ParallelConfig
from megallm.config.resolve import resolve_optim
from megallm.config.rules import either, fraction, not_negative, positive

OPTIMIZERS = ("adamw", "muon", "sgd")
PRECISIONS = ("fp32", "bf16", "fp16", "fp64", "fp8")
_OF_PRECISION = {"fp8": "fp8_", "fp16": "loss_scale"}
"""What the names of settings begin with that only one precision knows."""
_DEFAULTS = {field.name: field.default for field in fields(NumericsConfig)}


def check_numerics(numerics: NumericsConfig) -> None:
    """ValueError unless the precision exists, and what else is set belongs to it."""
    positive(numerics, "loss_scale", "loss_scale_window", "loss_scale_hysteresis")
    not_negative(numerics, "max_bad_steps")
    precision = numerics.precision
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision} does not exist: use {either(PRECISIONS)}")
    if numerics.grad_dtype == "bf16" and precision not in ("bf16", "fp8"):
        raise ValueError(f"grad_dtype bf16 with precision {precision}: use precision bf16 or fp8, or grad_dtype fp32")
    if numerics.tf32 and precision != "fp32":
        raise ValueError(f"tf32 with precision {precision}: it is about fp32 products: leave it out, or use fp32")
    if numerics.grad_dtype == "fp32" and precision == "fp64":
        raise ValueError("grad_dtype fp32 with precision fp64, which sums in fp64: leave it out")
    for only in ("fp8", "fp16"):
        for name, default in _DEFAULTS.items():
            if precision != only and name.startswith(_OF_PRECISION[only]) and getattr(numerics, name) != default:
                raise ValueError(f"{name} with precision {precision}: leave it out, or use precision {only}")
    if numerics.loss_scale < 1.0 or numerics.loss_scale != 2.0 ** round(math.log2(numerics.loss_scale)):
        raise ValueError(f"loss_scale ({numerics.loss_scale}) must be 1 or a power of 2, so that scaling is exact")


def check_optim(optim: OptimConfig, *, total_steps: int) -> None:
    """ValueError unless the learning-rate schedule fits into `total_steps` and AdamW's constants are in range."""
    positive(optim, "learning_rate", "eps")
    not_negative(optim, "weight_decay", "max_grad_norm", "warmup_steps")
    fraction(optim, "beta1", "beta2")
    if optim.momentum is not None:
        fraction(optim, "momentum")
        if optim.optimizer == "adamw":
            raise ValueError(
                f"momentum ({optim.momentum}) with optimizer adamw, which has beta1: leave it out, or use sgd "
                "or muon"
            )
    if optim.min_learning_rate is not None and not 0.0 <= optim.min_learning_rate <= optim.learning_rate:
        raise ValueError(
            f"min_learning_rate ({optim.min_learning_rate}) must be between 0 and learning_rate "
            f"({optim.learning_rate})"
        )
    warmup, after_warmup = optim.warmup_steps, total_steps - optim.warmup_steps
    if warmup and after_warmup < 1:
        raise ValueError(
            f"warmup_steps ({warmup}) must be smaller than steps ({total_steps}): use warmup_steps "
            f"{total_steps - 1} or less"
        )
    if optim.decay_steps is None:
        return
    positive(optim, "decay_steps")
    if optim.lr_schedule == "constant":
        raise ValueError(f"decay_steps ({optim.decay_steps}) with lr_schedule constant, which never decays: drop one")
    if resolve_optim(optim, total_steps=total_steps).decay_steps > after_warmup:  # type: ignore[operator]
        raise ValueError(
            f"warmup_steps ({warmup}) + decay_steps ({optim.decay_steps}) is more than steps ({total_steps}): use "
            f"decay_steps {after_warmup} or less"
        )


def check_offload(parallel: ParallelConfig) -> None:
    """ValueError unless what is to be offloaded leaves the device at the ZeRO stage."""
    if parallel.offload == "optimizer+params" and parallel.zero != 3:
        raise ValueError(
            f"offload optimizer+params with zero {parallel.zero}: parameters leave the device between their uses at "
            "stage 3 only: use zero 3, or offload optimizer"
        )


def check_optimizer_layout(optim: OptimConfig, parallel: ParallelConfig) -> None:
    """ValueError unless the optimizer can work on the shards that `parallel` gives it, where they are."""
    check_offload(parallel)
    if optim.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {optim.optimizer} does not exist: use {either(OPTIMIZERS)}")
    if optim.optimizer == "muon" and parallel.zero == 3:
        raise ValueError("optimizer muon with zero 3: it needs whole matrices: use zero 1 or 2, or optimizer adamw")
    if optim.optimizer != "adamw" and parallel.offload != "none":
        raise ValueError(
            f"optimizer {optim.optimizer} with offload {parallel.offload}: only AdamW runs on the host: use optimizer "
            "adamw, or offload none"
        )
