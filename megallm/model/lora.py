"""Adapters of the model's linears: which parameters they are, and what is frozen beside them.

    qkv_proj [ q | k | v ]      one linear           lora_A    [ A of q ; A of k ; A of v ]
                                                     lora_B_q_proj, lora_B_k_proj, lora_B_v_proj

Under their global names (`model.layers.0.self_attn.q_proj.lora_A.weight`) adapters are those of single projections, as
peft has them. Pieces of the weights say where each lies, so that tp, key/value heads that several ranks hold, and fused
layouts need no rule of their own.

Letters: T tokens, T' = T or T/tp under sequence parallelism, r rank, in/out features.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from megallm.config.lora import LoraConfig, lora_targets
from megallm.model.context import TokenContext
from megallm.model.parameters import ParameterFactory
from megallm.parallel.layout import ParamSpec, Piece, whole
from megallm.parallel.linear import ColumnLinear, RowLinear
from megallm.parallel.lora import LowRank, Up

Linear = ColumnLinear | RowLinear


class Adapter(nn.Module):
    """The adapters of one linear, with the dropout on their input."""

    def __init__(self, factory: ParameterFactory, linear: Linear, lora: LoraConfig, pieces: tuple[Piece, ...]) -> None:
        """pieces: of the linear's weight, those with adapters."""
        super().__init__()
        first = pieces[0]
        self._linear = (linear,)  # not a module of this one
        self._is_row = first.dim == 1
        self._place = first.name.removesuffix(".weight")
        self._drop, self._switch = lora.lora_dropout, factory.adapters
        self._num_features, self._first_feature = first.shape[1], first.start if self._is_row else 0
        self._first_part = factory.mesh.tp.rank if factory.sequence_parallel and not self._is_row else 0
        self.low_rank = LowRank(
            _down(factory, linear, lora, pieces),
            [_up(factory, lora, piece) for piece in pieces],
            scale=lora.scale,
            tp=factory.mesh.tp,
            sequence_parallel=factory.sequence_parallel,
            is_row=self._is_row,
        )

    @property
    def weight(self) -> nn.Parameter:
        """The weight they stand beside."""
        return self._linear[0].weight

    def forward(self, y: torch.Tensor, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """y, which is used up, + s B A dropout(x), for the linear's output y of x."""
        if not self._switch.is_on:
            return y
        if context.dropout is not None and self._drop > 0.0:
            x = context.dropout.hidden(
                x, self._drop, layer="lora", place=self._place, first_token=self._first_part * x.size(0),
                seq_length=context.seq_length, first_feature=self._first_feature, num_features=self._num_features,
            )  # fmt: skip
        return self.low_rank(y, x)


def make_adapter(factory: ParameterFactory, linear: Linear) -> Adapter | None:
    """The adapters of a linear that the factory made the weight of; None where it is to have none."""
    lora = factory.lora
    if lora is None:
        return None
    targets = lora_targets(lora, factory.config)
    pieces = tuple(p for p in factory.specs[linear.weight].pieces if _projection(p) in targets)
    return Adapter(factory, linear, lora, pieces) if pieces else None


def project(linear: Linear, adapter: Adapter | None, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
    """The linear's output of x, with what its adapters add."""
    y = linear(x)
    return y if adapter is None else adapter(y, x, context)


def _down(factory: ParameterFactory, linear: Linear, lora: LoraConfig, pieces: tuple[Piece, ...]) -> nn.Parameter:
    rank, columns = lora.lora_rank, linear.weight.size(1)
    shape = (rank, pieces[0].shape[1])
    std = 1.0 / math.sqrt(3.0 * shape[1])  # U(-1/sqrt(in), 1/sqrt(in)): kaiming_uniform with a = sqrt(5)
    names = [_adapter_name(piece, "lora_A") for piece in pieces]
    if pieces[0].dim == 1:
        piece = replace(pieces[0], name=names[0], shape=shape)
        return factory.make((rank, columns), ParamSpec(pieces=(piece,), init="uniform", std=std, is_adapter=True))
    spec = ParamSpec(
        pieces=tuple(replace(whole(name, shape), offset=i * rank) for i, name in enumerate(names)),
        init="uniform",
        std=std,
        tp_replicated=True,
        tp_partial=factory.sequence_parallel,
        is_adapter=True,
    )
    return factory.make((len(pieces) * rank, columns), spec)


def _up(factory: ParameterFactory, lora: LoraConfig, piece: Piece) -> Up:
    rank, projection, name = lora.lora_rank, _projection(piece), _adapter_name(piece, "lora_B")
    shape = (piece.shape[0], rank)
    if piece.dim == 1:
        spec = ParamSpec(
            pieces=(whole(name, shape),), init="zeros", tp_replicated=True, tp_partial=factory.sequence_parallel,
            is_adapter=True,
        )  # fmt: skip
        return Up(name=projection, weight=factory.make(shape, spec), start=0)
    own = replace(piece, name=name, shape=shape, offset=0)
    spec = ParamSpec(pieces=(own,), init="zeros", is_adapter=True)
    return Up(name=projection, weight=factory.make((piece.length, rank), spec), start=piece.offset)


def _projection(piece: Piece) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    return piece.name.split(".")[-2]


def _adapter_name(piece: Piece, factor: str) -> str:
    return f"{piece.name.removesuffix('.weight')}.{factor}.weight"
