"""Low-rank adapters (LoRA, arXiv 2106.09685): small factors that train beside frozen weights.

    y = W x + s B A dropout(x)      A [rank, in], B [out, rank], B = 0 at first; s = alpha / rank
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megallm.config.model import ModelConfig

LoraBase = Literal["model", "nf4"]
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
    lora_base: LoraBase = "model"
    """What the frozen weights of the layers' linears are held in: the model's own dtype, or 4 bits (nf4: QLoRA, arXiv
    2305.14314), about 0.52 bytes a weight; the embedding, the head and norms stay as they are."""
    lora_double_quant: bool = True
    """With nf4: the scales of its blocks of 64 weights are quantised too, to 8 bits; without, 0.56 bytes a weight."""

    @property
    def scale(self) -> float:
        """s: what B A is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.lora_rank) if self.lora_rslora else self.lora_rank)

    @property
    def is_nf4(self) -> bool:
        """Whether the frozen linears are in 4 bits."""
        return self.lora_rank > 0 and self.lora_base == "nf4"


def projections_of(model: ModelConfig) -> tuple[str, ...]:
    """The linears of the model's layers."""
    return tuple(name for name in PROJECTIONS if name != "gate_proj" or model.gated_mlp)


def projection_shape(model: ModelConfig, name: str, *, tp: int = 1) -> tuple[int, int]:
    """[out, in] of a projection as one of `tp` ranks holds it."""
    hidden, inner, dim = model.hidden_size, model.intermediate_size, model.head_dim
    if name == "o_proj":
        return hidden, model.num_attention_heads * dim // tp
    if name == "down_proj":
        return hidden, inner // tp
    heads = {"q_proj": model.num_attention_heads // tp}
    heads |= dict.fromkeys(("k_proj", "v_proj"), max(model.num_key_value_heads // tp, 1))
    return (heads[name] * dim if name in heads else inner // tp), hidden


def lora_targets(lora: LoraConfig, model: ModelConfig) -> tuple[str, ...]:
    """The linears that have adapters, in the order of PROJECTIONS."""
    return tuple(name for name in projections_of(model) if not lora.lora_targets or name in lora.lora_targets)
