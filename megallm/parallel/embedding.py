"""Vocabulary-parallel embedding: each tp rank holds V/tp rows (padded), looks up the ids that fall among them.

Letters: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megallm.parallel.collectives import all_gather, all_reduce_, reduce_scatter
from megallm.parallel.grad_sink import GradSink, SinkLayer
from megallm.parallel.mesh import Axis


class VocabEmbedding(SinkLayer):
    """Rows of W [V, H] for ids [T]; W is cut along V.

    Gives [T, H] (all-reduce in forward, nothing in backward), or [T/tp, H] under sequence parallelism (reduce-scatter
    in forward, all-gather in backward). Ids outside [0, V) are the caller's error; they give zeros.
    """

    def __init__(self, weight: nn.Parameter, *, tp: Axis, sequence_parallel: bool) -> None:
        super().__init__()
        self.weight = weight  # [V/tp, H]
        self._tp, self._sequence_parallel = tp, sequence_parallel and tp.size > 1

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] int64 -> [T, H] or [T/tp, H]."""
        return _Lookup.apply(self.weight, input_ids, self._tp, self._sequence_parallel, self.grad_sinks.get("weight"))


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        weight: torch.Tensor,
        input_ids: torch.Tensor,
        tp: Axis,
        sequence_parallel: bool,
        sink: GradSink | None,
    ) -> torch.Tensor:
        ctx.tp, ctx.sequence_parallel, ctx.sink, ctx.shape = tp, sequence_parallel, sink, weight.shape
        if tp.size == 1:
            ctx.save_for_backward(input_ids)
            return F.embedding(input_ids, weight)
        rows = input_ids - tp.rank * weight.size(0)
        mine = (rows >= 0) & (rows < weight.size(0))
        rows = rows.masked_fill(~mine, 0)
        out = F.embedding(rows, weight).masked_fill_(~mine.unsqueeze(-1), 0)
        ctx.save_for_backward(rows, mine)
        return reduce_scatter(out, tp) if sequence_parallel else all_reduce_(out, tp)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        dy = all_gather(dy, ctx.tp) if ctx.sequence_parallel else dy
        if ctx.tp.size == 1:
            (rows,) = ctx.saved_tensors
        else:
            rows, mine = ctx.saved_tensors
            dy = dy.masked_fill(~mine.unsqueeze(-1), 0)
        if ctx.sink is not None:
            ctx.sink.add_rows(rows, dy)
            return None, None, None, None, None
        return dy.new_zeros(ctx.shape).index_add_(0, rows, dy), None, None, None, None
