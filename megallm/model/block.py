"""One transformer block, pre-norm.

    x = x + dropout(attention(norm(x)))
    x = x + dropout(mlp(norm(x)))

Each addition is left to the norm that follows it, so that back ends can fuse the two: a block takes and gives a pair
(x, residual) whose sum are the hidden states.

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
from megallm.ops.norm import add_norm, norm


class Norm(nn.Module):
    """RMSNorm or LayerNorm by config."""

    def __init__(self, factory: ParameterFactory, name: str) -> None:
        super().__init__()
        config = factory.config
        self._eps, self._backends = config.norm_eps, factory.backends
        self.weight = factory.replicated(f"{name}.weight", (config.hidden_size,), init="ones")
        self.bias = None
        if config.norm == "layernorm":
            self.bias = factory.replicated(f"{name}.bias", (config.hidden_size,), init="zeros")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T', H] -> [T', H]."""
        return norm(x, self.weight, self.bias, self._eps, backends=self._backends)

    def after(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of residual + x, residual + x), each [T', H], one fused operation; None = 0."""
        if residual is None:
            return self(x), x
        return add_norm(x, residual, self.weight, self.bias, self._eps, backends=self._backends)


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
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        context: TokenContext,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        outputs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, residual) -> (x, residual), each [T', H]; the hidden states are residual + x (None = 0).

        outputs: int64 [n], the tokens behind attention, which sees all; the result is [n, H]. Without dropout and
        sequence parallelism.
        """
        y, residual = self.input_layernorm.after(x, residual)
        if outputs is not None:
            residual = residual.index_select(0, outputs)
        x = self._drop(self.self_attn(y, context, rotary, outputs), context, "attention_out")
        y, residual = self.post_attention_layernorm.after(x, residual)
        return self._drop(self.mlp(y, context), context, "mlp_out"), residual

    def whole(
        self,
        x: torch.Tensor,
        context: TokenContext,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        outputs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T', H] -> [T', H]: the last addition included, so that one tensor is kept where a layer is recomputed."""
        x, residual = self(x, None, context, rotary, outputs)
        return residual + x

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
