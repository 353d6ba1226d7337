"""The one place where collectives are called: plain forms, and autograd pairs ("X in forward, Y in backward").

Every function is the identity on an axis of size 1; nothing above this file handles that case. Letters: n elements.
Sequence and token dimensions are dim 0 everywhere, so gathers and scatters need no copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megallm.parallel.mesh import Axis

# torch 2.13 renamed these two; 2.11 has only the old names.
_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Pending:
    """A tensor that is complete after `wait()`."""

    def __init__(self, tensor: torch.Tensor, work: Any | None, *keep: torch.Tensor) -> None:
        self._tensor, self._work, self._keep = tensor, work, keep

    def wait(self) -> torch.Tensor:
        """The completed tensor; on GPUs the current stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
            self._work, self._keep = None, ()
        return self._tensor


class _Summed(Pending):
    """A reduce-scatter over gloo: every rank sends each other one its part, and adds what it receives to its own."""

    def __init__(self, x: torch.Tensor, axis: Axis, *, in_place: bool) -> None:
        parts = x.chunk(axis.size)
        own = parts[axis.rank]
        arriving = [torch.empty_like(own) for _ in _others(axis)]
        self._addends = [own, *arriving] if in_place else [*arriving, own]
        self._arriving, self._leaving = _exchange(parts, arriving, axis)
        super().__init__(self._addends[0], None, x)

    def wait(self) -> torch.Tensor:
        if self._addends:
            for each in self._arriving:
                each.wait()
            total, *others = self._addends
            for other in others:
                total.add_(other)
            for each in self._leaving:
                each.wait()
            self._addends, self._arriving, self._leaving = [], [], []
        return super().wait()


class _Gathered(Pending):
    """An all-gather over gloo: every rank sends its part to each other one."""

    def __init__(self, out: torch.Tensor, x: torch.Tensor, axis: Axis) -> None:
        parts = out.chunk(axis.size)
        own = parts[axis.rank]
        if own.data_ptr() != x.data_ptr():
            own.copy_(x)
        others = [parts[place] for place in _others(axis)]
        self._works = [work for works in _exchange([x] * axis.size, others, axis) for work in works]
        super().__init__(out, None, x)

    def wait(self) -> torch.Tensor:
        for each in self._works:
            each.wait()
        self._works = []
        return super().wait()


def _exchange(
    parts: Sequence[torch.Tensor], arriving: Iterable[torch.Tensor], axis: Axis
) -> tuple[list[Any], list[Any]]:
    """Begins to send parts[place] to every other place and to receive from `_others`; (receives, sends) to wait for.

    gloo's own reduce-scatter and all-gather copy more and take turns where this is one exchange: of 5 million fp32
    elements on 2 ranks 41 and 16 ms against 9 and 8 (EPYC, loopback). Its all-to-all copies each rank's own part, too.
    """
    others = _others(axis)
    receives = [
        dist.irecv(part, axis.ranks[place], group=axis.group) for place, part in zip(others, arriving, strict=True)
    ]
    sends = [dist.isend(parts[place], axis.ranks[place], group=axis.group) for place in reversed(others)]
    return receives, sends


def _others(axis: Axis) -> list[int]:
    """The other places, beginning behind this rank's own: at any time all ranks receive from different ones."""
    return [(axis.rank + step) % axis.size for step in range(1, axis.size)]


# -- plain forms -------------------------------------------------------------------------------------------------------


def all_reduce_(x: torch.Tensor, axis: Axis, *, op: str = "sum") -> torch.Tensor:
    """x reduced over the axis, in place. 2 n (size-1)/size elements a rank."""
    return start_all_reduce_(x, axis, op=op).wait()


def start_all_reduce_(x: torch.Tensor, axis: Axis, *, op: str = "sum") -> Pending:
    """Begins an in-place all-reduce of a contiguous tensor."""
    if axis.size == 1:
        return Pending(x, None)
    axis.recorder.add(axis.name, "all_reduce", x.numel(), x.element_size(), axis.size)
    return Pending(x, dist.all_reduce(x, op=_OPS[op], group=axis.group, async_op=True))


