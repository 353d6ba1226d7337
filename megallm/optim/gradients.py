"""Gradients of one model in flat buckets: accumulated there, summed over ranks while backward still runs.

    zero   a bucket's gradients                  reduced, when its last contribution has arrived
    0      whole, all the time                   of the step: all-reduce over dp
    1      whole, all the time                   of the step: reduce-scatter, each rank has its shard's sum
    2, 3   shard; whole while a backward         of a microbatch: reduce-scatter, added to the shard;
           fills it                              then the whole is freed

With offload the shard is in the host's memory: sums are copied (or added) there as soon as they are complete, and
those of step 3 go up to the device and down again.

The life of a step:
    1. every parameter's sink writes the first contribution to its bucket and adds the others (`GradSink`);
    2. complete buckets are reduced as the table says, one or two at a time, behind backward;
    3. `finish()` waits, sums over the replicas of the shards, sums slices that tp ranks hold in common but computed
       in part (one small all-reduce), and the tied embedding over the first and last pipeline stage.
Losses were divided by the global token count before backward, so sums are all there is. Everything after the
reduction (norm, clipping, update) works on the shards.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from megallm.model.transformer import Transformer
from megallm.optim.clip import GradientSlice
from megallm.optim.flat import FlatBucket, FlatParameters
from megallm.optim.host import HostMemory
from megallm.optim.layout import overlap
from megallm.parallel.collectives import Pending, all_reduce_, start_all_reduce_, start_reduce_scatter_
from megallm.parallel.grad_sink import GradSink, SinkLayer
from megallm.parallel.layout import Piece, is_counted
from megallm.parallel.mesh import Axis, Mesh

_IN_FLIGHT = 2
"""Reductions under way at a time; each holds a whole bucket at stages 2 and 3."""


class GradBucket:
    """One bucket's gradients on this rank."""

    def __init__(
        self,
        flat: FlatBucket,
        shapes: list[torch.Size],
        mesh: Mesh,
        dtype: torch.dtype,
        *,
        zero: int,
        host: HostMemory | None,
    ) -> None:
        self.flat, self._mesh, self._zero = flat, mesh, zero
        numel, device = flat.bucket.numel, flat.params.device
        self._is_transient = zero >= 2
        self.whole = torch.zeros(numel, dtype=dtype, device=device)
        """What backward fills; at stages 2 and 3 without memory between a reduction and the next contribution."""
        own = self.whole[flat.range[0] : flat.range[1]]
        self._host = host
        self.shard = host.zeros(own.numel(), dtype) if host else torch.zeros_like(own) if zero >= 2 else own
        """The sums this rank's optimizer reads, once the step's reductions are done."""
        slots = zip(flat.bucket.slots, shapes, strict=True)
        self.own = own
        """The whole's part that is this rank's."""
        self.views = [self.whole[slot.start : slot.stop].view(shape) for slot, shape in slots]
        """The whole's parts in the parameters' shapes."""
        self._pending: Pending | None = None
        self._stored: Any = None
        self._has_sum = False
        if self._is_transient:
            self.whole.untyped_storage().resize_(0)

    def start(self) -> None:
        """Begins a step."""
        self._has_sum = False

    def allocate(self) -> None:
        """Gives the whole its memory, before the first contribution."""
        if self._pending is not None:
            self.settle()
        if self._is_transient and self.whole.untyped_storage().size() == 0:
            self.whole.untyped_storage().resize_(self.whole.numel() * self.whole.element_size())
            self.whole[self.flat.bucket.slots[-1].stop :].zero_()  # the padding is summed as well

    def reduce(self) -> None:
        """Begins the sum over the ranks that share the bucket."""
        begin = start_all_reduce_ if self._zero == 0 else start_reduce_scatter_
        self._pending = begin(self.whole, self._mesh.dp if self._zero == 0 else self._mesh.shard)
        if self._host is not None and self._host.is_apart:
            self._store(self._host)  # only the copies' stream waits for the sum

    def settle(self) -> None:
        """Ends the reduction under way, if there is one: the shard holds the sum so far."""
        if self._pending is None:
            return
        if self._host is not None:
            if not self._host.is_apart:
                self._store(self._host)
            self._host.wait(self._stored)  # before others get the whole's memory
        else:
            part = self._pending.wait()
            if self._is_transient:
                self.shard.add_(part) if self._has_sum else self.shard.copy_(part)
        self._pending = None
        if self._is_transient:
            self.whole.untyped_storage().resize_(0)
        self._has_sum = True

    def start_sum_over(self, axis: Axis) -> Pending:
        """Begins to add what the other ranks of an axis hold of this shard; ended, with offload. A collective."""
        if axis.size == 1 or self._host is None:
            return start_all_reduce_(self.shard, axis)
        moved = torch.empty_like(self.shard, device=self.whole.device)
        with self._host.lent([(moved, self.shard)]):
            all_reduce_(moved, axis)
        return Pending(self.shard, None)

    def _store(self, host: HostMemory) -> None:
        assert self._pending is not None
        with host.behind():
            self._pending.wait()
            host.store_(self.shard, self.own, add=self._has_sum)
            self._stored = host.mark()


