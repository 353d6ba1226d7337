"""Losses over a vocabulary cut over tp, in plain torch: from logits, or from the lm head's input, in chunks of tokens.

    PlainLogprobs         logits [T, V'] -> log p(label) [T]
    PlainHeadLogprobs     hidden [T, H] -> log p(label) [T]: logits of a chunk at a time, made once more in backward

    log p(label) = logit[label] - logsumexp over V of logits          entropy = - sum over V of p log p

Each rank's local logsumexp and its part of the label's logit, 2 T numbers, are gathered; everything else is local. Both
also give the entropy [T] if they are asked to, else None: of each rank's own columns one number more is gathered.

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
Pair = tuple[torch.Tensor, torch.Tensor | None]
"""(log p(label), entropy or None)."""


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
    """(log p(label), entropy) [T] fp32 (fp64 of fp64) of logits [T, V'], labels [T]; 0 where the label is -100."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, columns: Columns, with_entropy: bool
    ) -> Pair:
        if columns.valid < columns.per_rank:
            logits = logits.clone()
        own = _own_columns(logits, labels, columns, with_entropy)
        whole = _over_tp(own.norm, own.target, own.entropy, columns.tp)
        ignored = labels == IGNORE_INDEX
        entropy = None if whole.entropy is None else whole.entropy.masked_fill(ignored, 0)
        ctx.save_for_backward(own.logprobs, whole.shift, labels, ignored, entropy)
        ctx.dtype, ctx.columns = logits.dtype, columns
        return whole.target.masked_fill(ignored, 0), entropy

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, of_entropy: torch.Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        logprobs, shift, labels, ignored, entropy = ctx.saved_tensors
        grad = grad.masked_fill(ignored, 0)
        both = None if of_entropy is None else (entropy, of_entropy.masked_fill(ignored, 0))
        dlogits = _gradient_(logprobs, shift, labels, grad, ctx.columns, both)
        return dlogits.to(ctx.dtype), None, None, None


class PlainHeadLogprobs(torch.autograd.Function):
    """(log p(label), entropy) [T] of hidden [T, H], weight [V', H], labels [T]; any finite number where those are -100.

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
        with_entropy: bool,
    ) -> Pair:
        norms, targets, entropies, kept = [], [], [], None
        for h, y in zip(hidden.split(rows), labels.split(rows), strict=True):
            own = _own_columns(h @ weight.t(), y, columns, with_entropy)
            norms.append(own.norm)
            targets.append(own.target)
            entropies.append(own.entropy)
            kept = own.logprobs if len(h) == len(hidden) else None
        whole = _over_tp(_joined(norms), torch.cat(targets), _joined(entropies), columns.tp)
        ctx.save_for_backward(hidden, weight, labels, whole.shift, whole.entropy)
        ctx.columns, ctx.sink, ctx.rows = columns, sink, rows
        ctx.kept = kept  # not saved like the others, so that backward can let it go
        return whole.target, whole.entropy

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, of_entropy: torch.Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        hidden, weight, labels, shift, entropy = ctx.saved_tensors
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
                both = None if of_entropy is None else (entropy[part], of_entropy[part])
                dlogits = _gradient_(logprobs, own_shift, y, grad[part], ctx.columns, both).to(h.dtype)
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
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None, None, None, None


class _Own(NamedTuple):
    """What a rank's own columns say."""

    logprobs: torch.Tensor
    """[T, V'], normalised over them."""
    norm: torch.Tensor | None
    """[T]: the logarithm of the sum of their exponentials; None with tp 1, which has no use for it."""
    target: torch.Tensor
    """[T]: with tp 1 log p(label); else the label's logit on the rank that has it, and 0."""
    entropy: torch.Tensor | None = None
    """[T], of a choice among them, if it was asked for."""


class _Whole(NamedTuple):
    """What all columns say, [T] each."""

    target: torch.Tensor
    """log p(label)."""
    entropy: torch.Tensor | None
    shift: torch.Tensor | None
    """What makes a rank's own log-probabilities those over V; None with tp 1."""


def _own_columns(
    logits: torch.Tensor, labels: torch.Tensor, columns: Columns, with_entropy: bool = False
) -> _Own:
    """Of logits [T, V'], whose padding is overwritten."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if columns.valid < columns.per_rank:
        logits[:, columns.valid :] = torch.finfo(logits.dtype).min
    logprobs = torch.log_softmax(logits, dim=-1, dtype=wide)
    column, mine = _places(labels, columns)
    target = logprobs.gather(-1, column).squeeze(-1)
    entropy = _finite_(logprobs).exp().mul_(logprobs).sum(-1).neg_() if with_entropy else None
    if columns.tp.size == 1:
        return _Own(logprobs, None, target, entropy)
    # from the largest logit: a very negative one would cancel it out, -inf make it NaN
    highest, place = logits.max(dim=-1, keepdim=True)
    norm = (highest.to(wide) - logprobs.gather(-1, place)).squeeze(-1)
    return _Own(logprobs, norm, (target + norm).masked_fill_(~mine, 0), entropy)


def _over_tp(norm: torch.Tensor | None, target: torch.Tensor, entropy: torch.Tensor | None, tp: Axis) -> _Whole:
    """Of the fields of `_Own`. One all-gather, of 2 T numbers or, with entropy, 3 T."""
    if norm is None:
        return _Whole(target, entropy, None)
    own = [norm, target] if entropy is None else [norm, target, entropy]
    norms, targets, *entropies = all_gather(torch.stack(own), tp).view(tp.size, len(own), -1).unbind(1)
    whole = torch.logsumexp(norms, dim=0)
    if entropies:  # of the choice of a rank's columns, and of that among them
        share = torch.softmax(norms, dim=0)
        entropy = (torch.special.entr(share) + share * entropies[0]).sum(0)
    return _Whole(targets.sum(0) - whole, entropy, norm - whole)


def _joined(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    found = [each for each in parts if each is not None]
    return torch.cat(found) if found else None


def _gradient_(
    logprobs: torch.Tensor,
    shift: torch.Tensor | None,
    labels: torch.Tensor,
    grad: torch.Tensor,
    columns: Columns,
    entropy: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Of the logits [T, V'], in the place of `logprobs`, for grad [T] of log p(label); `entropy`: (H, its grad) [T].

        d log p(y) / d logit_j = [j = y] - p_j          dH / d logit_j = -p_j (log p_j + H)
    """
    column, mine = _places(labels, columns)
    grad = grad.unsqueeze(-1)
    if shift is not None:
        logprobs.add_(shift.unsqueeze(-1))
    if entropy is None:
        dlogits = logprobs.exp_().mul_(-grad)
    else:
        found, of_entropy = entropy[0].unsqueeze(-1), entropy[1].unsqueeze(-1)
        p = _finite_(logprobs).exp()
        # p first: the largest numbers, which columns of padding have, times anything are not finite
        dlogits = logprobs.mul_(p).mul_(-of_entropy).addcmul_(p, -(grad + of_entropy * found))
    return dlogits.scatter_add_(-1, column, (grad * mine.unsqueeze(-1)).to(dlogits.dtype))


def _finite_(logprobs: torch.Tensor) -> torch.Tensor:
    """Without -inf, whose product with p = 0 is NaN."""
    return logprobs.clamp_(min=torch.finfo(logprobs.dtype).min)


def _places(labels: torch.Tensor, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """(own column of each label [T, 1], whether it is one [T])."""
    column = labels - columns.first
    mine = (column >= 0) & (column < columns.per_rank)
    return column.masked_fill(~mine, 0).unsqueeze(-1), mine
