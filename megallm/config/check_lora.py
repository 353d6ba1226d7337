"""Rules on adapters: see check.py."""

from __future__ import annotations

from megallm.config.lora import LoraConfig, projection_shape, projections_of
from megallm.config.model import ModelConfig
from megallm.config.numerics import Precision
from megallm.config.optim import OptimConfig
from megallm.config.rules import fraction, positive

_BLOCK = 64
"""Weights that share a scale in 4 bits (ops/nf4.py)."""


def check_lora(
    lora: LoraConfig,
    model: ModelConfig,
    optim: OptimConfig | None = None,
    *,
    tp: int = 1,
    precision: Precision = "fp32",
) -> None:
    """ValueError unless `model` can have these adapters and the optimizer, where one is given, can train them.

    tp, precision: what weights in 4 bits are cut by and multiplied in."""
    if lora.lora_rank < 0:
        raise ValueError(f"lora_rank ({lora.lora_rank}) must be at least 1, or 0 for no adapters")
    fraction(lora, "lora_dropout")
    positive(lora, "lora_alpha")
    _check_targets(lora, model)
    if lora.lora_rank and optim is not None and optim.optimizer == "muon":
        raise ValueError(
            f"optimizer muon with lora_rank {lora.lora_rank}: the factors of an adapter are no matrices to "
            "orthogonalise: use optimizer adamw or sgd"
        )
    if lora.lora_base == "nf4":
        _check_nf4(lora, model, tp=tp, precision=precision)


def _check_targets(lora: LoraConfig, model: ModelConfig) -> None:
    known = projections_of(model)
    for name in lora.lora_targets:
        if name not in known:
            raise ValueError(f"lora_targets: this model has no {name}: use some of {', '.join(known)}, or none for all")
    if len(set(lora.lora_targets)) < len(lora.lora_targets):
        raise ValueError(f"lora_targets ({', '.join(lora.lora_targets)}) names a projection twice: name each once")


def _check_nf4(lora: LoraConfig, model: ModelConfig, *, tp: int, precision: Precision) -> None:
    if lora.lora_rank == 0:
        raise ValueError(
            "lora_base nf4 with lora_rank 0: weights in 4 bits do not train: give adapters that do, lora_rank 16 for "
            "example, or lora_base model"
        )
    if precision == "fp8":
        raise ValueError(
            "lora_base nf4 with precision fp8: a weight in 4 bits is made dense for its products, and these would "
            "round it to fp8 once more: use precision bf16, or lora_base model"
        )
    for name in projections_of(model):
        rows, columns = projection_shape(model, name)
        if columns % 2:
            raise ValueError(
                f"lora_base nf4: {name} has {columns} inputs, an odd number, and two weights share a byte: use "
                "lora_base model"
            )
        own_rows, own_columns = projection_shape(model, name, tp=tp)
        if not _is_whole_blocks(model, name, tp):
            names = projections_of(model)
            fits = [t for t in range(1, tp) if tp % t == 0 and all(_is_whole_blocks(model, n, t) for n in names)]
            raise ValueError(
                f"lora_base nf4 at tp {tp}: of {name} [{rows}, {columns}] a rank holds [{own_rows}, {own_columns}], "
                f"which is not cut between blocks of {_BLOCK} weights, each of which has one scale: use tp "
                f"{' or '.join(map(str, fits))}, or lora_base model"
            )


def _is_whole_blocks(model: ModelConfig, name: str, tp: int) -> bool:
    (rows, columns), (own_rows, own_columns) = (projection_shape(model, name, tp=t) for t in (1, tp))
    if own_columns < columns:
        return columns % _BLOCK == own_columns % _BLOCK == 0
    return own_rows == rows or (rows % own_rows == 0 and own_rows * columns % _BLOCK == 0)
