"""Losses over a vocabulary cut over tp, in plain torch: from logits, or from the lm head's input, in chunks of tokens.

    PlainLogprobs         logits [T, V'] -> log p(label) [T]
    PlainHeadLogprobs     hidden [T, H] -> log p(label) [T]: logits of a chunk at a time, made once more in backward

    log p(label) = logit[label] - logsumexp over V of logits

Each rank's local logsumexp and its part of the label's logit, 2 T numbers, are gathered; everything else is local.

Letters: T tokens, H hidden, V' vocabulary columns of this rank (with padding), t tp size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megallm.parallel.collectives import all_gather
from megallm.parallel.grad_sink import GradSink
from megallm.parallel.mesh import Axis

IGNORE_INDEX = -100
CHUNK_BYTES = 1 << 27
"""Logits made at a time: what more there is, is made in chunks."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where this rank's columns lie in the vocabulary."""

    vocab_size: int
    tp: Axis
    per_rank: int
    """V'."""

    @property
    def first(self) -> int:
        """Token id of the first column."""
        return self.tp.rank * self.per_rank

    @property
    def valid(self) -> int:
        """Columns that are no padding."""
        return min(max(self.vocab_size - self.first, 0), self.per_rank)


class PlainLogprobs(torch.autograd.Function):
    """log p(label) [T] fp32 (fp64 of fp64) of logits [T, V'] and labels [T]; 0 where the label is -100."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, columns: Columns) -> torch.Tensor:  # type: ignore[override]
        if columns.valid < columns.per_rank:
            logits = logits.clone()
        own = _own_columns(logits, labels, columns)
        logprobs, shift = _over_tp(own.norm, own.target, columns.tp)
        ignored = labels == IGNORE_INDEX
        ctx.save_for_backward(own.logprobs, shift, labels, ignored)
        ctx.dtype, ctx.columns = logits.dtype, columns
        return logprobs.masked_fill(ignored, 0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        logprobs, shift, labels, ignored = ctx.saved_tensors
        dlogits = _gradient_(logprobs, shift, labels, grad.masked_fill(ignored, 0), ctx.columns)
        return dlogits.to(ctx.dtype), None, None


class PlainHeadLogprobs(torch.autograd.Function):
    """log p(label) [T] of hidden [T, H], weight [V', H] and labels [T]; any finite number where the label is -100.

    In chunks of `rows` tokens; of a single chunk backward uses what forward left. The hidden gradient is this rank's
    part of a sum over tp.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        columns: Columns,
        sink: GradSink | None,
        rows: int,
    ) -> torch.Tensor:
        norms, targets, kept = [], [], None
        for h, y in zip(hidden.split(rows), labels.split(rows), strict=True):
            own = _own_columns(h @ weight.t(), y, columns)
            norms.append(own.norm)
            targets.append(own.target)
            kept = own.logprobs if len(h) == len(hidden) else None
        norm = torch.cat([each for each in norms if each is not None]) if columns.tp.size > 1 else None
        logprobs, shift = _over_tp(norm, torch.cat(targets), columns.tp)
        ctx.save_for_backward(hidden, weight, labels, shift)
        ctx.columns, ctx.sink, ctx.rows = columns, sink, rows
        ctx.kept = kept  # not saved like the others, so that backward can let it go
        return logprobs

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        hidden, weight, labels, shift = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dhidden = torch.empty_like(hidden) if needs_hidden else None

        def products() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for first in range(0, len(hidden), ctx.rows):
                part = slice(first, first + ctx.rows)
                h, y = hidden[part], labels[part]
                logprobs, ctx.kept = ctx.kept, None
                if logprobs is None:
                    logprobs = _own_columns(h @ weight.t(), y, ctx.columns).logprobs
                own_shift = None if shift is None else shift[part]
                dlogits = _gradient_(logprobs, own_shift, y, grad[part], ctx.columns).to(h.dtype)
                del logprobs
                if dhidden is not None:
                    torch.mm(dlogits, weight, out=dhidden[part])
                yield dlogits, h

        dweight: torch.Tensor | None = None
        if needs_weight and ctx.sink is not None:
            ctx.sink.add_products(products())
        else:
            dweight = torch.zeros_like(weight, dtype=grad.dtype) if needs_weight else None
            for dlogits, h in products():
                if dweight is not None:
                    dweight.addmm_(dlogits.t().to(grad.dtype), h.to(grad.dtype))
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None, None, None


class _Own(NamedTuple):
    """What a rank's own columns say."""

    logprobs: torch.Tensor
    """[T, V'], normalised over them."""
    norm: torch.Tensor | None
    """[T]: the logarithm of the sum of their exponentials; None with tp 1, which has no use for it."""
    target: torch.Tensor
    """[T]: with tp 1 log p(label); else the label's logit on the rank that has it, and 0."""


def _own_columns(logits: torch.Tensor, labels: torch.Tensor, columns: Columns) -> _Own:
    """Of logits [T, V'], whose padding is overwritten."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if columns.valid < columns.per_rank:
        logits[:, columns.valid :] = torch.finfo(logits.dtype).min
    logprobs = torch.log_softmax(logits, dim=-1, dtype=wide)
    column, mine = _places(labels, columns)
    target = logprobs.gather(-1, column).squeeze(-1)
    if columns.tp.size == 1:
        return _Own(logprobs, None, target)
    # from the largest logit: a very negative one would cancel it out, -inf make it NaN
    highest, place = logits.max(dim=-1, keepdim=True)
    norm = (highest.to(wide) - logprobs.gather(-1, place)).squeeze(-1)
    return _Own(logprobs, norm, (target + norm).masked_fill_(~mine, 0))


def _over_tp(norm: torch.Tensor | None, target: torch.Tensor, tp: Axis) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(log p(label) [T], what makes a rank's own log-probabilities those over V [T])."""
    if norm is None:
        return target, None
    norms, targets = all_gather(torch.stack([norm, target]), tp).view(tp.size, 2, -1).unbind(1)
    whole = torch.logsumexp(norms, dim=0)
    return targets.sum(0) - whole, norm - whole


def _gradient_(
    logprobs: torch.Tensor, shift: torch.Tensor | None, labels: torch.Tensor, grad: torch.Tensor, columns: Columns
) -> torch.Tensor:
    """Of the logits [T, V'], in the place of `logprobs`, for grad [T] of log p(label)."""
    column, mine = _places(labels, columns)
    grad = grad.unsqueeze(-1)
    if shift is not None:
        logprobs.add_(shift.unsqueeze(-1))
    dlogits = logprobs.exp_().mul_(-grad)  # d log p(y) / d logit_j = [j = y] - p_j
    return dlogits.scatter_add_(-1, column, (grad * mine.unsqueeze(-1)).to(dlogits.dtype))


def _places(labels: torch.Tensor, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """(own column of each label [T, 1], whether it is one [T])."""
    column = labels - columns.first
    mine = (column >= 0) & (column < columns.per_rank)
    return column.masked_fill(~mine, 0).unsqueeze(-1), mine
