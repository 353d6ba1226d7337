"""Low-rank adapters (LoRA, arXiv 2106.09685): small factors that train beside frozen weights.

    y = W x + s B A dropout(x)      A [rank, in], B [out, rank], B = 0 at first; s = alpha / rank
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megallm.config.model import ModelConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What may have adapters: the linears of a layer."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which linears have adapters, and of what size."""

    lora_rank: int = 0
    """Inner size of the adapters; the weights themselves are frozen then. 0 = no adapters, everything trains."""
    lora_alpha: float = 16.0
    """Adapters count alpha / rank times."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' input; linears that read the same input share a mask."""
    lora_targets: tuple[str, ...] = ()
    """Some of q_proj k_proj v_proj o_proj gate_proj up_proj down_proj. Empty = all that the model has."""
    lora_rslora: bool = False
    """alpha / sqrt(rank) instead of alpha / rank, so that updates do not shrink as the rank grows (arXiv
    2312.03732)."""

    @property
    def scale(self) -> float:
        """s: what B A is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.lora_rank) if self.lora_rslora else self.lora_rank)


def projections_of(model: ModelConfig) -> tuple[str, ...]:
    """The linears of the model's layers."""
    return tuple(name for name in PROJECTIONS if name != "gate_proj" or model.gated_mlp)


def lora_targets(lora: LoraConfig, model: ModelConfig) -> tuple[str, ...]:
    """The linears that have adapters, in the order of PROJECTIONS."""
    return tuple(name for name in projections_of(model) if not lora.lora_targets or name in lora.lora_targets)