class Gradients:
    """The gradients' buckets of one model's trained parameters, fed by its layers."""

    def __init__(self, flat: FlatParameters, *, dtype: torch.dtype | None = None) -> None:
        """dtype: of the sums; fp32 unless the model is fp64."""
        model, self._zero = flat.model, flat.zero
        self._flat, self._model, self._mesh = flat, model, model.mesh
        self._counted: list[GradientSlice] = []
        wide = torch.float64 if model.dtype == torch.float64 else torch.float32
        self.buckets = []
        for each in flat.trained:
            shapes = [flat.parameters[slot.name].shape for slot in each.bucket.slots]
            self.buckets.append(GradBucket(each, shapes, model.mesh, dtype or wide, zero=flat.zero, host=flat.host))
        self._sinks: dict[str, GradSink] = {}
        self._uses = _count_uses(model)
        self._unready: list[int] = [0] * len(self.buckets)
        self._rounds: list[int] = [0] * len(self.buckets)
        self._in_flight: deque[int] = deque()
        for index, bucket in enumerate(self.buckets):
            on_first = bucket.allocate if flat.zero >= 2 else None
            for slot, view in zip(bucket.flat.bucket.slots, bucket.views, strict=True):
                self._sinks[slot.name] = GradSink(view, lambda index=index: self._ready(index), on_first)  # type: ignore[misc]
        self._shared = _SharedSlices(flat, self.buckets)
        self._tied = [b for b in self.buckets if model.specs[b.flat.bucket.slots[0].name].tied]
        self._attach(model)

    @property
    def flat(self) -> FlatParameters:
        """What they are the gradients of."""
        return self._flat

    @property
    def host(self) -> HostMemory | None:
        """Where the shards are, unless they are on the device."""
        return self._flat.host

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold different shards of the sums."""
        return self._zero > 0

    def start(self, num_microbatches: int) -> None:
        """Begins a step of so many microbatches."""
        rounds = num_microbatches if self._zero >= 2 else 1
        for index, bucket in enumerate(self.buckets):
            bucket.start()
            self._rounds[index] = rounds
            self._arm(index, num_microbatches // rounds)

    def finish(self) -> None:
        """The shards hold complete sums when this returns. A collective."""
        for index, bucket in enumerate(self.buckets):
            if self._rounds[index]:  # a parameter had no gradient at all in some microbatch
                bucket.allocate()
                for slot in bucket.flat.bucket.slots:
                    self._sinks[slot.name].close()
                self._reduce(index)
                self._rounds[index] = 0
        while self._in_flight:
            self.buckets[self._in_flight.popleft()].settle()
        if self._flat.host is not None:
            self._flat.host.synchronize()
        if self._zero > 0:
            sums = [bucket.start_sum_over(self._mesh.replicate) for bucket in self.buckets]
            for each in sums:
                each.wait()
        self._shared.sum_over_tp()
        for bucket in self._tied:
            bucket.start_sum_over(self._mesh.embedding).wait()

    def named(self) -> dict[str, torch.Tensor]:
        """Every trained local parameter's gradient, views; complete at ZeRO stage 0 only."""
        return {name: sink.buffer for name, sink in self._sinks.items()}

    def counted(self) -> list[GradientSlice]:
        """Flat views that together hold every global gradient element exactly once over (tp, pp, shards)."""
        if not self._counted:
            for bucket in self.buckets:
                self._counted += self._slices(bucket)
        return self._counted

    def _attach(self, model: Transformer) -> None:
        """Gives layers their sinks; parameters without a layer that feeds them get a hook."""
        fed = set()
        names = {p: n for n, p in self._flat.parameters.items() if n in self._sinks}
        for module in model.modules():
            if isinstance(module, SinkLayer):
                for short, parameter in module.named_parameters(recurse=False):
                    if parameter in names:
                        module.grad_sinks[short] = self._sinks[names[parameter]]
                        fed.add(names[parameter])
        for name, parameter in self._flat.parameters.items():
            if name in self._sinks and name not in fed:
                parameter.register_post_accumulate_grad_hook(_feeder(self._sinks[name]))

    def _arm(self, index: int, num_microbatches: int) -> None:
        slots = self.buckets[index].flat.bucket.slots
        self._unready[index] = len(slots)
        for slot in slots:
            self._sinks[slot.name].expect(num_microbatches * self._uses[slot.name])

    def _ready(self, index: int) -> None:
        self._unready[index] -= 1
        if self._unready[index] == 0:
            self._reduce(index)
            self._rounds[index] -= 1
            if self._rounds[index]:
                self._arm(index, 1)

    def _reduce(self, index: int) -> None:
        self.buckets[index].reduce()
        self._in_flight.append(index)
        if len(self._in_flight) > _IN_FLIGHT:
            self.buckets[self._in_flight.popleft()].settle()

    def _slices(self, bucket: GradBucket) -> list[GradientSlice]:
        flat, slices = bucket.flat, []
        before = sum(len(b.flat.bucket.slots) for b in self.buckets[: self.buckets.index(bucket)])
        for place, slot in enumerate(flat.bucket.slots, start=before):
            spec, shape = self._model.specs[slot.name], self._flat.parameters[slot.name].shape
            for piece in spec.pieces:
                second = self._model.is_second_copy(slot.name)
                if is_counted(spec, piece, tp=self._mesh.tp, is_second_copy=second):
                    first, last = _flat_range(piece, shape)
                    start, stop = overlap((slot.start + first, slot.start + last), flat.range)
                    if start < stop:
                        view = bucket.shard[start - flat.range[0] : stop - flat.range[0]]
                        slices.append(GradientSlice(piece.name, place, view))
        return slices


