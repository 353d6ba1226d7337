"""Tensor-parallel linear layers (arXiv 1909.08053, section 3; with sequence parallelism arXiv 2205.05198).

    column:  W [out, in] cut along out    X [T, in]    ->  Y [T, out/tp]     a sharded region begins
    row:     W [out, in] cut along in     Y [T, in/tp] ->  Z [T, out]        it ends: partial products are summed

With sequence parallelism X and Z are sharded along tokens, [T/tp, ...]: the column layer gathers, the row layer
reduce-scatters. In backward the input gradient's collective runs while the weight gradient's GEMM does.

Letters: T tokens, in/out features of the whole layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megallm.parallel.collectives import (
    Pending,
    all_gather,
    all_reduce_,
    copy_to,
    gather_sequence,
    reduce_scatter,
    start_all_gather,
    start_all_reduce_,
    start_reduce_scatter,
)
from megallm.parallel.grad_sink import GradSink, SinkLayer
from megallm.parallel.mesh import Axis
from megallm.parallel.products import PLAIN, OutputGradient, Products


class ColumnLinear(SinkLayer):
    """Y = X W^T + b with W cut along its output features.

    X is [T, in], or [T/tp, in] under sequence parallelism; Y is [T, out/tp]. Sends, a call and rank, T in (t-1)/t
    elements forward and as many backward (plus as many to gather X again) with sequence parallelism; without it
    nothing forward and 2 T in (t-1)/t backward.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        tp: Axis,
        sequence_parallel: bool,
        products: Products = PLAIN,
    ) -> None:
        super().__init__()
        self.weight = weight  # [out/tp, in]
        self.bias = bias  # [out/tp]
        self._tp, self._sequence_parallel = tp, sequence_parallel and tp.size > 1
        self.products = products

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] or [T/tp, in] -> [T, out/tp]."""
        if not torch.is_grad_enabled():
            x = all_gather(x, self._tp) if self._sequence_parallel else x
            return self.products.output(x, self.weight, self.bias)
        sinks = (self.grad_sinks.get("weight"), self.grad_sinks.get("bias"))
        return _Column.apply(x, self.weight, self.bias, self._tp, self._sequence_parallel, sinks, self.products)

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """The input as its GEMM sees it, [T, in]: for an operation that does the product itself.

        All-gather in forward, reduce-scatter in backward under sequence parallelism; else nothing, and all-reduce.
        """
        return gather_sequence(x, self._tp) if self._sequence_parallel else copy_to(x, self._tp)


class RowLinear(SinkLayer):
    """Z = sum over tp of Y W^T, + b, with W cut along its input features.

    Y is [T, in/tp]; Z is [T, out], or [T/tp, out] under sequence parallelism. Sends, a call and rank, 2 T out (t-1)/t
    elements forward and nothing backward; with sequence parallelism T out (t-1)/t each way.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        tp: Axis,
        sequence_parallel: bool,
        products: Products = PLAIN,
    ) -> None:
        super().__init__()
        self.weight = weight  # [out, in/tp]
        self.bias = bias  # [out], added once, after the sum
        self._tp, self._sequence_parallel = tp, sequence_parallel and tp.size > 1
        self.products = products

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """[T, in/tp] -> [T, out] or [T/tp, out]."""
        if not torch.is_grad_enabled():
            return _row_output(y, self.weight, self.bias, self._tp, self._sequence_parallel, self.products)
        sinks = (self.grad_sinks.get("weight"), self.grad_sinks.get("bias"))
        return _Row.apply(y, self.weight, self.bias, self._tp, self._sequence_parallel, sinks, self.products)


_Sinks = tuple[GradSink | None, GradSink | None]


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tp: Axis,
        sequence_parallel: bool,
        sinks: _Sinks,
        products: Products,
    ) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # a frozen weight has no use for x
        ctx.tp, ctx.sequence_parallel, ctx.sinks, ctx.has_bias = tp, sequence_parallel, sinks, bias is not None
        ctx.products = products
        return products.output(all_gather(x, tp) if sequence_parallel else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        gathering: Pending | None = None
        if needs_weight:
            gathering = start_all_gather(x, ctx.tp) if ctx.sequence_parallel else Pending(x, None)
        gradient, dx = ctx.products.ready(dy), None
        if needs_x:
            reduce = start_reduce_scatter if ctx.sequence_parallel else start_all_reduce_
            dx = reduce(ctx.products.input_gradient(gradient, weight), ctx.tp)
        dw, db = _weight_grads(ctx, gradient, gathering.wait()) if gathering is not None else (None, None)
        return (dx.wait() if dx is not None else None), dw, db, None, None, None, None


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        y: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tp: Axis,
        sequence_parallel: bool,
        sinks: _Sinks,
        products: Products,
    ) -> torch.Tensor:
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, weight)
        ctx.tp, ctx.sequence_parallel, ctx.sinks, ctx.has_bias = tp, sequence_parallel, sinks, bias is not None
        ctx.products = products
        return _row_output(y, weight, bias, tp, sequence_parallel, products)

    @staticmethod
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        y, weight = ctx.saved_tensors
        needs_y, needs_weight = ctx.needs_input_grad[:2]
        db: torch.Tensor | None = None
        if ctx.has_bias and needs_weight:  # from this rank's tokens: a partial sum under sequence parallelism
            db = _deliver(dz.sum(0), ctx.sinks[1])
        dz = all_gather(dz, ctx.tp) if ctx.sequence_parallel else dz
        gradient = ctx.products.ready(dz)
        dy = ctx.products.input_gradient(gradient, weight) if needs_y else None
        dw = ctx.products.weight_gradient(gradient, y, ctx.sinks[0]) if needs_weight else None
        return dy, dw, db, None, None, None, None


def _row_output(
    y: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tp: Axis,
    sequence_parallel: bool,
    products: Products,
) -> torch.Tensor:
    if tp.size == 1:
        return products.output(y, weight, bias)
    partial = products.output(y, weight)
    z = reduce_scatter(partial, tp) if sequence_parallel else all_reduce_(partial, tp)
    return z if bias is None else z.add_(bias)


def _weight_grads(
    ctx: Any, gradient: OutputGradient, x: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    db = _deliver(gradient.dy.sum(0), ctx.sinks[1]) if ctx.has_bias else None
    return ctx.products.weight_gradient(gradient, x, ctx.sinks[0]), db


def _deliver(grad: torch.Tensor, sink: GradSink | None) -> torch.Tensor | None:
    if sink is None:
        return grad
    sink.add(grad)
    return None
