"""Log-probabilities and cross-entropy over a vocabulary that is cut over tp; logits are never gathered.

    log p(label) = logit[label] - logsumexp over V of logits

Each rank's local logsumexp and its part of the label's logit, 2 T numbers, are gathered; everything else is local.

Letters: T tokens, V vocabulary, t tp size.
"""

from __future__ import annotations

from typing import Any

import torch

from megallm.ops.backends import DEFAULT, Backends
from megallm.parallel.collectives import all_gather
from megallm.parallel.fused_losses import Columns, FusedLogprobs, HeadLogprobs, HeadLossSum
from megallm.parallel.linear import ColumnLinear
from megallm.parallel.mesh import Axis

IGNORE_INDEX = -100


class VocabLogits:
    """The lm head's output: this rank's columns of the logits of T tokens, made when they are first needed.

    What losses use of it is the same on every layout: `summed_cross_entropy`, `cross_entropy`, `token_logprobs`. Each
    uses the logits up: call one of them, once.
    """

    def __init__(
        self,
        local: torch.Tensor | None,
        *,
        vocab_size: int,
        tp: Axis,
        backends: Backends = DEFAULT,
        hidden: torch.Tensor | None = None,
        head: ColumnLinear | None = None,
    ) -> None:
        """`local`: the logits [T, V/tp]; or None, and they are head(hidden) for hidden [T, H] or [T/tp, H]."""
        self.vocab_size = vocab_size
        self.expected_scale: torch.Tensor | None = None
        """0-d, what the sum of the losses will be multiplied by: a hint that saves a pass and a rounding."""
        self._local, self._hidden, self._head = local, hidden, head
        self._tp, self._backends = tp, backends

    @property
    def local(self) -> torch.Tensor:
        """[T, V/tp] with the padding columns of the last rank."""
        if self._local is None:
            assert self._head is not None and self._hidden is not None
            self._local = self._head(self._hidden)
        return self._local

    def token_logprobs(self, labels: torch.Tensor) -> torch.Tensor:
        """log p(label) of each token, in labels' shape, fp32 (fp64 for fp64 logits), 0 where the label is -100.

        labels [T] or [B, S] int64. Differentiable.
        """
        flat = labels.reshape(-1)
        chunked = self._chunked_head()
        if chunked is not None:
            hidden, head, columns = chunked
            return HeadLogprobs.apply(hidden, head.weight, flat, columns, head.grad_sinks.get("weight")).view(
                labels.shape
            )
        columns = self._columns(self.local.size(-1))
        if self._backends.pick("cross_entropy", self.local, columns.per_rank) == "triton":
            return FusedLogprobs.apply(self.local, flat, columns).view(labels.shape)
        return _LogProbs.apply(self.local, flat, columns.valid, self._tp).view(labels.shape)

    def cross_entropy(self, labels: torch.Tensor) -> torch.Tensor:
        """-log p(label) of each token: `token_logprobs` with the sign of a loss."""
        return -self.token_logprobs(labels)

    def summed_cross_entropy(self, labels: torch.Tensor) -> torch.Tensor:
        """0-d: the sum of `cross_entropy` over all tokens, the form that can do without the whole logits."""
        chunked = self._chunked_head() if torch.is_grad_enabled() else None  # without, HeadLogprobs makes no gradients
        if chunked is None:
            return self.cross_entropy(labels).sum()
        hidden, head, columns = chunked
        return HeadLossSum.apply(
            hidden, head.weight, labels.reshape(-1), self.expected_scale, columns, head.grad_sinks.get("weight")
        )

    def _chunked_head(self) -> tuple[torch.Tensor, ColumnLinear, Columns] | None:
        """(hidden [T, H], head, columns) where head and loss are to run in one, chunk by chunk."""
        if self._local is not None or self._head is None or self._hidden is None:
            return None
        per_rank = self._head.weight.size(0)
        if self._backends.pick("linear_cross_entropy", self._hidden, per_rank) != "triton":
            return None
        return self._head.gathered(self._hidden), self._head, self._columns(per_rank)

    def _columns(self, per_rank: int) -> Columns:
        return Columns(vocab_size=self.vocab_size, tp=self._tp, per_rank=per_rank)

    def gathered(self) -> torch.Tensor:
        """The logits [T, V] on every tp rank, fp32. For sampling and tests, never for training."""
        if self._tp.size == 1:
            return self.local[:, : self.vocab_size].float()
        parts = all_gather(self.local.float(), self._tp).chunk(self._tp.size, dim=0)
        return torch.cat(parts, dim=-1)[:, : self.vocab_size]


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, valid: int, tp: Axis) -> torch.Tensor:  # type: ignore[override]
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        columns = logits.size(-1)
        if valid < columns:
            logits = logits.clone()
            logits[:, valid:] = torch.finfo(logits.dtype).min
        local = torch.log_softmax(logits, dim=-1, dtype=wide)  # [T, V/t], normalised over this rank's columns
        column = labels - tp.rank * columns
        mine = (column >= 0) & (column < columns)
        column = column.masked_fill(~mine, 0).unsqueeze(-1)
        target = local.gather(-1, column).squeeze(-1)
        shift: torch.Tensor | None = None
        if tp.size > 1:
            # local logsumexp [T], from the largest logit: a very negative one would cancel it out, -inf make it NaN
            highest, place = logits.max(dim=-1, keepdim=True)
            own_norm = (highest.to(wide) - local.gather(-1, place)).squeeze(-1)
            target = (target + own_norm).masked_fill_(~mine, 0)  # the label's logit on its rank, 0 elsewhere
            norms, targets = all_gather(torch.stack([own_norm, target]), tp).view(tp.size, 2, -1).unbind(1)
            norm = torch.logsumexp(norms, dim=0)
            shift = own_norm - norm
            target = targets.sum(0) - norm
        ignored = labels == IGNORE_INDEX
        ctx.save_for_backward(local, shift, column, mine, ignored)
        ctx.dtype = logits.dtype
        return target.masked_fill(ignored, 0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        local, shift, column, mine, ignored = ctx.saved_tensors
        grad = grad.masked_fill(ignored, 0).unsqueeze(-1)  # [T, 1]
        if shift is not None:
            local.add_(shift.unsqueeze(-1))
        dlogits = local.exp_().mul_(-grad)  # d log p(y) / d logit_j = [j = y] - p_j; the buffer is ours
        dlogits.scatter_add_(-1, column, (grad * mine.unsqueeze(-1)).to(dlogits.dtype))
        return dlogits.to(ctx.dtype), None, None, None
