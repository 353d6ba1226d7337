"""A frozen weight in 4 bits (NF4) in place of its dense numbers, cut over tp as the weight is.

    quantise   every rank its own blocks; scales, a 64th of the weights, are brought together over tp, so that codes and
               doubly quantised scales are those of each whole Hugging Face matrix (q_proj, k_proj, ...) on any layout
    compute    y = x W^T and dx = dy W with W made dense for that product alone

The parameter keeps its shape and has no memory, but while it is being filled. Cuts must lie between blocks of 64
(config/check_lora.py).

Letters: in/out features of a whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from megallm.ops.backends import Backends
from megallm.ops.nf4 import BLOCK, SCALE_BLOCK, BlockRange, Scales, dequantize, quantize, quantize_scales
from megallm.parallel.collectives import all_reduce_
from megallm.parallel.grad_sink import GradSink
from megallm.parallel.layout import ParamSpec, Piece
from megallm.parallel.mesh import Axis
from megallm.parallel.products import OutputGradient, Products


@dataclass(frozen=True, kw_only=True)
class Nf4Piece:
    """What a rank holds of one matrix."""

    piece: Piece
    """Where the dense numbers belong."""
    blocks: BlockRange
    codes: torch.Tensor
    """[rows, columns / 2] uint8 of the slice."""
    scales: Scales
    """Of the slice's blocks; nested ones and the offset of the whole matrix."""

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""
        return [self.codes, *(each for each in self.scales if each is not None)]


class Nf4Weight:
    """The weight of one linear: q, k and v are three matrices, each quantised by itself."""

    def __init__(
        self, parameter: nn.Parameter, spec: ParamSpec, *, tp: Axis, double_quant: bool, backends: Backends
    ) -> None:
        """Zeros in 4 bits; the parameter's memory is let go."""
        self.parameter = parameter
        self._tp, self._double, self._backends = tp, double_quant, backends
        self.pieces = tuple(
            _empty(piece, double_quant, parameter.device) for piece in spec.pieces if piece.length > 0
        )
        self._has_padding = sum(p.piece.length for p in self.pieces) < parameter.size(spec.pieces[0].dim)
        self.release()

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds in place of the weight."""
        return [tensor for piece in self.pieces for tensor in piece.tensors()]

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as this rank holds it, in memory of its own."""
        shape, device = self.parameter.shape, self.parameter.device
        make = torch.zeros if self._has_padding else torch.empty
        weight = make(shape, dtype=dtype, device=device)
        for each in self.pieces:
            dequantize(
                each.codes.view(-1), each.scales, each.blocks, out=each.piece.local(weight), backends=self._backends
            )
        return weight

    def refill(self) -> Iterator[None]:
        """Once: the parameter is zeros, to be given new numbers until the next turn. A collective over tp."""
        self._allocate()
        self.parameter.data.zero_()
        yield
        self.quantize_()

    @torch.no_grad()
    def quantize_(self) -> None:
        """Takes the parameter's numbers, and lets its memory go. A collective over tp: 4 bytes for 64 weights."""
        for each in self.pieces:
            piece, blocks = each.piece, each.blocks
            packed = quantize(piece.local(self.parameter.data))
            each.codes.view(-1).copy_(packed.codes)
            if not self._double:
                each.scales.values.copy_(packed.absmax)
                continue
            table = packed.absmax.new_zeros(-(-piece.shape[0] * piece.shape[1] // BLOCK))
            if self._tp.rank % piece.replicas == 0:
                blocks.of(table).copy_(packed.absmax.view(blocks.num_rows, blocks.per_row))
            whole = quantize_scales(all_reduce_(table, self._tp))
            own = Scales(blocks.of(whole.values).reshape(-1), whole.nested, whole.offset)
            for kept, new in zip(each.scales, own, strict=True):
                assert kept is not None and new is not None
                kept.copy_(new)
        self.release()

    @torch.no_grad()
    def restore_(self, weight: torch.Tensor) -> None:
        """The parameter is dense again, with these numbers."""
        self._allocate()
        self.parameter.data.copy_(weight)

    def release(self) -> None:
        """Lets the parameter's memory go."""
        self.parameter.data.untyped_storage().resize_(0)

    def _allocate(self) -> None:
        data = self.parameter.data
        data.untyped_storage().resize_(data.numel() * data.element_size())


class Nf4Products(Products):
    """The products of a linear whose weight is in 4 bits; there is none for the weight's gradient."""

    def __init__(self, weight: Nf4Weight) -> None:
        self._weight = weight

    def output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b [T, out] in x's dtype."""
        return F.linear(x, self._weight.dense(x.dtype), bias)

    def input_gradient(self, gradient: OutputGradient, weight: torch.Tensor) -> torch.Tensor:
        """dy W [T, in]."""
        return gradient.dy @ self._weight.dense(gradient.dy.dtype)

    def weight_gradient(self, gradient: OutputGradient, x: torch.Tensor, sink: GradSink | None) -> torch.Tensor | None:
        """Never asked for: the weight is frozen."""
        raise AssertionError("a weight in 4 bits does not train")


def _empty(piece: Piece, double_quant: bool, device: torch.device) -> Nf4Piece:
    rows, columns = piece.local_shape
    blocks = block_range(piece)
    if double_quant:
        num_nested = -(-piece.shape[0] * piece.shape[1] // (BLOCK * SCALE_BLOCK))
        scales = Scales(
            torch.zeros(blocks.num_blocks, dtype=torch.uint8, device=device),
            torch.zeros(num_nested, device=device),
            torch.zeros((), device=device),
        )
    else:
        scales = Scales(torch.zeros(blocks.num_blocks, device=device))
    codes = torch.zeros(rows, columns // 2, dtype=torch.uint8, device=device)
    return Nf4Piece(piece=piece, blocks=blocks, codes=codes, scales=scales)


def block_range(piece: Piece) -> BlockRange:
    """The blocks of a slice [out, in] cut between blocks."""
    (out_features, in_features), (rows, columns) = piece.shape, piece.local_shape
    assert in_features % 2 == 0
    if columns == in_features:
        first, is_last = piece.start * in_features, piece.start + rows == out_features
        assert first % BLOCK == 0 and (is_last or rows * columns % BLOCK == 0)
        per_row = -(-rows * columns // BLOCK)
        return BlockRange(first=first // BLOCK, num_rows=1, per_row=per_row, stride=per_row)
    assert in_features % BLOCK == columns % BLOCK == piece.start % BLOCK == 0
    return BlockRange(
        first=piece.start // BLOCK, num_rows=rows, per_row=columns // BLOCK, stride=in_features // BLOCK
    )
