"""Low-rank adapters beside the linear layers, y += s B A x (arXiv 2106.09685), cut over tp as the weights are.

    column   A [r, in] on every rank, B [out/tp, r]     u = s A x of own tokens, gathered [T, r] instead of x [T, in]
    row      A [r, in/tp], B [out, r] on every rank     u = s sum over tp of A x, scattered like the layer's output

What is sent are u and its gradient, r numbers a token: as the layer sends x or y, without sequence parallelism too. The
gradients of what every rank holds are of its own tokens under sequence parallelism, and whole without.

Adapters of projections that lie in one linear (q, k, v) share one A [sum of r, in], so that x is read once.

Letters: T tokens, T' = T or T/tp, r rank, in/out features of the whole layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megallm.parallel.collectives import copy_to, gather_sequence, reduce_from, scatter_sequence_sum
from megallm.parallel.grad_sink import GradSink, SinkLayer
from megallm.parallel.mesh import Axis


class Switch:
    """Whether a model's adapters count."""

    def __init__(self) -> None:
        self.is_on = True


@dataclass(frozen=True, kw_only=True)
class Up:
    """The second factor of one projection, and the columns of the linear's output it adds to."""

    name: str
    """The projection's."""
    weight: nn.Parameter
    """B [length, r]."""
    start: int
    """First column."""


class LowRank(SinkLayer):
    """Adds s B A x to the output y of a linear, in place. Sends T r elements as the linear does T in or T out."""

    def __init__(
        self, down: nn.Parameter, ups: Sequence[Up], *, scale: float, tp: Axis, sequence_parallel: bool, is_row: bool
    ) -> None:
        """down: the A of all `ups`, in their order, stacked. is_row: whether it belongs to a RowLinear."""
        super().__init__()
        self.lora_A = down  # [len(ups) r, in], or [r, in/tp]
        self._names = []
        for up in ups:
            name = f"lora_B_{up.name}"
            self.register_parameter(name, up.weight)
            self._names.append(name)
        self._slices = tuple((up.start, up.weight.size(0)) for up in ups)
        self._scale, self._tp, self._is_row = scale, tp, is_row
        self._sequence_parallel = sequence_parallel and tp.size > 1

    def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y, which is used up, + s B A x; y is the linear's output of x, but for dropout on x."""
        u = _Down.apply(x, self.lora_A, self._scale, self.grad_sinks.get("lora_A"))
        if self._is_row:
            u = (scatter_sequence_sum if self._sequence_parallel else reduce_from)(u, self._tp)
        else:
            u = (gather_sequence if self._sequence_parallel else copy_to)(u, self._tp)
        sinks = tuple(self.grad_sinks.get(name) for name in self._names)
        return _Up.apply(y, u, self._slices, sinks, *(getattr(self, name) for name in self._names))

    def ups(self) -> list[tuple[int, nn.Parameter]]:
        """(first row of the linear's weight, B) of every projection."""
        return [(start, getattr(self, name)) for (start, _), name in zip(self._slices, self._names, strict=True)]

    @torch.no_grad()
    def merge_(self, weight: torch.Tensor) -> None:
        """weight += s B A in place, for the linear's weight as this rank holds it: added in fp32, rounded once."""
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        for i, (start, up) in enumerate(self.ups()):
            rank, rows = up.size(1), weight[start : start + up.size(0)]
            down = self.lora_A[i * rank : (i + 1) * rank]
            rows.copy_(torch.addmm(rows.to(wide), up.to(wide), down.to(wide), alpha=self._scale))

    @torch.no_grad()
    def reset_(self) -> None:
        """Makes the adapters add nothing."""
        for _, up in self.ups():
            up.zero_()


class _Down(torch.autograd.Function):
    """u = s x A^T for x [T', in] and A [r, in]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: float, sink: GradSink | None) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.scale, ctx.sink = scale, sink
        return (x @ weight.t()).mul_(scale)

    @staticmethod
    def backward(ctx: Any, du: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        du = du * ctx.scale
        dw = _deliver(du, x, ctx.sink) if needs_weight else None
        return (du @ weight if needs_x else None), dw, None, None


class _Up(torch.autograd.Function):
    """y[:, columns of i] += u_i B_i^T, for u [T, n r] = the u_i of n projections and B_i [length of i, r]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        y: torch.Tensor,
        u: torch.Tensor,
        slices: tuple[tuple[int, int], ...],
        sinks: tuple[GradSink | None, ...],
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(u, *weights)
        ctx.slices, ctx.sinks = slices, sinks
        ctx.mark_dirty(y)
        for (start, length), part, weight in zip(slices, u.chunk(len(slices), dim=1), weights, strict=True):
            y[:, start : start + length].addmm_(part, weight.t())
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        u, *weights = ctx.saved_tensors
        du = torch.empty_like(u) if ctx.needs_input_grad[1] else None
        grads: list[torch.Tensor | None] = []
        for i, ((start, length), weight) in enumerate(zip(ctx.slices, weights, strict=True)):
            part = dy[:, start : start + length]
            own = slice(i * weight.size(1), (i + 1) * weight.size(1))
            needs_weight = ctx.needs_input_grad[4 + i]
            grads.append(_deliver(part, u[:, own], ctx.sinks[i]) if needs_weight else None)
            if du is not None:
                du[:, own] = part @ weight
        return (dy if ctx.needs_input_grad[0] else None), du, None, None, *grads


def _deliver(dy: torch.Tensor, x: torch.Tensor, sink: GradSink | None) -> torch.Tensor | None:
    """dy^T x, added to the sink; returned if there is none."""
    if sink is None:
        return dy.t() @ x
    sink.add_product(dy, x)
    return None
