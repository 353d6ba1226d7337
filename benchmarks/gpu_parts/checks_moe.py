"""Checks of what a mixture of experts does: sorting rows by expert, back, and the grouped products.

Letters: T tokens, k experts per token, E experts, R rows, H hidden, F features.
"""

from __future__ import annotations

import itertools
from functools import partial

import torch

from gpu_parts import references
from gpu_parts.checks import CheckUnit
from gpu_parts.compare import TF32X3, UNIT, Finding, compare, identical, poisoned
from gpu_parts.place import Place


def units(place: Place) -> list[CheckUnit]:
    """Few and many rows an expert, empty experts, dropped slots, aligned or not."""
    result = []
    for hidden in (100, 600) if place.tiny else (512, 1000, 4096, 8192, 9000):
        result.append(CheckUnit(op="permute", name=f"H {hidden}", run=partial(_permute, hidden=hidden)))
    for rows in (30, 400) if place.tiny else (200, 6000):
        for inner, features in ((16, 32), (15, 33)) if place.tiny else ((256, 320), (250, 330)):
            run = partial(_grouped, rows=rows, inner=inner, features=features, dtype=None)
            result.append(CheckUnit(op="grouped_gemm", name=f"rows {rows} {inner} x {features}", run=run))
    if not place.tiny:
        run = partial(_grouped, rows=2000, inner=256, features=320, dtype=torch.float32)
        result.append(CheckUnit(op="grouped_gemm", name="fp32", run=run))
    return result


def _permute(place: Place, generator: torch.Generator, *, hidden: int) -> list[Finding]:
    """Rows to experts and back with weights, against indexing in fp64; some slots dropped, rows padded."""
    from megallm_kernels.permute import permute, sort_by_expert, unpermute

    tokens, k, experts = place.pick(301, 11), 2, 6
    x = place.normal(tokens, hidden, generator=generator)
    weights = place.normal(tokens, k, generator=generator, dtype=torch.float32)
    ids = torch.randint(0, experts, (tokens, k), generator=generator, device=place.device)
    ids[::5, 1] = -1
    dy = place.normal(tokens, hidden, generator=generator)
    findings = []
    for multiple in (1, 8):
        order = sort_by_expert(ids, experts, multiple=multiple)
        target = order.destination.long()
        leaves = references.wide(x, weights)
        sorted_rows = leaves[0].new_zeros(order.source.numel(), hidden)
        kept = target.reshape(-1) >= 0
        copies = leaves[0].unsqueeze(1).expand(-1, k, -1).reshape(-1, hidden)[kept]
        sorted_rows = sorted_rows.index_put((target.reshape(-1)[kept],), copies)
        picked = sorted_rows[target.clamp(min=0)] * (target >= 0).unsqueeze(-1)
        y = (picked.tanh() * leaves[1].unsqueeze(-1)).sum(1)
        expected = torch.autograd.grad(y, leaves, dy.double())
        own = [t.detach().clone().requires_grad_() for t in (x, weights)]
        with poisoned():
            rows = permute(own[0], order.source, order.destination)
            out = unpermute(rows.tanh(), order.source, order.destination, own[1])
            grads = torch.autograd.grad(out, own, dy)
        findings.append(identical(f"rows, multiple {multiple}", rows.double(), sorted_rows))
        pairs = zip(("y", "dx", "dweights"), (out, *grads), (y, *expected), strict=True)
        for name, result, reference in pairs:
            # tanh and its derivative stand in for the experts: three more roundings
            findings.append(compare(f"{name}, multiple {multiple}", result, reference, roundings=5, terms=hidden,
                                    dtype=place.dtype))  # fmt: skip
    return findings


def _grouped(
    place: Place, generator: torch.Generator, *, rows: int, inner: int, features: int, dtype: torch.dtype | None
) -> list[Finding]:
    """y, dx, dweight; an expert without rows, rows past the last expert."""
    from megallm_kernels.grouped_gemm import grouped_gemm

    experts = 5
    cuts = torch.randint(0, rows, (experts - 1,), generator=generator, device=place.device).sort().values.tolist()
    cuts[1] = cuts[0]
    bounds = [0, *sorted(cuts), rows]
    offsets = torch.tensor(bounds, dtype=torch.int32, device=place.device)
    x = place.normal(rows + 3, inner, generator=generator, dtype=dtype)
    weight = place.normal(experts, features, inner, generator=generator, dtype=dtype)
    dy = place.normal(rows + 3, features, generator=generator, dtype=dtype)
    leaves = references.wide(x, weight)
    parts = [leaves[0][a:b] @ leaves[1][e].t() for e, (a, b) in enumerate(itertools.pairwise(bounds))]
    y = torch.cat([*parts, leaves[0].new_zeros(3, features)])
    expected = torch.autograd.grad(y, leaves, dy.double())
    runs = []
    for _ in range(2):
        own = [t.detach().clone().requires_grad_() for t in (x, weight)]
        with poisoned():
            out = grouped_gemm(own[0], own[1], offsets)
            runs.append((out, *torch.autograd.grad(out, own, dy)))
    wide = TF32X3 if x.dtype == torch.float32 and place.is_cuda else UNIT[torch.float32]
    findings = []
    for name, result, again, reference in zip(("y", "dx", "dweight"), *runs, (y, *expected), strict=True):
        findings.append(compare(name, result, reference, terms=max(rows, features), wide=wide))
        findings.append(identical(name, result, again))
    return findings
