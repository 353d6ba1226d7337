"""Adapters added to the weights they stand beside, at any layout: each rank changes what it holds.

    column   W_i += s B_i A        row   W_i += s B A_i        no rank needs another's

At ZeRO stage 3 adapters are gathered all at once and weights bucket by bucket. Weights in 4 bits are made dense in
fp32, one by one, added to, and stored in the model's dtype: quantised again they would lose what was learned
(peft#2321).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from megallm.model.lora import Adapter
from megallm.model.transformer import Transformer
from megallm.optim.flat import FlatParameters
from megallm.parallel.linear import ColumnLinear, RowLinear
from megallm.parallel.lora import LowRank
from megallm.parallel.products import PLAIN


@torch.no_grad()
def merge_adapters(model: Transformer, flat: FlatParameters | None = None) -> None:
    """W += s B A in fp32, rounded once, then B = 0, for all adapters of the model. A collective where `flat` shards.

    flat: the model's flat parameters, where it has some; the optimizer's copies of B are the caller's to refresh.
    """
    weights = dict(model.named_parameters())
    names_of = {p: name for name, p in weights.items()}
    adapters = {names_of[m.weight]: m.low_rank for m in model.modules() if isinstance(m, Adapter)}
    if flat is not None:
        for each in flat.trained:
            if not each.is_present:
                each.start_gather()
        for each in flat.trained:
            each.wait()
    dense = {name: adapter for name, adapter in adapters.items() if name not in model.quantized}
    for names in [set(dense)] if flat is None else flat.refill(frozen_only=True):
        for name in names & set(dense):
            dense[name].merge_(weights[name].data)
    if model.quantized:
        _merge_quantized(model, adapters)
    for adapter in adapters.values():
        adapter.reset_()
    if flat is not None:
        for each in flat.trained:
            each.keep()


def _merge_quantized(model: Transformer, adapters: Mapping[str, LowRank]) -> None:
    """All weights in 4 bits become dense ones, with what their adapters add."""
    linears = {m.weight: m for m in model.modules() if isinstance(m, (ColumnLinear, RowLinear))}
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    for name, held in model.quantized.items():
        weight = held.dense(wide)
        if name in adapters:
            adapters[name].merge_(weight)
        held.restore_(weight)
        linears[held.parameter].products = PLAIN
    model.quantized.clear()
    assert model.lora is not None
    model.lora = replace(model.lora, lora_base="model")
