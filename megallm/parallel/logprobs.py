"""Log-probabilities and cross-entropy over a vocabulary that is cut over tp; logits are never gathered.

    fused_losses.py       on Triton
    plain_losses.py       in torch

Letters: T tokens, V vocabulary, t tp size.
"""

from __future__ import annotations

import copy

import torch

from megallm.ops.backends import DEFAULT, Backends
from megallm.parallel.collectives import all_gather
from megallm.parallel.fused_losses import FusedLogprobs, HeadLogprobs, HeadLossSum
from megallm.parallel.linear import ColumnLinear
from megallm.parallel.mesh import Axis
from megallm.parallel.plain_losses import CHUNK_BYTES, IGNORE_INDEX, Columns, PlainHeadLogprobs, PlainLogprobs


class VocabLogits:
    """The lm head's output: this rank's columns of the logits of T tokens, made when they are first needed.

    What losses use of it is the same on every layout: `summed_cross_entropy`, `cross_entropy`, `token_logprobs`,
    `logprobs_and_entropy`. Each uses the logits up: call one of them, once.
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
        return PlainLogprobs.apply(self.local, flat, columns, False)[0].view(labels.shape)

    def logprobs_and_entropy(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(`token_logprobs`, entropy in nats over V), both in labels' shape, 0 where the label is -100, differentiable.

        In plain torch on every device; of logits that are not there yet, in chunks.
        """
        flat = labels.reshape(-1)
        if self._local is None and self._head is not None and self._hidden is not None:
            found, entropy = self._in_chunks(self._hidden, self._head, flat, _labelled(flat), with_entropy=True)
        else:
            found, entropy = PlainLogprobs.apply(self.local, flat, self._columns(self.local.size(-1)), True)
        assert entropy is not None
        return found.view(labels.shape), entropy.view(labels.shape)

    def tempered(self, temperature: float | torch.Tensor) -> VocabLogits:
        """Those divided by a temperature, of softmax(logits / temperature); a tensor [T] has one for each token."""
        if not isinstance(temperature, torch.Tensor):
            if temperature <= 0.0:
                raise ValueError(f"temperature {temperature} is not above 0, which softmax(logits / temperature) needs")
            if temperature == 1.0:
                return self
        found = copy.copy(self)
        if self._local is not None:
            found._local = _divided(self._local, temperature)
        else:
            assert self._hidden is not None
            if isinstance(temperature, torch.Tensor) and len(self._hidden) < len(temperature):  # cut along tokens
                temperature = temperature.view(self._tp.size, -1)[self._tp.rank]
            found._hidden = _divided(self._hidden, temperature)
        return found

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
        kept = _labelled(labels)
        if len(labels) <= self._chunk_rows(head) and (kept is None or len(kept) == len(labels)):
            return None
        return self._in_chunks(hidden, head, labels, kept, with_entropy=False)[0]

    def _in_chunks(
        self,
        hidden: torch.Tensor,
        head: ColumnLinear,
        labels: torch.Tensor,
        kept: torch.Tensor | None,
        *,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(log p(label), entropy or None) of the tokens `kept` (None = all), 0 elsewhere."""
        hidden, sink, rows = head.gathered(hidden), head.grad_sinks.get("weight"), self._chunk_rows(head)
        columns, all_labels = self._columns(head.weight.size(0)), labels
        if kept is not None:
            hidden, labels = hidden[kept], labels[kept]
        found = PlainHeadLogprobs.apply(hidden, head.weight, labels, columns, sink, rows, with_entropy)
        logprobs, entropy = (None if each is None else _put_back(each, kept, all_labels) for each in found)
        assert logprobs is not None
        return logprobs, entropy

    def _chunk_rows(self, head: ColumnLinear) -> int:
        return max(1, self._chunk_bytes // (head.weight.size(0) * head.weight.element_size()))

    def _columns(self, per_rank: int) -> Columns:
        return Columns(vocab_size=self.vocab_size, tp=self._tp, per_rank=per_rank)

    def of_tokens(self, index: torch.Tensor) -> VocabLogits:
        """Those of the tokens index [n] alone: the others' are not made if they are not yet there."""
        if self._local is None:
            assert self._head is not None and self._hidden is not None
            local = self._head.products.output(self._head.gathered(self._hidden)[index], self._head.weight)
        else:
            local = self._local[index]
        return VocabLogits(local, vocab_size=self.vocab_size, tp=self._tp, backends=self._backends)

    def gathered(self) -> torch.Tensor:
        """The logits [T, V] on every tp rank, fp32. For sampling and tests, never for training."""
        if self._tp.size == 1:
            return self.local[:, : self.vocab_size].float()
        parts = all_gather(self.local.float(), self._tp).chunk(self._tp.size, dim=0)
        return torch.cat(parts, dim=-1)[:, : self.vocab_size]


def _labelled(labels: torch.Tensor) -> torch.Tensor | None:
    """The places [n] of labels that are not -100; None on a device, which it would wait for to know how many."""
    return None if labels.is_cuda else (labels != IGNORE_INDEX).nonzero().squeeze(1)


def _put_back(values: torch.Tensor, kept: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
    """[T] of values at the places `kept` or, with None, at all of them, and 0 where the label is -100."""
    if kept is None:
        return values.masked_fill(labels == IGNORE_INDEX, 0)
    return values.new_zeros(len(labels)).index_copy(0, kept, values)


def _divided(values: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    """[T, n] over the temperature, or that of each row, rounded once."""
    if not isinstance(temperature, torch.Tensor):
        return values / temperature
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    return (values.to(wide) / temperature.to(wide).unsqueeze(1)).to(values.dtype)
