"""Log-probabilities and cross-entropy over a vocabulary that is cut over tp; logits are never gathered.

    fused_losses.py       on Triton
    plain_losses.py       in torch

Letters: T tokens, V vocabulary, t tp size.
"""

from __future__ import annotations

import torch

from megallm.ops.backends import DEFAULT, Backends
from megallm.parallel.collectives import all_gather
from megallm.parallel.fused_losses import FusedLogprobs, HeadLogprobs, HeadLossSum
from megallm.parallel.linear import ColumnLinear
from megallm.parallel.mesh import Axis
from megallm.parallel.plain_losses import CHUNK_BYTES, IGNORE_INDEX, Columns, PlainHeadLogprobs, PlainLogprobs


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
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """`local`: the logits [T, V/tp]; or None, and they are head(hidden) for hidden [T, H] or [T/tp, H], of which
        log-probabilities in plain torch make `chunk_bytes` at a time."""
        self.vocab_size = vocab_size
        self.expected_scale: torch.Tensor | None = None
        """0-d, what the sum of the losses will be multiplied by: a hint that saves a pass and a rounding."""
        self._local, self._hidden, self._head, self._chunk_bytes = local, hidden, head, chunk_bytes
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
        if self._local is None and self._head is not None and self._hidden is not None:
            found = self._from_hidden(self._hidden, self._head, flat)
            if found is not None:
                return found.view(labels.shape)
        columns = self._columns(self.local.size(-1))
        if self._backends.pick("cross_entropy", self.local, columns.per_rank) == "triton":
            return FusedLogprobs.apply(self.local, flat, columns).view(labels.shape)
        return PlainLogprobs.apply(self.local, flat, columns).view(labels.shape)

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

    def _from_hidden(self, hidden: torch.Tensor, head: ColumnLinear, labels: torch.Tensor) -> torch.Tensor | None:
        """As `token_logprobs`, with logits for labelled tokens only, in chunks; None where all are made at once."""
        columns = self._columns(head.weight.size(0))
        if self._backends.pick("cross_entropy", hidden, columns.per_rank) != "torch":
            return None
        rows = max(1, self._chunk_bytes // (columns.per_rank * hidden.element_size()))
        on_host = not labels.is_cuda  # elsewhere it would wait for the device to know how many labels there are
        kept = (labels != IGNORE_INDEX).nonzero().squeeze(1) if on_host else None
        if len(labels) <= rows and (kept is None or len(kept) == len(labels)):
            return None
        hidden, sink = head.gathered(hidden), head.grad_sinks.get("weight")
        if kept is None:
            found = PlainHeadLogprobs.apply(hidden, head.weight, labels, columns, sink, rows)
            return found.masked_fill(labels == IGNORE_INDEX, 0)
        found = PlainHeadLogprobs.apply(hidden[kept], head.weight, labels[kept], columns, sink, rows)
        return found.new_zeros(len(labels)).index_copy(0, kept, found)

    def _columns(self, per_rank: int) -> Columns:
        return Columns(vocab_size=self.vocab_size, tp=self._tp, per_rank=per_rank)

    def gathered(self) -> torch.Tensor:
        """The logits [T, V] on every tp rank, fp32. For sampling and tests, never for training."""
        if self._tp.size == 1:
            return self.local[:, : self.vocab_size].float()
        parts = all_gather(self.local.float(), self._tp).chunk(self._tp.size, dim=0)
        return torch.cat(parts, dim=-1)[:, : self.vocab_size]
