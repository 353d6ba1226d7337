"""Rules on adapters: see check.py."""

from __future__ import annotations

from megallm.config.lora import LoraConfig, projections_of
from megallm.config.model import ModelConfig
from megallm.config.optim import OptimConfig
from megallm.config.rules import fraction, positive


def check_lora(lora: LoraConfig, model: ModelConfig, optim: OptimConfig | None = None) -> None:
    """ValueError unless `model` can have these adapters and the optimizer, where one is given, can train them."""
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


def _check_targets(lora: LoraConfig, model: ModelConfig) -> None:
    known = projections_of(model)
    for name in lora.lora_targets:
        if name not in known:
            raise ValueError(f"lora_targets: this model has no {name}: use some of {', '.join(known)}, or none for all")
    if len(set(lora.lora_targets)) < len(lora.lora_targets):
        raise ValueError(f"lora_targets ({', '.join(lora.lora_targets)}) names a projection twice: name each once")
