"""Which buckets are in memory whole, and when: the layers' order decides, so all ranks agree by construction.

    zero 1, 2   every bucket stays; after an update its shards are gathered in the order of use, behind the next
                forward, and a unit waits for its own buckets only
    zero 3      a unit's bucket is gathered just before the unit computes, in forward and again in backward, while the
                unit before it computes; it is freed when the next unit is entered

At stage 3 there are in memory: the unit that computes, the next one, and the head from its forward to its backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megallm.model.presence import Presence
from megallm.optim.flat import FlatBucket, FlatParameters


class Residency(Presence):
    """Gathers the buckets of a model's units for one rank."""

    def __init__(self, flat: FlatParameters, *, keep: bool = False) -> None:
        """keep: at stage 3, whole parameters stay from their first use until the update (memory for traffic)."""
        self._flat, self._buckets, self._keep = flat, flat.buckets, keep
        self._zero = flat.zero
        index = {slot.name: i for i, each in enumerate(flat.buckets) for slot in each.bucket.slots}
        self._needs = {unit: tuple(dict.fromkeys(index[n] for n in names)) for unit, names in flat.units.items()}
        self._order = [unit for unit in flat.units if self._needs[unit]]
        self._heads: Counter[str] = Counter()
        """Forwards of heads whose backward has not come: a head computes when the loss asks for it."""
        for stage in flat.model.stages.values():
            stage.presence = self  # type: ignore[assignment]

    def enter(self, unit: str) -> None:
        """The unit's buckets are there; the next one's are on their way."""
        if self._zero == 3:
            if unit.endswith(".head") and torch.is_grad_enabled():
                self._heads[unit] += 1
            self._bring(unit, step=1)
        for i in self._needs[unit]:
            self._buckets[i].wait()

    def leave(
        self, unit: str, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Marks x, so that its gradient brings the unit's buckets back."""
        if self._zero < 3 or self._keep or not x.requires_grad:
            return x, residual
        return _Mark.apply(x, residual, self, unit)

    def enter_backward(self, unit: str) -> None:
        """The unit's buckets are there again; those of the one before it are on their way."""
        behind = self._neighbour(unit, 1)
        if behind is not None and behind.endswith(".head"):
            self._heads[behind] -= 1
        self._bring(unit, step=-1)
        for i in self._needs[unit]:
            self._buckets[i].wait()

    def start_update(self) -> None:
        """Lets go of what the update makes stale."""
        self._heads.clear()
        for flat in self._buckets:
            flat.release()

    def updated(self, flat: FlatBucket) -> None:
        """The bucket's shard has new values: what stays in memory is gathered."""
        if self._zero in (1, 2):
            flat.start_gather()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Every parameter is present inside, whatever the ranks do there. A collective."""
        self._flat.gather()
        keep, self._keep = self._keep, True
        try:
            yield
        finally:
            self._keep = keep
            for flat in self._buckets:
                flat.release()

    def _bring(self, unit: str, *, step: int) -> None:
        ahead = self._neighbour(unit, step)
        wanted = [*self._needs[unit], *(self._needs[ahead] if ahead is not None else ())]
        if not self._keep:
            kept = {i for each, count in self._heads.items() if count for i in self._needs[each]} | set(wanted)
            for i, flat in enumerate(self._buckets):
                if i not in kept and flat.is_present:
                    flat.release()
        for i in wanted:
            if not self._buckets[i].is_present:
                self._buckets[i].start_gather()

    def _neighbour(self, unit: str, step: int) -> str | None:
        """The next unit of the same stage; backward skips the embedding, whose gradient needs no weights."""
        at = self._order.index(unit) + step
        if not 0 <= at < len(self._order):
            return None
        found = self._order[at]
        if found.split(".")[0] != unit.split(".")[0] or (step < 0 and found.endswith(".embed")):
            return None
        return found


class _Mark(torch.autograd.Function):
    """The identity; its backward comes before that of the unit that made x."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, residency: Residency, unit: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.residency, ctx.unit = residency, unit
        return x.view_as(x), None if residual is None else residual.view_as(residual)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor, dresidual: torch.Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        ctx.residency.enter_backward(ctx.unit)
        return dx, dresidual, None, None
