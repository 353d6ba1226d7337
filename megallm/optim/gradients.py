"""Gradients of one model in flat buckets: accumulated there, summed over ranks while backward still runs.

The life of a bucket in one step:
    1. every parameter's sink writes the first microbatch's gradient and adds the others (`GradSink`);
    2. when the last contribution of its last parameter has arrived, slices that tp ranks hold in common but
       computed in part are summed over tp (one small all-reduce), then the bucket's all-reduce over dp begins;
    3. `finish()` waits, and sums the tied embedding over the first and last pipeline stage.
Losses were divided by the global token count before backward, so sums are all there is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from megallm.model.transformer import Transformer
from megallm.optim.layout import Bucket, Entry, plan_buckets
from megallm.parallel.collectives import Pending, all_reduce_, start_all_reduce_
from megallm.parallel.grad_sink import GradSink, SinkLayer
from megallm.parallel.layout import ParamSpec, Piece, is_counted


@dataclass(frozen=True)
class _Replica:
    """A slice of the bucket to be summed over tp: its place in the coalesced buffer."""

    view: torch.Tensor
    start: int


class BucketBuffers:
    """One bucket's flat parameters and gradients."""

    def __init__(self, bucket: Bucket, parameters: dict[str, nn.Parameter], grad_dtype: torch.dtype) -> None:
        some = next(iter(parameters.values()))
        self.bucket = bucket
        self.params = torch.empty(bucket.numel, dtype=some.dtype, device=some.device)
        self.grads = torch.zeros(bucket.numel, dtype=grad_dtype, device=some.device)
        self.reduction: Pending | None = None
        for slot in bucket.slots:
            parameter = parameters[slot.name]
            view = self.params[slot.start : slot.start + slot.numel].view(parameter.shape)
            parameter.data = view.copy_(parameter.data)

    def grad(self, index: int, shape: torch.Size) -> torch.Tensor:
        """The gradient of the bucket's index-th parameter, a view."""
        slot = self.bucket.slots[index]
        return self.grads[slot.start : slot.start + slot.numel].view(shape)