def all_gather(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The shards [n, ...] of all ranks as one [size * n, ...]. n_total (size-1)/size elements a rank."""
    return start_all_gather(x, axis).wait()


def start_all_gather(x: torch.Tensor, axis: Axis) -> Pending:
    """Begins an all-gather along dim 0."""
    if axis.size == 1:
        return Pending(x, None)
    x = x.contiguous()
    out = x.new_empty((axis.size * x.size(0), *x.shape[1:]))
    return start_all_gather_into(out, x, axis)


def reduce_scatter(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's part [n / size, ...] of the sum of all x [n, ...]. n (size-1)/size elements a rank."""
    return start_reduce_scatter(x, axis).wait()


def start_reduce_scatter(x: torch.Tensor, axis: Axis) -> Pending:
    """Begins a reduce-scatter along dim 0."""
    if axis.size == 1:
        return Pending(x, None)
    x = x.contiguous()
    axis.recorder.add(axis.name, "reduce_scatter", x.numel(), x.element_size(), axis.size)
    if not x.is_cuda:
        return _Summed(x, axis, in_place=False)
    out = x.new_empty((x.size(0) // axis.size, *x.shape[1:]))
    return Pending(out, _scatter_single(out, x, group=axis.group, async_op=True), x)


def start_reduce_scatter_(x: torch.Tensor, axis: Axis) -> Pending:
    """Begins a reduce-scatter in place: this rank's part of x [n] becomes its sum over ranks; the rest is undefined.

    The pending tensor is that part, a view of x.
    """
    own = own_part(x, axis)
    if axis.size == 1:
        return Pending(own, None)
    axis.recorder.add(axis.name, "reduce_scatter", x.numel(), x.element_size(), axis.size)
    if not x.is_cuda:
        return _Summed(x, axis, in_place=True)
    return Pending(own, _scatter_single(own, x, group=axis.group, async_op=True), x)


def start_all_gather_into(out: torch.Tensor, x: torch.Tensor, axis: Axis) -> Pending:
    """Begins an all-gather of x [n] into out [size * n]; x may be this rank's part of out."""
    if axis.size == 1:
        if out.data_ptr() != x.data_ptr():
            out.copy_(x)
        return Pending(out, None)
    axis.recorder.add(axis.name, "all_gather", out.numel(), x.element_size(), axis.size)
    if not x.is_cuda:
        return _Gathered(out, x, axis)
    return Pending(out, _gather_single(out, x, group=axis.group, async_op=True), x)


def all_to_all(x: torch.Tensor, axis: Axis, *, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
    """What each rank has for this one, one after another: x [n] is what this one has for each, `send` elements of it.

    `receive`: how many come from each. n less what it has for itself a rank.
    """
    if axis.size == 1:
        return x
    out = x.new_empty(sum(receive))
    axis.recorder.add(axis.name, "all_to_all", x.numel() - send[axis.rank], x.element_size(), axis.size)
    dist.all_to_all_single(out, x, list(receive), list(send), group=axis.group)
    return out


def broadcast_(x: torch.Tensor, axis: Axis, *, src: int) -> torch.Tensor:
    """x of the axis's place `src`, in place on every rank."""
    if axis.size > 1:
        axis.recorder.add(axis.name, "broadcast", x.numel(), x.element_size(), axis.size)
        dist.broadcast(x, src=axis.ranks[src], group=axis.group)
    return x


def broadcast_text(text: str, axis: Axis, device: torch.device, *, src: int) -> str:
    """The text of the axis's place `src` on every rank."""
    if axis.size == 1:
        return text
    data = torch.tensor(list(text.encode()), dtype=torch.int64, device=device)
    length = broadcast_(torch.tensor([data.numel()], device=device), axis, src=src)
    if axis.rank != src:
        data = torch.zeros(int(length), dtype=torch.int64, device=device)
    return bytes(broadcast_(data, axis, src=src).tolist()).decode()


def barrier(axis: Axis, device: torch.device) -> None:
    """Returns when every rank of the axis has called it."""
    all_reduce_(torch.zeros(1, device=device), axis)


def own_part(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's equal part of x along dim 0; moves nothing."""
    return x if axis.size == 1 else x.chunk(axis.size, dim=0)[axis.rank]


# -- autograd pairs ----------------------------------------------------------------------------------------------------


def copy_to(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Identity in forward, all-reduce in backward: a replicated input enters a sharded region."""
    return x if axis.size == 1 else _Pair.apply(x, axis, _identity, all_reduce_)


def reduce_from(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """All-reduce in forward, identity in backward: partial results leave a sharded region."""
    return x if axis.size == 1 else _Pair.apply(x, axis, _reduced_copy, _identity)


def gather_sequence(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """All-gather along dim 0 in forward, reduce-scatter in backward."""
    return x if axis.size == 1 else _Pair.apply(x, axis, all_gather, reduce_scatter)


def scatter_sequence_sum(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Reduce-scatter along dim 0 in forward, all-gather in backward."""
    return x if axis.size == 1 else _Pair.apply(x, axis, reduce_scatter, all_gather)


def split_sequence(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Own part along dim 0 in forward (x is equal on all ranks), all-gather in backward."""
    return x if axis.size == 1 else _Pair.apply(x, axis, own_part, all_gather)


def join_sequence(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """All-gather along dim 0 in forward, own part in backward (what follows is equal on all ranks)."""
    return x if axis.size == 1 else _Pair.apply(x, axis, all_gather, own_part)


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, forward: Callable, backward: Callable) -> torch.Tensor:  # type: ignore[type-arg,override]
        ctx.axis, ctx.how = axis, backward
        return forward(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        if ctx.how is all_reduce_:
            grad = grad.clone(memory_format=torch.contiguous_format)
        return ctx.how(grad, ctx.axis), None, None, None


def _identity(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    return x.view_as(x)


def _reduced_copy(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    return all_reduce_(x.clone(memory_format=torch.contiguous_format), axis)
