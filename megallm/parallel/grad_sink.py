"""Where a parameter's gradient goes: straight into its slice of a flat bucket, without a temporary.

A layer that owns a large matrix asks its sink to accumulate `dy^T x` in the bucket's precision (fp32 for bf16
weights) with one GEMM; small parameters let autograd make the gradient and a hook adds it. Either way the sink counts
contributions, and tells the bucket when the last one of the step has arrived. Without a sink (a layer used alone, a
test) gradients flow through autograd as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn


class GradSink:
    """Accumulates one parameter's gradient over the microbatches of a step."""

    def __init__(
        self, buffer: torch.Tensor, on_ready: Callable[[], None], on_first: Callable[[], None] | None = None
    ) -> None:
        """on_first is called before the first contribution, on_ready after the last one."""
        self.buffer = buffer
        """View of the bucket with the parameter's shape, in the accumulation dtype."""
        self._on_ready, self._on_first = on_ready, on_first
        self._is_fresh = True
        self._awaited = 0

    def expect(self, contributions: int) -> None:
        """Starts a step: the buffer is complete after so many contributions; the first one overwrites it."""
        self._is_fresh, self._awaited = True, contributions

    def add_product(self, dy: torch.Tensor, x: torch.Tensor) -> None:
        """buffer += dy^T x for dy [T, out] and x [T, in]."""
        self.add_products([(dy, x)])

    def add_products(self, factors: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """One contribution, the sum of dy^T x over the chunks (dy [T, out], x [T, in]) of a microbatch's tokens."""
        self._begin()
        for dy, x in factors:
            self._add_product(dy, x)
            self._is_fresh = False
        if self._is_fresh:  # no tokens
            self.buffer.zero_()
        self._count()

    def add_rows(self, rows: torch.Tensor, dy: torch.Tensor) -> None:
        """buffer[rows[i]] += dy[i] for rows [T] int64 and dy [T, in]."""
        self._begin()
        if self._is_fresh:
            self.buffer.zero_()
        self.buffer.index_add_(0, rows, dy.to(self.buffer.dtype))
        self._count()

    def add(self, grad: torch.Tensor) -> None:
        """buffer += grad."""
        self._begin()
        self._add(grad)
        self._count()

    def add_written(self, write: Callable[[torch.Tensor], None]) -> None:
        """buffer += what `write` writes into a tensor like it: into the buffer itself if it is the first to come."""
        self._begin()
        if self._is_fresh:
            write(self.buffer)
        else:
            part = torch.empty_like(self.buffer)
            write(part)
            self.buffer.add_(part)
        self._count()

    def close(self) -> None:
        """Ends a step in which some contributions did not come (an unused parameter): they count as zero."""
        if self._is_fresh:
            self.buffer.zero_()
        self._is_fresh = False

    def _begin(self) -> None:
        if self._is_fresh and self._on_first is not None:
            self._on_first()

    def _add_product(self, dy: torch.Tensor, x: torch.Tensor) -> None:
        if dy.dtype == self.buffer.dtype:
            torch.addmm(self.buffer, dy.t(), x, beta=0.0 if self._is_fresh else 1.0, out=self.buffer)
        elif dy.is_cuda:  # low-precision factors, the sum in fp32: no temporary
            torch.addmm(
                self.buffer, dy.t(), x, out_dtype=self.buffer.dtype, beta=0.0 if self._is_fresh else 1.0,
                out=self.buffer,
            )  # fmt: skip
        else:
            self._add(dy.t().to(self.buffer.dtype) @ x.to(self.buffer.dtype))

    def _add(self, grad: torch.Tensor) -> None:
        if self._is_fresh:
            self.buffer.copy_(grad)
        else:
            self.buffer.add_(grad)

    def _count(self) -> None:
        self._is_fresh = False
        self._awaited -= 1
        if self._awaited == 0:
            self._on_ready()


class SinkLayer(nn.Module):
    """A layer whose own backward can feed sinks; `grad_sinks` maps its parameters' short names to them."""

    def __init__(self) -> None:
        super().__init__()
        self.grad_sinks: dict[str, GradSink] = {}