class _SharedSlices:
    """Slices that several tp ranks hold but computed in part: summed in one coalesced buffer."""

    def __init__(self, flat: FlatParameters, buckets: list[GradBucket]) -> None:
        self._tp = flat.model.mesh.tp
        self._slices: list[tuple[torch.Tensor, int]] = []
        """(view of a shard, its place in the buffer)"""
        total = 0
        for bucket in buckets:
            for slot in bucket.flat.bucket.slots:
                spec, shape = flat.model.specs[slot.name], flat.parameters[slot.name].shape
                for piece in spec.pieces:
                    if self._tp.size == 1 or not (spec.tp_partial or piece.replicas > 1):
                        continue
                    first, last = _flat_range(piece, shape)
                    start, stop = overlap((slot.start + first, slot.start + last), bucket.flat.range)
                    view = bucket.shard[start - bucket.flat.range[0] : stop - bucket.flat.range[0]]
                    owner = 0 if spec.tp_replicated else self._tp.rank // piece.replicas
                    self._slices.append((view, total + owner * view.numel()))
                    total += view.numel() * (1 if spec.tp_replicated else self._tp.size // piece.replicas)
        self._host = flat.host
        self._buffer = buckets[0].whole.new_zeros(total) if total else None

    def sum_over_tp(self) -> None:
        """A collective over tp."""
        if self._buffer is None:
            return
        self._buffer.zero_()
        places = [(self._buffer[start : start + view.numel()], view) for view, start in self._slices]
        if self._host is not None:
            with self._host.lent(places):
                all_reduce_(self._buffer, self._tp)
            return
        for place, view in places:
            place.copy_(view)
        all_reduce_(self._buffer, self._tp)
        for place, view in places:
            view.copy_(place)


def _count_uses(model: Transformer) -> dict[str, int]:
    """How many contributions a parameter's gradient has per microbatch: 2 for an embedding that is also the head."""
    names = {p: n for n, p in model.named_parameters()}
    uses: dict[str, int] = dict.fromkeys(names.values(), 0)
    for module in model.modules():
        if isinstance(module, SinkLayer):
            for parameter in module.parameters(recurse=False):
                uses[names[parameter]] += 1
    return {name: max(count, 1) for name, count in uses.items()}


def _flat_range(piece: Piece, shape: torch.Size) -> tuple[int, int]:
    """[start, stop) of the piece in its flat local parameter."""
    row = shape.numel() // shape[0]
    if piece.dim != 0:  # the padding of other dimensions is zero and may be counted
        return 0, shape.numel()
    return piece.offset * row, (piece.offset + piece.length) * row


def _feeder(sink: GradSink):  # type: ignore[no-untyped-def]
    def feed(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        sink.add(parameter.grad)
        parameter.grad = None

    return feed

