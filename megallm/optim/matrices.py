"""The layers' matrices on their way to their owners, and results on the way back.

A rank holds parts of matrices: a matrix is cut over tp, along its rows or columns, and such a slice over the ranks that
share shards, wherever shards end. Whoever needs whole matrices needs each once: every matrix has one owner among those
ranks, and owners have about equal work.

    collect     over the shards: every place sends its parts to the owner's place, which has whole slices then;
                over tp: these go to the owner, which puts them together
    give back   over tp, then over the shards: the owner's result, cut as the matrix was

Elements that a rank sends, N places over the shards and t over tp, n elements of its slices of all matrices:

    over the shards     what it holds of matrices that other places own, and what others hold of those that its own
                        place owns: 2 n/N (N-1)/N on average
    over tp             of the matrices that its place over the shards owns: its slices of those of other tp ranks, and
                        their slices of its own: 2 n/N (t-1)/t on average

Without ZeRO every data-parallel rank holds whole slices: N is 1, nothing goes over the shards, and all do the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megallm.optim.flat import FlatParameters
from megallm.optim.layout import overlap
from megallm.parallel.collectives import all_to_all
from megallm.parallel.layout import Piece
from megallm.parallel.mesh import Axis


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A global matrix of a layer, and where this rank's slice of it is stored."""

    piece: Piece
    parameter: str
    """The local parameter's name."""
    stored_shape: tuple[int, int]
    """Of the slice, with the padding of a matrix that is cut along its columns."""
    first: int
    """The slice's first element in the flat parameter."""
    held: tuple[int, ...]
    """Elements of the stored slice that each place over the shards has."""
    lengths: tuple[int, ...]
    """Of the slices of all tp ranks, along the dimension that is cut."""
    owner: tuple[int, int]
    """Place over the shards, tp rank."""

    @property
    def stop(self) -> int:
        """The first element after the slice in the flat parameter."""
        return self.first + math.prod(self.stored_shape)


def find_matrices(flat: FlatParameters, *, num_shards: int) -> list[Matrix]:
    """All matrices of the layers of this pipeline rank, in an order and with owners that its ranks agree on."""
    tp, found = flat.model.mesh.tp, []
    in_layers = {name for unit, names in flat.units.items() if unit.split(".")[1].isdigit() for name in names}
    for bucket in (each.bucket for each in flat.buckets):
        shards = [bucket.shard(rank, num_shards) for rank in range(num_shards)]
        for slot in (each for each in bucket.slots if each.name in in_layers):
            rows, *others = flat.parameters[slot.name].shape
            for piece in flat.model.specs[slot.name].pieces:
                if len(piece.shape) != 2:
                    continue
                stored = (piece.length, others[0]) if piece.dim == 0 else (rows, others[0])
                first = piece.offset * others[0] if piece.dim == 0 else 0
                place = (slot.start + first, slot.start + first + math.prod(stored))
                held = [overlap(place, shard) for shard in shards]
                found.append(
                    Matrix(
                        piece=piece,
                        parameter=slot.name,
                        stored_shape=stored,
                        first=first,
                        held=tuple(stop - start for start, stop in held),
                        lengths=_lengths(piece, tp),
                        owner=(0, 0),
                    )
                )
    owners = shared_out([_work(each.piece.shape) for each in found], num_shards * tp.size)
    return [replace(each, owner=divmod(owner, tp.size)) for each, owner in zip(found, owners, strict=True)]


def shared_out(work: Sequence[int], num_owners: int) -> list[int]:
    """The owner of each piece of work: the largest first, each to who has least so far."""
    totals, owners = [0] * num_owners, [0] * len(work)
    for i in sorted(range(len(work)), key=lambda i: -work[i]):
        owners[i] = totals.index(min(totals))
        totals[owners[i]] += work[i]
    return owners


def _work(shape: tuple[int, ...]) -> int:
    """In proportion to the FLOPs of `orthogonalize`."""
    short, long = sorted(shape)
    return short * short * (2 * long + short)


