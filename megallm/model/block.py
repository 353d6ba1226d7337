"""One transformer block, pre-norm.

    x = x + dropout(attention(norm(x)))
    x = x + dropout(mlp(norm(x)))

Letters: T tokens, H hidden, t tp size; T' = T, or T/t under sequence parallelism.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from megallm.model.attention import SelfAttention
from megallm.model.context import TokenContext
from megallm.model.mlp import MLP
from megallm.model.parameters import ParameterFactory
from megallm.ops.norm import layer_norm, rms_norm


class Norm(nn.Module):
    """RMSNorm or LayerNorm by config."""

    def __init__(self, factory: ParameterFactory, name: str) -> None:
        super().__init__()
        config = factory.config
        self._eps = config.norm_eps
        self.weight = factory.replicated(f"{name}.weight", (config.hidden_size,), init="ones")
        self.bias = None
        if config.norm == "layernorm":
            self.bias = factory.replicated(f"{name}.bias", (config.hidden_size,), init="zeros")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T', H] -> [T', H]."""
        if self.bias is None:
            return rms_norm(x, self.weight, self._eps)
        return layer_norm(x, self.weight, self.bias, self._eps)


class Block(nn.Module):
    """Attention and MLP with their norms and residual additions."""

    def __init__(self, factory: ParameterFactory, *, layer: int, recompute_attention: bool) -> None:
        super().__init__()
        config = factory.config
        self._layer = layer
        self._dropout = config.hidden_dropout
        scale = 1.0 / math.sqrt(2 * config.num_hidden_layers) if config.scale_residual_init else 1.0
        std_out = config.initializer_range * scale
        prefix = f"model.layers.{layer}"
        self.input_layernorm = Norm(factory, f"{prefix}.input_layernorm")
        self.self_attn = SelfAttention(factory, layer=layer, std_out=std_out, recompute=recompute_attention)
        self.post_attention_layernorm = Norm(factory, f"{prefix}.post_attention_layernorm")
        self.mlp = MLP(factory, layer=layer, std_out=std_out)
        self._tp_rank = factory.mesh.tp.rank if factory.sequence_parallel else 0

    def forward(
        self, x: torch.Tensor, context: TokenContext, rotary: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """[T', H] -> [T', H]."""
        x = x + self._drop(self.self_attn(self.input_layernorm(x), context, rotary), context, "attention_out")
        return x + self._drop(self.mlp(self.post_attention_layernorm(x)), context, "mlp_out")

    def _drop(self, x: torch.Tensor, context: TokenContext, place: str) -> torch.Tensor:
        return drop_hidden(x, context, self._dropout, layer=self._layer, place=place, tp_rank=self._tp_rank)


def drop_hidden(
    x: torch.Tensor, context: TokenContext, rate: float, *, layer: int, place: str, tp_rank: int
) -> torch.Tensor:
    """Dropout on x [T', H], the tp_rank-th part of the microbatch's tokens."""
    if context.dropout is None or rate == 0.0:
        return x
    return context.dropout.hidden(
        x, rate, layer=layer, place=place, first_token=tp_rank * x.size(0), seq_length=context.seq_length
    )
