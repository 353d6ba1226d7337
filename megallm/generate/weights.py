"""Copies of the weights in the form that decodes fastest, held during a rollout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megallm.model.transformer import Transformer
from megallm.parallel.linear import ColumnLinear, RowLinear
from megallm.parallel.products import PLAIN, Switch, TransposedProducts


@contextmanager
def transposed_weights(model: Transformer, *, wanted: bool) -> Iterator[Switch]:
    """While the switch is on, linears in fp32 on a CPU multiply with transposed copies of their weights, which must not
    change inside. Prompts are read with it off: with many rows it gains little, and rows would lose their bits."""
    linears = [each for each in model.modules() if isinstance(each, ColumnLinear | RowLinear)]
    changed = [
        each for each in linears
        if wanted and each.products is PLAIN and each.weight.dtype == torch.float32 and not each.weight.is_cuda
    ]  # fmt: skip
    switch = Switch()
    try:
        for each in changed:
            each.products = TransposedProducts(each.weight, switch)
        yield switch
    finally:
        for each in changed:
            each.products = PLAIN
