"""A model's parameters in flat buckets, whole or as this rank's shard of each.

Every parameter becomes a view of its bucket. Where parameters are sharded (ZeRO stage 3), a bucket's memory exists only
while a layer that needs it computes: the storage is freed and allocated again under the same views, so that neither
modules nor autograd notice. The shard is kept apart then; else it is a part of the bucket itself.

Frozen parameters have buckets of their own, which are gathered likewise and have neither gradients nor an optimizer.
Weights in 4 bits lie in no bucket: every data-parallel rank holds them whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from megallm.config.parallel import Offload
from megallm.model.transformer import Transformer
from megallm.optim.host import HostMemory
from megallm.optim.layout import Bucket, Entry, Slot, overlap, plan_buckets
from megallm.parallel.collectives import Pending, start_all_gather_into
from megallm.parallel.mesh import Axis


class FlatBucket:
    """One bucket's parameters on this rank."""

    def __init__(
        self,
        bucket: Bucket,
        parameters: dict[str, nn.Parameter],
        axis: Axis,
        *,
        is_sharded: bool,
        num_shards: int,
        host: HostMemory | None = None,
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
        self.shard = own
        """What this rank keeps, in the model's dtype."""
        if is_sharded:
            is_hosted = host is not None and host.holds_params
            self.shard = host.zeros(own.numel(), own.dtype).copy_(own) if is_hosted else own.clone()  # type: ignore[union-attr]
        self._host = host
        self._mark: Any = None
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
        if self._host is None:
            self._pending = start_all_gather_into(self.params, self.shard, self._axis)
        else:
            self._start_gather_behind(self._host)
        self._is_present = False

    def _start_gather_behind(self, host: HostMemory) -> None:
        with host.behind():
            own = self.params[self.range[0] : self.range[1]]
            if host.holds_params:
                host.fetch_(own, self.shard)
            self._pending = start_all_gather_into(self.params, own if host.holds_params else self.shard, self._axis)
            self._mark = host.mark()

    def receive(self, values: torch.Tensor) -> None:
        """New values of the shard, from the host's memory: on their way to where the shard is."""
        assert self._host is not None
        if self._host.holds_params:
            if values is not self.shard:
                self.shard.copy_(values)
            return
        with self._host.behind():
            self._host.fetch_(self.shard, values)
            self._mark = self._host.mark()

    def wait(self) -> None:
        """Returns when the whole is there (on a GPU: when the current stream will find it there)."""
        if self._mark is not None:
            assert self._host is not None
            self._host.wait(self._mark)
            self._mark = None
        if self._pending is not None:
            self._pending.wait()
            self._pending, self._is_present = None, True

    def release(self) -> None:
        """Lets the whole go, where only the shard is kept."""
        self.wait()
        if self.is_sharded:
            self.params.untyped_storage().resize_(0)
            self._is_present = False

    def refill(self, *, anew: bool) -> Iterator[set[str]]:
        """Once: the names of the parameters, whose memory is there to be given new values until the next turn.

        anew: it holds zeros; else the present values, which takes a collective.
        """
        if anew and self.is_sharded:
            self.wait()
            self._allocate()
            self.params.zero_()  # padded rows stay zero
        elif not self.is_present:
            self.start_gather()
        self.wait()
        yield {slot.name for slot in self.bucket.slots}
        self._is_present = True
        self.keep()

    def keep(self) -> None:
        """Takes the whole's values, which are there and alike on all ranks, as the shards'."""
        if self.is_sharded:
            self.shard.copy_(self.params[self.range[0] : self.range[1]])
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

    def __init__(self, model: Transformer, *, bucket_size: int, zero: int, offload: Offload = "none") -> None:
        """zero: the ZeRO stage; buckets are cut in shards from 1 on, and freed between uses at 3."""
        axis = model.mesh.shard
        self.model = model
        most = 3 if axis.size > 1 else {"none": 1, "optimizer": 2, "optimizer+params": 3}[offload]
        self.zero = min(zero, most)
        """The stage: of one rank's shards, which are wholes, as far as it sends them to the host."""
        self.host: HostMemory | None = None
        """Where optimizer state and sums of gradients live, and perhaps parameters; None = on the device."""
        if offload != "none":
            holds_params = offload == "optimizer+params"
            self.host = HostMemory(model.mesh.device, model.mesh.recorder, holds_params=holds_params)
        self.parameters = {n: p for n, p in model.named_parameters() if n not in model.quantized}
        names = {p: name for name, p in self.parameters.items()}
        self.units = {
            unit: [names[p] for p in needed if p in names]
            for stage in model.stages.values()
            for unit, needed in stage.units().items()  # type: ignore[operator]
        }
        """Names of the parameters that each unit needs, units in the order of use."""
        num_shards = axis.size if zero > 0 else 1
        self.trained, self.frozen = (
            [
                FlatBucket(
                    bucket, self.parameters, axis, is_sharded=self.zero == 3, num_shards=num_shards, host=self.host
                )
                for bucket in plan_buckets(
                    entries, bucket_size=bucket_size, num_shards=num_shards, by_unit=self.zero == 3
                )
            ]
            for entries in self._entries()
        )
        self.buckets = [*self.trained, *self.frozen]

    def _entries(self) -> tuple[list[Entry], list[Entry]]:
        """What trains, what does not, each in the order of use."""
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
        trained = {name for name in found if self.parameters[name].requires_grad}
        return [e for n, e in found.items() if n in trained], [e for n, e in found.items() if n not in trained]

    def refill(self, *, anew: bool = False, frozen_only: bool = False) -> Iterator[set[str]]:
        """One bucket after another: the names of parameters to be given new values before the next turn.

        Every rank fills what it holds whole, alike on all data-parallel ranks; each keeps its shard.
        anew: the parameters are zeros before; else they are as they were, which takes collectives.
        """
        for flat in self.frozen if frozen_only else self.buckets:
            yield from flat.refill(anew=anew)

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


def refill(model: Transformer, flat: FlatParameters | None, *, anew: bool = False) -> Iterator[set[str]]:
    """One group after another: the names of parameters to be given new values before the next turn, all of the model.

    flat: the model's flat parameters, where it has some; anew: see there. Weights in 4 bits are zeros before, come one
    by one, and are quantised at the next turn, so that one of them at a time is dense. A collective.
    """
    own = {name for name, _ in model.named_parameters()} - set(model.quantized)
    if flat is not None:
        yield from flat.refill(anew=anew)
        own -= set(flat.parameters)
    if own:
        yield own
    for name, weight in model.quantized.items():
        for _ in weight.refill():
            yield {name}
