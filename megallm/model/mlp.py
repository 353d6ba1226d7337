"""The MLP of one layer, its hidden features cut over tp.

Letters: T tokens, H hidden, F intermediate, t tp size.
"""

from __future__ import annotations

import torch
from torch import nn

from megallm.model.context import TokenContext
from megallm.model.lora import make_adapter, project
from megallm.model.parameters import ParameterFactory
from megallm.ops.activation import activation, gated
from megallm.parallel.linear import ColumnLinear, RowLinear


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))): [T', H] -> [T', H], T' = T or T/t."""

    def __init__(self, factory: ParameterFactory, *, layer: int, std_out: float) -> None:
        super().__init__()
        config, tp = factory.config, factory.mesh.tp
        self._act, self._gated, self._backends = config.hidden_act, config.gated_mlp, factory.backends
        prefix, hidden, inner = f"model.layers.{layer}.mlp", config.hidden_size, config.intermediate_size
        parts = ["gate_proj", "up_proj"] if config.gated_mlp else ["up_proj"]
        weight = factory.column([(f"{prefix}.{part}.weight", inner) for part in parts], hidden)
        self.gate_up_proj = ColumnLinear(
            weight,
            factory.column_bias([(f"{prefix}.{part}.bias", inner) for part in parts]) if config.mlp_bias else None,
            tp=tp,
            sequence_parallel=factory.sequence_parallel,
            products=factory.products(weight, layer=layer),
        )
        weight = factory.row(f"{prefix}.down_proj.weight", hidden, inner, std=std_out)
        self.down_proj = RowLinear(
            weight,
            factory.replicated(f"{prefix}.down_proj.bias", (hidden,), init="zeros") if config.mlp_bias else None,
            tp=tp,
            sequence_parallel=factory.sequence_parallel,
            products=factory.products(weight, layer=layer),
        )

        self.gate_up_adapter = make_adapter(factory, self.gate_up_proj)
        self.down_adapter = make_adapter(factory, self.down_proj)

    def forward(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """[T', H] -> [T', H]."""
        inner = project(self.gate_up_proj, self.gate_up_adapter, x, context)  # [T, 2F/t] = [gate | up], or [T, F/t]
        act = gated if self._gated else activation
        return project(self.down_proj, self.down_adapter, act(inner, self._act, backends=self._backends), context)
