"""What is timed of a mixture of experts: sorting rows by expert and back, and the grouped products.

Letters: T tokens, k experts per token, E experts, R = T k rows, H hidden, F features.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from gpu_parts.calls import OURS, Buffers, Case, compiled, differentiable, needs
from gpu_parts.place import Place


def moe_cases(place: Place) -> list[Case]:
    """8192 tokens, two experts each of 8, and eight each of 128 small ones."""
    tokens = place.pick(8192, 12)
    shapes = ((4, 2, 16, 24),) if place.tiny else ((8, 2, 4096, 14336), (128, 8, 2048, 768))
    cases: list[Case] = []
    for experts, k, hidden, features in shapes:
        rows, size = float(tokens * k), place.dtype.itemsize
        flops = 2.0 * rows * hidden * features
        contenders = (
            differentiable(OURS, _ours_grouped),
            differentiable("torch", _torch_grouped, why_absent=needs("torch"), note="torch's grouped_mm"),
            differentiable("torch loop", _loop, note="a product an expert; reads the counts on the host", graph=False),
        )
        is_first = experts == shapes[0][0]
        cases.append(
            Case(
                section="moe", op="grouped_gemm", name=f"E {experts} k {k} H {hidden} F {features}",
                size=0 if is_first else -1,
                make=partial(_grouped, rows=tokens * k, experts=experts, hidden=hidden, features=features),
                contenders=contenders, set_bytes=rows * (hidden + features) * size,
                flops={"fwd": flops, "bwd": 2 * flops, "both": 3 * flops},
            )
        )  # fmt: skip
        moved = tokens * hidden * size
        contenders = (differentiable(OURS, _ours_permute), differentiable("torch", _index), compiled(_index))
        cases.append(
            Case(
                section="moe", op="permute", name=f"E {experts} k {k} H {hidden}", size=-1,
                make=partial(_permuted, tokens=tokens, experts=experts, k=k, hidden=hidden), contenders=contenders,
                set_bytes=float(moved * (k + 2)),
                bytes_moved={
                    "fwd": 2.0 * moved * (k + 1), "bwd": 1.0 * moved * (3 * k + 2), "both": 1.0 * moved * (5 * k + 4),
                },
            )
        )  # fmt: skip
    return cases


def _grouped(
    place: Place, generator: torch.Generator, count: int, *, rows: int, experts: int, hidden: int, features: int
) -> list[Buffers]:
    """inputs: x [R, H], weight [E, F, H]; constants: offsets [E + 1], uneven."""
    share = torch.rand(experts, generator=generator, device=place.device) + 0.5
    ends = (share.cumsum(0) / share.sum() * rows).round().int()
    ends[-1] = rows
    offsets = torch.cat([ends.new_zeros(1), ends])
    weight = (place.normal(experts, features, hidden, generator=generator) * hidden**-0.5).requires_grad_()
    return [
        Buffers(
            inputs=(place.normal(rows, hidden, generator=generator).requires_grad_(), weight),
            grads=(place.normal(rows, features, generator=generator),), constants={"offsets": offsets},
        )
        for _ in range(count)
    ]  # fmt: skip


def _ours_grouped(x: torch.Tensor, weight: torch.Tensor, *, offsets: torch.Tensor) -> torch.Tensor:
    from megallm_kernels.grouped_gemm import grouped_gemm

    return grouped_gemm(x, weight, offsets)


def _torch_grouped(x: torch.Tensor, weight: torch.Tensor, *, offsets: torch.Tensor) -> torch.Tensor:
    function = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    return function(x, weight.transpose(-2, -1), offs=offsets[1:])


def _loop(x: torch.Tensor, weight: torch.Tensor, *, offsets: torch.Tensor) -> torch.Tensor:
    parts = x.split(offsets.diff().tolist())
    return torch.cat([part @ weight[e].t() for e, part in enumerate(parts)])


def _permuted(
    place: Place, generator: torch.Generator, count: int, *, tokens: int, experts: int, k: int, hidden: int
) -> list[Buffers]:
    """inputs: x [T, H], weights [T, k]; the experts between permute and unpermute are left out."""
    from megallm_kernels.permute import sort_by_expert

    result = []
    for _ in range(count):
        ids = torch.rand(tokens, experts, generator=generator, device=place.device).topk(k).indices
        order = sort_by_expert(ids, experts)
        weights = torch.rand(tokens, k, generator=generator, device=place.device).requires_grad_()
        x = place.normal(tokens, hidden, generator=generator).requires_grad_()
        constants = {"source": order.source, "destination": order.destination}
        result.append(
            Buffers(
                inputs=(x, weights), grads=(place.normal(tokens, hidden, generator=generator),), constants=constants
            )
        )
    return result


def _ours_permute(x: torch.Tensor, weights: torch.Tensor, *, source: torch.Tensor, destination: torch.Tensor) -> Any:
    from megallm_kernels.permute import permute, unpermute

    return unpermute(permute(x, source, destination), source, destination, weights)


def _index(x: torch.Tensor, weights: torch.Tensor, *, source: torch.Tensor, destination: torch.Tensor) -> Any:
    k = destination.size(1)
    rows = x[source // k]
    return (rows[destination.reshape(-1)].view(*destination.shape, -1) * weights.unsqueeze(-1).to(x.dtype)).sum(1)
