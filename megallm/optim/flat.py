"""A model's parameters in flat buckets, whole or as this rank's shard of each.

Every parameter becomes a view of its bucket. Where parameters are sharded (ZeRO stage 3), a bucket's memory exists only
while a layer that needs it computes: the storage is freed and allocated again under the same views, so that neither
modules nor autograd notice. The shard is kept apart then; else it is a part of the bucket itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from megallm.model.transformer import Transformer
from megallm.optim.layout import Bucket, Entry, Slot, overlap, plan_buckets
from megallm.parallel.collectives import Pending, start_all_gather_into
from megallm.parallel.mesh import Axis


class FlatBucket:
    """One bucket's parameters on this rank."""

    def __init__(
        self, bucket: Bucket, parameters: dict[str, nn.Parameter], axis: Axis, *, is_sharded: bool, num_shards: int
    ) -> None:
        """axis: the ranks that hold the shards. is_sharded: whether the whole is there at times only."""
        some = parameters[bucket.slots[0].name]
        self.bucket, self.is_sharded, self._axis = bucket, is_sharded, axis
        self.range = bucket.shard(axis.rank if num_shards > 1 else 0, num_shards)
        """[start, stop) of this rank's shard in the bucket."""
        self.params = torch.zeros(bucket.numel, dtype=some.dtype, device=some.device)
        """The whole bucket; without memory while it is not present."""
        for slot in bucket.slots:
            parameter = parameters[slot.name]
            view = self.params[slot.start : slot.stop].view(parameter.shape)
            parameter.data = view.copy_(parameter.data) if parameter.data.untyped_storage().size() else view
        own = self.params[self.range[0] : self.range[1]]
        self.shard = own.clone() if is_sharded else own
        """What this rank keeps, in the model's dtype."""
        self._pending: Pending | None = None
        self._is_present = True
        self.release()

    @property
    def is_present(self) -> bool:
        """Whether the whole bucket is in memory, or on its way."""
        return self._is_present or self._pending is not None

    @property
    def decay_numel(self) -> int:
        """Elements of the shard that are weight-decayed: its first ones."""
        start, stop = overlap(self.range, (0, self.bucket.decay_numel))
        return stop - start

    def start_gather(self) -> None:
        """Begins to make the whole bucket of all ranks' shards. A collective over the shards' ranks."""
        if self.is_sharded:
            self._allocate()
        self._pending = start_all_gather_into(self.params, self.shard, self._axis)
        self._is_present = False

    def wait(self) -> None:
        """Returns when the whole is there (on a GPU: when the current stream will find it there)."""
        if self._pending is not None:
            self._pending.wait()
            self._pending, self._is_present = None, True

    def release(self) -> None:
        """Lets the whole go, where only the shard is kept."""
        self.wait()
        if self.is_sharded:
            self.params.untyped_storage().resize_(0)
            self._is_present = False

    def refill(self) -> Iterator[set[str]]:
        """Once: the names of the parameters, whose memory is there to be given new values until the next turn."""
        self.wait()
        if self.is_sharded:
            self._allocate()
            self.params.zero_()  # padded rows stay zero
        yield {slot.name for slot in self.bucket.slots}
        if self.is_sharded:
            self.shard.copy_(self.params[self.range[0] : self.range[1]])
        self._is_present = True
        self.release()

    def _allocate(self) -> None:
        self.params.untyped_storage().resize_(self.params.numel() * self.params.element_size())

    def parts(self) -> list[tuple[Slot, int, int, int]]:
        """(slot, start and stop in the slot's parameter, start in the shard) of what the shard holds."""
        found = []
        for slot in self.bucket.slots:
            start, stop = overlap((slot.start, slot.stop), self.range)
            if start < stop:
                found.append((slot, start - slot.start, stop - slot.start, start - self.range[0]))
        return found


class FlatParameters:
    """All buckets of a model, in the reverse of the order of use."""

    def __init__(self, model: Transformer, *, bucket_size: int, zero: int) -> None:
        """zero: the ZeRO stage; buckets are cut in shards from 1 on, and freed between uses at 3."""
        axis = model.mesh.shard
        self.model = model
        self.zero = zero if axis.size > 1 else min(zero, 1)
        """The stage; of one rank's shards, which are wholes, 1 at most."""
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        names = {p: name for name, p in self.parameters.items()}
        self.units = {
            unit: [names[p] for p in needed if p in names]
            for stage in model.stages.values()
            for unit, needed in stage.units().items()  # type: ignore[operator]
        }
        """Names of the parameters that each unit needs, units in the order of use."""
        num_shards = axis.size if zero > 0 else 1
        plan = plan_buckets(self._entries(), bucket_size=bucket_size, num_shards=num_shards, by_unit=self.zero == 3)
        self.buckets = [
            FlatBucket(bucket, self.parameters, axis, is_sharded=self.zero == 3, num_shards=num_shards)
            for bucket in plan
        ]

    def _entries(self) -> list[Entry]:
        found: dict[str, Entry] = {}
        for unit, names in self.units.items():
            for name in names:
                spec = self.model.specs[name]
                found[name] = Entry(
                    name=name,
                    numel=self.parameters[name].numel(),
                    weight_decay=spec.weight_decay,
                    unit=unit,
                    stage=int(unit.split(".")[0]),
                    is_alone=spec.tied or name in found,
                )
        return list(found.values())

    def refill(self) -> Iterator[set[str]]:
        """One bucket after another: the names of parameters to be given new values before the next turn.

        Every rank fills what it holds whole, alike on all data-parallel ranks; each keeps its shard. No collective.
        """
        for flat in self.buckets:
            yield from flat.refill()

    def settle(self) -> None:
        """Waits for what is on its way."""
        for flat in self.buckets:
            flat.wait()

    def gather(self) -> None:
        """Makes every parameter present. A collective."""
        for flat in self.buckets:
            if not flat.is_present:
                flat.start_gather()
        for flat in self.buckets:
            flat.wait()
