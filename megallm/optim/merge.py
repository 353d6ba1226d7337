"""Adapters added to the weights they stand beside, at any layout: each rank changes what it holds.

    column   W_i += s B_i A        row   W_i += s B A_i        no rank needs another's

At ZeRO stage 3 adapters are gathered all at once and weights bucket by bucket.
"""

from __future__ import annotations

import torch

from megallm.model.lora import Adapter
from megallm.model.transformer import Transformer
from megallm.optim.flat import FlatParameters


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
    for names in [set(adapters)] if flat is None else flat.refill(frozen_only=True):
        for name in names & set(adapters):
            adapters[name].merge_(weights[name].data)
    for adapter in adapters.values():
        adapter.reset_()
    if flat is not None:
        for each in flat.trained:
            each.keep()