def _lengths(piece: Piece, tp: Axis) -> tuple[int, ...]:
    """What each tp rank holds of the dimension that is cut: the last ones less, if it does not divide."""
    total, num_slices = piece.shape[piece.dim], tp.size // piece.replicas
    size = math.ceil(total / num_slices)
    lengths = tuple(max(0, min(size, total - rank // piece.replicas * size)) for rank in range(tp.size))
    assert lengths[tp.rank] == piece.length, f"{piece.name} is cut in another way"
    return lengths


class MatrixExchange:
    """Makes whole matrices of the ranks' parts at their owners, and parts of the owners' results."""

    def __init__(self, matrices: Sequence[Matrix], *, shard: Axis, tp: Axis, empty: torch.Tensor) -> None:
        """shard: the ranks over which slices are cut. empty: [0], of the dtype and on the device of what is sent."""
        self._empty = empty
        self._slices = _OwnerExchange(shard, [m.owner[0] for m in matrices], [m.held for m in matrices], empty)
        self._here = [m for m in matrices if m.owner[0] == shard.rank]
        sizes = [[length * m.piece.shape[1 - m.piece.dim] for length in m.lengths] for m in self._here]
        self._wholes = _OwnerExchange(tp, [m.owner[1] for m in self._here], sizes, empty)
        self.owned = [m for m in self._here if m.owner[1] == tp.rank]
        """The matrices of which this rank gets wholes."""

    def collect(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Whole matrices [rows, cols], those of `owned`, from this rank's flat parts of all. A collective."""
        slices = []
        for m, segments in zip(self._here, self._slices.collect(parts), strict=True):
            stored = _joined(segments).view(m.stored_shape)
            slices.append(stored.narrow(m.piece.dim, 0, m.piece.length).reshape(-1))
        wholes = []
        for m, flat in zip(self.owned, self._wholes.collect(slices), strict=True):
            shapes = [_cut_shape(m.piece, length) for length in m.lengths]
            cut = [each.view(shape) for each, shape in zip(flat, shapes, strict=True)]
            wholes.append(_joined(cut[:: m.piece.replicas], dim=m.piece.dim))
        return wholes

    def give_back(self, results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """This rank's flat parts of the results [rows, cols] of all matrices; padding is 0. A collective."""
        cut = []
        for m, result in zip(self.owned, results, strict=True):
            slices = result.split(m.lengths[:: m.piece.replicas], dim=m.piece.dim)
            cut.append([each.reshape(-1) for each in slices for _ in range(m.piece.replicas)])
        segments = []
        for m, flat in zip(self._here, self._wholes.give_back(cut), strict=True):
            if flat.numel() != math.prod(m.stored_shape):
                padded = flat.new_zeros(m.stored_shape)
                padded.narrow(m.piece.dim, 0, m.piece.length).copy_(flat.view(_cut_shape(m.piece, m.piece.length)))
                flat = padded.view(-1)
            segments.append(list(flat.split(m.held)))
        return self._slices.give_back(segments)


class _OwnerExchange:
    """Items cut over the places of an axis: all parts to the item's owner, and back."""

    def __init__(
        self, axis: Axis, owners: Sequence[int], sizes: Sequence[Sequence[int]], empty: torch.Tensor
    ) -> None:
        """owners[i]: the place that owns item i. sizes[i][r]: elements of it that place r has."""
        places, items = range(axis.size), range(len(owners))
        owned = [i for i in items if owners[i] == axis.rank]
        self._axis, self._empty, self._num_owned = axis, empty, len(owned)
        self._order = sorted(items, key=lambda i: owners[i])
        self._out_sizes = [sizes[i][axis.rank] for i in self._order]
        self._in_sizes = [sizes[i][r] for r in places for i in owned]
        self._out = [sum(sizes[i][axis.rank] for i in items if owners[i] == r) for r in places]
        self._in = [sum(sizes[i][r] for i in owned) for r in places]

    def collect(self, parts: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """All places' parts, in their order, of each item owned here."""
        if self._axis.size == 1:
            return [[part] for part in parts]
        sent = torch.cat([self._empty, *(parts[i] for i in self._order)])
        got = all_to_all(sent, self._axis, send=self._out, receive=self._in).split(self._in_sizes)
        return [list(got[k :: self._num_owned]) for k in range(self._num_owned)]

    def give_back(self, results: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """This place's part of every item, from all places' parts of those owned here."""
        if self._axis.size == 1:
            return [parts[0] for parts in results]
        sent = torch.cat([self._empty, *(parts[r] for r in range(self._axis.size) for parts in results)])
        got = all_to_all(sent, self._axis, send=self._in, receive=self._out).split(self._out_sizes)
        return [part for _, part in sorted(zip(self._order, got, strict=True), key=lambda pair: pair[0])]


def _cut_shape(piece: Piece, length: int) -> tuple[int, int]:
    rows, cols = (length if d == piece.dim else n for d, n in enumerate(piece.shape))
    return rows, cols


def _joined(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=dim)
