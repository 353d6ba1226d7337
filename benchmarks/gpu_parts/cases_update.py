"""What is timed of AdamW: a billion parameters in 200 tensors, beside torch's and apex's fused forms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from gpu_parts.calls import OURS, Buffers, Case, Contender, Direction, Directions, backend_absent, needs
from gpu_parts.place import Place

SETTINGS: dict[str, Any] = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
LEARNING_RATE = 1e-4


def adamw_cases(place: Place) -> list[Case]:
    """fp32 gradients (28 bytes a parameter), and the engine's form, which also writes bf16 parameters (30 bytes)."""
    numel, count = place.pick(5_000_000, 300), place.pick(200, 4)
    total = float(numel * count)
    plain = (
        Contender(name=OURS, build=partial(_ours, "triton")),
        Contender(name="torch", build=partial(_torch, "fused"), note="torch.optim.AdamW(fused=True)"),
        Contender(name="cuda", build=partial(_ours, "cuda"), why_absent=backend_absent("adamw", "cuda", place, 0)),
        Contender(name="torch foreach", build=partial(_torch, "foreach")),
        Contender(name="apex", build=_apex, why_absent=needs("apex.optimizers", "amp_C")),
    )
    copies = (Contender(name=OURS, build=partial(_ours, "triton")),)
    make = partial(_buffers, numel=numel, count=count)
    return [
        Case(
            section="adamw", op="adamw", name="fp32, 1 G in 200 tensors", size=0, make=partial(make, copies=False),
            contenders=plain, bytes_moved={"step": 28 * total}, set_bytes=16 * total + 2e9, launches=True,
        ),
        Case(
            section="adamw", op="adamw", name="with bf16 copies", size=-1, make=partial(make, copies=True),
            contenders=copies, bytes_moved={"step": 30 * total}, set_bytes=18 * total + 2e9, launches=True,
        ),
    ]  # fmt: skip


def _buffers(
    place: Place, generator: torch.Generator, sets: int, *, numel: int, count: int, copies: bool
) -> list[Buffers]:
    """One set of lists: params, grads, both moments, copies; parameters are shared by all contenders."""
    draw = partial(place.normal, numel, generator=generator, dtype=torch.float32)
    lists = {
        "params": [draw() for _ in range(count)],
        "grads": [draw() for _ in range(count)],
        "exp_avgs": [torch.zeros(numel, device=place.device) for _ in range(count)],
        "exp_avg_sqs": [torch.zeros(numel, device=place.device) for _ in range(count)],
        "copies": [torch.empty(numel, dtype=torch.bfloat16, device=place.device) for _ in range(count * copies)],
    }
    return [Buffers(inputs=(), constants=lists)] * sets


def _ours(backend: str, sets: Sequence[Buffers]) -> Directions:
    if backend == "cuda":
        from megallm_kernels.compiled import adamw_
    else:
        from megallm_kernels.adamw import adamw_

    lists = sets[0].constants
    device = lists["params"][0].device
    scalars = {
        "step": torch.zeros((), device=device), "learning_rate": torch.full((), LEARNING_RATE, device=device),
        "grad_divisor": torch.ones((), device=device), "is_bad": torch.zeros((), device=device),
    }  # fmt: skip
    plan: list[Any] = [None]

    def call(i: int) -> None:
        names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "copies")
        plan[0] = adamw_(plan[0], *(lists[name] for name in names), **scalars, **SETTINGS)

    return {"step": Direction(call=call)}


def _torch(form: str, sets: Sequence[Buffers]) -> Directions:
    """torch's own, with gradients in .grad."""
    lists = sets[0].constants
    params = [torch.nn.Parameter(p) for p in lists["params"]]
    for param, grad in zip(params, lists["grads"], strict=True):
        param.grad = grad
    betas = (SETTINGS["beta1"], SETTINGS["beta2"])
    arguments = {"lr": LEARNING_RATE, "betas": betas, "eps": 1e-8, "weight_decay": 0.1, form: True}
    optimizer = torch.optim.AdamW(params, **arguments)
    return {"step": Direction(call=lambda i: optimizer.step(), graph=False)}


def _apex(sets: Sequence[Buffers]) -> Directions:
    from apex.optimizers import FusedAdam

    lists = sets[0].constants
    params = [torch.nn.Parameter(p) for p in lists["params"]]
    for param, grad in zip(params, lists["grads"], strict=True):
        param.grad = grad
    betas = (SETTINGS["beta1"], SETTINGS["beta2"])
    optimizer = FusedAdam(params, lr=LEARNING_RATE, betas=betas, eps=1e-8, weight_decay=0.1)
    return {"step": Direction(call=lambda i: optimizer.step(), graph=False)}
