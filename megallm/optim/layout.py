"""How parameters lie in flat buckets: a plan, as data.

    bucket 0 (last layers: ready first)         bucket 1            ...
    [ decayed matrices | norms, biases ]        [ ...... | .. ]
      slot slot slot     slot slot

Buckets follow the reverse of the forward order, so that the first is complete while backward still runs. Inside a
bucket the weight-decayed parameters come first: the optimizer then sees two flat tensors a bucket, not hundreds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A parameter to be placed."""

    name: str
    numel: int
    weight_decay: bool


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where one parameter lies in its bucket."""

    name: str
    start: int
    numel: int


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """One flat buffer."""

    slots: tuple[Slot, ...]
    numel: int
    decay_numel: int
    """Elements [0, decay_numel) are weight-decayed."""


def plan_buckets(entries: Sequence[Entry], *, bucket_size: int) -> tuple[Bucket, ...]:
    """Buckets of at least `bucket_size` elements (but the last), from entries in forward order."""
    groups: list[list[Entry]] = []
    filled = bucket_size
    for entry in reversed(entries):
        if filled >= bucket_size:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.numel
    return tuple(_bucket(group) for group in groups)


def _bucket(entries: list[Entry]) -> Bucket:
    slots, start, decay_numel = [], 0, 0
    for entry in sorted(entries, key=lambda e: not e.weight_decay):
        slots.append(Slot(name=entry.name, start=start, numel=entry.numel))
        start += entry.numel
        decay_numel += entry.numel if entry.weight_decay else 0
    return Bucket(slots=tuple(slots), numel=start, decay_numel=decay_numel)
