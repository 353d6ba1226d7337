"""How parameters lie in flat buckets, and who holds which part of one: a plan, as data.

    bucket 0 (last layers: ready first)            bucket 1            ...
    [ decayed matrices | norms, biases | pad ]     [ ...... | .. | ]
      slot slot slot     slot slot
    [ shard of rank 0 | rank 1 | .... | N-1 ]      every bucket is cut in N equal shards, wherever slots end

Buckets follow the reverse of the forward order, so that the first is complete while backward still runs. Inside a
bucket the weight-decayed parameters come first: the optimizer then sees two flat tensors a bucket, not hundreds. No
bucket spans two pipeline stages of a rank, and a tied embedding has one of its own: it is cut alike on both its ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_SHARD_MULTIPLE = 8
"""Elements; 16 bytes of a 2-byte dtype, so that every shard begins aligned."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A parameter to be placed."""

    name: str
    numel: int
    weight_decay: bool
    unit: str = ""
    """What it is needed together with: a layer, the embedding, the head."""
    stage: int = 0
    """Its stage of the pipeline."""
    is_alone: bool = False
    """Whether it has a bucket of its own."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where one parameter lies in its bucket."""

    name: str
    start: int
    numel: int

    @property
    def stop(self) -> int:
        """First element after it."""
        return self.start + self.numel


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """One flat buffer."""

    slots: tuple[Slot, ...]
    numel: int
    """With padding at the end, to a multiple of the shards."""
    decay_numel: int
    """Elements [0, decay_numel) are weight-decayed."""
    units: tuple[str, ...] = ()
    """Units with a parameter in it."""

    def shard(self, rank: int, num_shards: int) -> tuple[int, int]:
        """[start, stop) of one of `num_shards` equal parts."""
        size = self.numel // num_shards
        return rank * size, (rank + 1) * size


def plan_buckets(
    entries: Sequence[Entry], *, bucket_size: int, num_shards: int = 1, by_unit: bool = False
) -> tuple[Bucket, ...]:
    """Buckets of at least `bucket_size` elements (where a stage allows), or one for each unit, from forward order."""
    groups: list[list[Entry]] = []
    for entry in reversed(entries):
        if not groups or _is_full(groups[-1], entry, bucket_size=bucket_size, by_unit=by_unit):
            groups.append([])
        groups[-1].append(entry)
    return tuple(_bucket(group, num_shards) for group in groups)


def _is_full(group: list[Entry], entry: Entry, *, bucket_size: int, by_unit: bool) -> bool:
    last = group[-1]
    if last.stage != entry.stage or last.is_alone or entry.is_alone:
        return True
    return last.unit != entry.unit if by_unit else sum(e.numel for e in group) >= bucket_size


def _bucket(entries: list[Entry], num_shards: int) -> Bucket:
    slots, start, decay_numel = [], 0, 0
    for entry in sorted(entries, key=lambda e: not e.weight_decay):
        slots.append(Slot(name=entry.name, start=start, numel=entry.numel))
        start += entry.numel
        decay_numel += entry.numel if entry.weight_decay else 0
    multiple = num_shards * _SHARD_MULTIPLE if num_shards > 1 else 1
    units = tuple(dict.fromkeys(entry.unit for entry in entries))
    return Bucket(
        slots=tuple(slots), numel=math.ceil(start / multiple) * multiple, decay_numel=decay_numel, units=units
    )


def overlap(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """The common part of two ranges; of length 0 if there is none."""
    start = max(a[0], b[0])
    return start, max(start, min(a[1], b[1]))


@dataclass(frozen=True)
class Box:
    """A rectangle of a tensor's elements that lie one after another in memory."""

    first: int
    """Flat index of its first element."""
    start: tuple[int, ...]
    shape: tuple[int, ...]


def boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The flat range [start, stop) of a contiguous tensor as the fewest boxes, in order: at most 2 n - 1 in n dims."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [Box(start, (start,), (stop - start,))]
    row = math.prod(shape[1:])
    found = []
    first, last = math.ceil(start / row), stop // row
    if first > last or (start // row == (stop - 1) // row and stop - start < row):  # inside one row
        at = start // row
        return [_in_row(at, box, row) for box in boxes(shape[1:], start - at * row, stop - at * row)]
    found += [_in_row(first - 1, box, row) for box in boxes(shape[1:], start - (first - 1) * row, row)]
    if last > first:
        found.append(Box(first * row, (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])))
    found += [_in_row(last, box, row) for box in boxes(shape[1:], 0, stop - last * row)]
    return found


def _in_row(row: int, box: Box, row_numel: int) -> Box:
    return Box(row * row_numel + box.first, (row, *box.start), (1, *box.shape))
