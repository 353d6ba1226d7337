"""Weights in 4 bits in checkpoints: their codes and scales as they are, so that a run resumes with the same numbers.

    X.weight.nf4              [out, in / 2] uint8
    X.weight.absmax           [out, in / 64], or [blocks] where blocks run over the ends of rows: uint8, or fp32 without
                              double quantisation
    X.weight.nested_absmax    [blocks / 256] fp32 and
    X.weight.nested_offset    [1] fp32: with double quantisation

Quantising what they stand for would not give them back: the mean of rounded scales is another one. Whoever wants dense
weights reads X.weight as if it were there.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from megallm.checkpoint.slices import SliceFiles, TensorSlice
from megallm.model.transformer import Transformer
from megallm.ops.nf4 import BLOCK, SCALE_BLOCK, BlockRange, Scales, dequantize
from megallm.parallel.layout import is_counted
from megallm.parallel.nf4 import Nf4Piece

_CODES, _ABSMAX, _NESTED, _OFFSET = ".nf4", ".absmax", ".nested_absmax", ".nested_offset"


def code_slices(model: Transformer) -> list[TensorSlice]:
    """What this rank holds in 4 bits, views of live memory."""
    found = []
    for name, held in model.quantized.items():
        spec, mesh = model.specs[name], model.mesh
        for each in held.pieces:
            is_owner = mesh.dp.rank == 0 and is_counted(spec, each.piece, tp=mesh.tp, is_second_copy=False)
            found += _slices_of(each, is_owner=is_owner, is_first=is_owner and mesh.tp.rank == 0)
    return found


class CodedFiles(SliceFiles):
    """Slices of dense weights, whether they are stored so or in 4 bits."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        stored = self.stored_shapes
        self._coded = {
            name.removesuffix(_CODES): (shape[0], 2 * shape[1]) for name, shape in stored.items() if _is_code(name)
        }
        parts = {f"{name}{part}" for name in self._coded for part in (_CODES, _ABSMAX, _NESTED, _OFFSET)}
        self.shapes = {name: shape for name, shape in stored.items() if name not in parts} | self._coded
        self._dense = next((name for name in self.shapes if name not in self._coded), "")

    def holds(self, slices: list[TensorSlice]) -> bool:
        """Whether these codes and scales are there as they are wanted."""
        return all(
            s.name in self.stored_shapes and (_is_nested(s.name) or self.dtype_of(s.name) == s.data.dtype)
            for s in slices
        )

    def fill(self, wanted: TensorSlice) -> None:
        """See SliceFiles; what is in 4 bits is made dense in fp32 and rounded once."""
        if wanted.name not in self._coded:
            super().fill(wanted)
            return
        shape = self._coded[wanted.name]
        self.check_shape(wanted, shape)
        (row, column), (rows, columns) = wanted.start, wanted.data.shape
        dense = self._rows(wanted.name, row, rows)
        wanted.data.copy_(dense[:, column : column + columns])

    def dtype_of(self, name: str) -> torch.dtype:
        """See SliceFiles; of a weight in 4 bits that of the model's other weights."""
        return super().dtype_of(self._dense if name in self._coded else name)

    def _rows(self, name: str, first: int, rows: int) -> torch.Tensor:
        """[rows, in] fp32, for which no more blocks are read than it takes."""
        columns = self._coded[name][1]
        start, stop = first * columns, (first + rows) * columns
        blocks = range(start // BLOCK, -(-stop // BLOCK))
        codes = self._part(f"{name}{_CODES}", (first, 0), (rows, columns // 2), torch.uint8).view(-1)
        scales = self._scales(name, columns, blocks)
        # Blocks that begin before the first row, or end after the last, are filled up with zeros' codes.
        before, after = (start - blocks.start * BLOCK) // 2, (blocks.stop * BLOCK - stop) // 2
        padded = torch.cat([codes.new_zeros(before), codes, codes.new_zeros(after)])
        held = BlockRange(first=blocks.start, num_rows=1, per_row=len(blocks), stride=len(blocks))
        dense = dequantize(padded, scales, held, out=torch.empty(2 * padded.numel()))
        return dense[2 * before : 2 * before + stop - start].view(rows, columns)

    def _scales(self, name: str, columns: int, blocks: range) -> Scales:
        stored = f"{name}{_ABSMAX}"
        shape, dtype = self.stored_shapes[stored], self.dtype_of(stored)
        if len(shape) == 2:
            per_row = columns // BLOCK
            values = self._part(stored, (blocks.start // per_row, 0), (len(blocks) // per_row, per_row), dtype).view(-1)
        else:
            values = self._part(stored, (blocks.start,), (len(blocks),), dtype)
        if f"{name}{_NESTED}" not in self.stored_shapes:
            return Scales(values)
        nested = self._part(f"{name}{_NESTED}", (0,), self.stored_shapes[f"{name}{_NESTED}"], torch.float32)
        return Scales(values, nested, self._part(f"{name}{_OFFSET}", (0,), (1,), torch.float32)[0])

    def _part(self, name: str, start: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype)
        self.fill_stored(
            TensorSlice(name=name, shape=self.stored_shapes[name], start=start, data=out, is_owner=False)
        )
        return out


def _slices_of(each: Nf4Piece, *, is_owner: bool, is_first: bool) -> list[TensorSlice]:
    """is_first: whether this rank writes what all ranks hold."""
    piece, blocks = each.piece, each.blocks
    (out_features, in_features), (row, column) = piece.shape, piece.local_start
    num_blocks = math.ceil(out_features * in_features / BLOCK)
    name = piece.name

    def slice_of(part: str, shape: tuple[int, ...], start: tuple[int, ...], data: torch.Tensor) -> TensorSlice:
        owns = is_owner if part in (_CODES, _ABSMAX) else is_first
        return TensorSlice(name=f"{name}{part}", shape=shape, start=start, data=data, is_owner=owns)

    found = [slice_of(_CODES, (out_features, in_features // 2), (row, column // 2), each.codes)]
    if in_features % BLOCK == 0:
        table = each.scales.values.view(each.codes.size(0), -1)
        found.append(slice_of(_ABSMAX, (out_features, in_features // BLOCK), (row, column // BLOCK), table))
    else:
        found.append(slice_of(_ABSMAX, (num_blocks,), (blocks.first,), each.scales.values))
    if each.scales.nested is not None and each.scales.offset is not None:
        num_nested = math.ceil(num_blocks / SCALE_BLOCK)
        found.append(slice_of(_NESTED, (num_nested,), (0,), each.scales.nested))
        found.append(slice_of(_OFFSET, (1,), (0,), each.scales.offset.view(1)))
    return found


def _is_code(name: str) -> bool:
    return name.endswith(_CODES)


def _is_nested(name: str) -> bool:
    return name.endswith((_NESTED, _OFFSET))