class Gradients:
    """Owns the buckets; re-points the model's parameters into them."""

    def __init__(self, model: Transformer, *, bucket_size: int) -> None:
        self._mesh = model.mesh
        self._specs = model.specs
        grad_dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        entries = [
            Entry(name=n, numel=p.numel(), weight_decay=model.specs[n].weight_decay)
            for n, p in self._parameters.items()
        ]
        plan = plan_buckets(entries, bucket_size=bucket_size)
        self.buckets = [BucketBuffers(bucket, self._parameters, grad_dtype) for bucket in plan]
        self._sinks: dict[str, GradSink] = {}
        self._uses = _count_uses(model)
        self._unready: list[int] = [0] * len(plan)
        self._replicas: list[tuple[torch.Tensor, list[_Replica]]] = []
        self._tied: list[torch.Tensor] = []
        self._second_copies = {n for n in self._parameters if model.is_second_copy(n)}
        for index, buffers in enumerate(self.buckets):
            self._connect(index, buffers)
        self._attach(model)

    def start(self, num_microbatches: int) -> None:
        """Begins a step of so many microbatches."""
        for index, buffers in enumerate(self.buckets):
            self._unready[index] = len(buffers.bucket.slots)
            buffers.reduction = None
        for name, sink in self._sinks.items():
            sink.expect(num_microbatches * self._uses[name])

    def finish(self) -> None:
        """Gradients are complete sums on every rank when this returns. A collective."""
        for index, buffers in enumerate(self.buckets):
            if buffers.reduction is None:  # a parameter had no gradient at all in this step
                for slot in buffers.bucket.slots:
                    self._sinks[slot.name].close()
                self._reduce(index)
        for buffers in self.buckets:
            assert buffers.reduction is not None
            buffers.reduction.wait()
        for view in self._tied:
            all_reduce_(view, self._mesh.embedding)

    def named(self) -> dict[str, torch.Tensor]:
        """Every local parameter's gradient, views."""
        return {name: sink.buffer for name, sink in self._sinks.items()}

    def counted_slices(self) -> list[torch.Tensor]:
        """Flat views that together hold every global gradient element exactly once over (tp, pp)."""
        slices = []
        for buffers in self.buckets:
            for start, stop in _merge(self._counted_ranges(buffers)):
                slices.append(buffers.grads[start:stop])
        return slices

    def _connect(self, index: int, buffers: BucketBuffers) -> None:
        replicas: list[_Replica] = []
        total = 0
        for i, slot in enumerate(buffers.bucket.slots):
            parameter, spec = self._parameters[slot.name], self._specs[slot.name]
            view = buffers.grad(i, parameter.shape)
            self._sinks[slot.name] = GradSink(view, lambda index=index: self._ready(index))  # type: ignore[misc]
            for piece in spec.pieces:
                if self._mesh.tp.size > 1 and (spec.tp_partial or piece.replicas > 1):
                    part = piece.local(view)
                    replicas.append(_Replica(part, total + _place_among_owners(spec, piece, self._mesh.tp.rank)))
                    total += part.numel() * _num_owners(spec, piece, self._mesh.tp.size)
            if spec.tied:
                self._tied.append(view)
        self._replicas.append((buffers.grads.new_zeros(total), replicas))

    def _attach(self, model: Transformer) -> None:
        """Gives layers their sinks; parameters without a layer that feeds them get a hook."""
        fed = set()
        names = {p: n for n, p in self._parameters.items()}
        for module in model.modules():
            if isinstance(module, SinkLayer):
                for short, parameter in module.named_parameters(recurse=False):
                    if parameter in names:
                        module.grad_sinks[short] = self._sinks[names[parameter]]
                        fed.add(names[parameter])
        for name, parameter in self._parameters.items():
            if name not in fed:
                parameter.register_post_accumulate_grad_hook(_feeder(self._sinks[name]))

    def _ready(self, index: int) -> None:
        self._unready[index] -= 1
        if self._unready[index] == 0:
            self._reduce(index)

    def _reduce(self, index: int) -> None:
        buffer, replicas = self._replicas[index]
        if replicas:
            buffer.zero_()
            for r in replicas:
                buffer[r.start : r.start + r.view.numel()].copy_(r.view.reshape(-1))
            all_reduce_(buffer, self._mesh.tp)
            for r in replicas:
                r.view.copy_(buffer[r.start : r.start + r.view.numel()].view(r.view.shape))
        self.buckets[index].reduction = start_all_reduce_(self.buckets[index].grads, self._mesh.dp)

    def _counted_ranges(self, buffers: BucketBuffers) -> list[tuple[int, int]]:
        ranges = []
        for slot in buffers.bucket.slots:
            spec, shape = self._specs[slot.name], self._parameters[slot.name].shape
            row = slot.numel // shape[0]
            for piece in spec.pieces:
                if is_counted(spec, piece, tp=self._mesh.tp, is_second_copy=slot.name in self._second_copies):
                    if piece.dim != 0:  # the padding of other dimensions is zero and may be counted
                        ranges.append((slot.start, slot.start + slot.numel))
                    else:
                        start = slot.start + piece.offset * row
                        ranges.append((start, start + piece.length * row))
        return ranges


def _count_uses(model: Transformer) -> dict[str, int]:
    """How many contributions a parameter's gradient has per microbatch: 2 for an embedding that is also the head."""
    names = {p: n for n, p in model.named_parameters()}
    uses: dict[str, int] = dict.fromkeys(names.values(), 0)
    for module in model.modules():
        if isinstance(module, SinkLayer):
            for parameter in module.parameters(recurse=False):
                uses[names[parameter]] += 1
    return {name: max(count, 1) for name, count in uses.items()}


def _num_owners(spec: ParamSpec, piece: Piece, tp_size: int) -> int:
    """How many different slices the tp ranks hold together."""
    return 1 if spec.tp_replicated else tp_size // piece.replicas


def _place_among_owners(spec: ParamSpec, piece: Piece, tp_rank: int) -> int:
    """Elements before this rank's slice in the coalesced buffer of all slices."""
    if spec.tp_replicated:
        return 0
    numel = 1
    for extent in piece.local_shape:
        numel *= extent
    return tp_rank // piece.replicas * numel


def _feeder(sink: GradSink):  # type: ignore[no-untyped-def]
    def feed(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        sink.add(parameter.grad)
        parameter.grad = None

    return feed


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged
