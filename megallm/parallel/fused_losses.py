"""Losses over a vocabulary cut over tp, on the fused kernels: from logits, or from the lm head's input, in chunks.

    FusedLogprobs         logits [T, V'] -> log p(label) [T]; backward overwrites the logits
    HeadLossSum           hidden [T, H] -> sum of -log p(label): gradients are made in forward, chunk by chunk
    HeadLogprobs          hidden [T, H] -> log p(label) [T]: backward makes each chunk's logits once more

The last two never hold the logits of all tokens. The kernels know no ranks: the two reductions over tp are handed in.

Letters: T tokens, H hidden, V' vocabulary columns of this rank (with padding).
"""

from __future__ import annotations

from typing import Any

import torch

from megallm.parallel.collectives import all_reduce_
from megallm.parallel.grad_sink import GradSink
from megallm.parallel.plain_losses import Columns


class FusedLogprobs(torch.autograd.Function):
    """log p(label) [T] fp32 of logits [T, V'] (used up) and labels [T]; 0 where the label is -100."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, columns: Columns) -> torch.Tensor:  # type: ignore[override]
        from megallm_kernels.cross_entropy import losses, rescale_, statistics

        top, sums = statistics(logits, labels, first_column=columns.first, valid_columns=columns.valid)
        if columns.tp.size > 1:
            row_max, top = top, all_reduce_(top.clone(), columns.tp, op="max")
            sums = all_reduce_(rescale_(sums, row_max, top), columns.tp)
        loss, lse, _ = losses(top, sums, labels, vocab_size=columns.vocab_size)
        ctx.save_for_backward(logits, labels, lse)
        ctx.columns = columns
        return loss.neg_()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        from megallm_kernels.cross_entropy import gradient_

        logits, labels, lse = ctx.saved_tensors
        c = ctx.columns
        gradient_(
            logits, labels, lse, grad.neg(), vocab_size=c.vocab_size, first_column=c.first, valid_columns=c.valid
        )  # fmt: skip
        return logits, None, None


class HeadLossSum(torch.autograd.Function):
    """Sum of -log p(label), 0-d fp32, of hidden [T, H], weight [V', H], labels [T]; gradients are made in forward.

    `scale` (0-d, or None = 1): the gradient that backward will be given. Gradients are made for it; another one is
    right as well, at the price of one more rounding. The hidden gradient is this rank's part of a sum over tp.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        scale: torch.Tensor | None,
        columns: Columns,
        sink: GradSink | None,
    ) -> torch.Tensor:
        from megallm_kernels.linear_cross_entropy import losses_and_gradients, token_losses

        if scale is None:
            scale = torch.ones((), device=hidden.device)
        else:
            scale = torch.where(scale == 0, 1.0, scale.float())  # backward divides by it
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        head = _head(columns)
        if not needs_hidden and not needs_weight:
            return token_losses(hidden, weight, labels, head)[0].sum()
        dweight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
        loss, _, dhidden = losses_and_gradients(
            hidden, weight, labels, scale.expand(len(labels)), head, needs_dhidden=needs_hidden, dweight=dweight
        )
        ctx.save_for_backward(dhidden, dweight, scale)
        ctx.sink, ctx.weight_dtype = sink, weight.dtype
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        from megallm_kernels.linear_cross_entropy import scale_

        dhidden, dweight, scale = ctx.saved_tensors
        ratio = grad.float() / scale
        for made in (dhidden, dweight):
            if made is not None:
                scale_(made, ratio)
        return dhidden, _deliver(dweight, ctx.sink, ctx.weight_dtype), None, None, None, None


class HeadLogprobs(torch.autograd.Function):
    """log p(label) [T] fp32 of hidden [T, H], weight [V', H], labels [T]; 0 where the label is -100."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        columns: Columns,
        sink: GradSink | None,
    ) -> torch.Tensor:
        from megallm_kernels.linear_cross_entropy import token_losses

        loss, lse, _ = token_losses(hidden, weight, labels, _head(columns))
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.columns, ctx.sink = columns, sink
        return loss.neg_()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        from megallm_kernels.linear_cross_entropy import gradients

        hidden, weight, labels, lse = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dweight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
        dhidden = gradients(
            hidden, weight, labels, lse, grad.neg(), _head(ctx.columns), needs_dhidden=needs_hidden, dweight=dweight
        )
        return dhidden, _deliver(dweight, ctx.sink, weight.dtype), None, None, None


def _head(columns: Columns) -> Any:
    from megallm_kernels.linear_cross_entropy import Head

    tp = columns.tp
    return Head(
        vocab_size=columns.vocab_size,
        first_column=columns.first,
        valid_columns=columns.valid,
        reduce_max=(lambda x: all_reduce_(x, tp, op="max")) if tp.size > 1 else None,
        reduce_sum=(lambda x: all_reduce_(x, tp)) if tp.size > 1 else None,
    )


def _deliver(dweight: torch.Tensor | None, sink: GradSink | None, dtype: torch.dtype) -> torch.Tensor | None:
    if dweight is None or sink is None:
        return None if dweight is None else dweight.to(dtype)
    sink.add(dweight)
    return None
