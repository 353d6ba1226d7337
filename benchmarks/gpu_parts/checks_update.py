"""Checks of AdamW: every chunk size of its table, dtypes of gradients and copies, misaligned slices, skipped steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from gpu_parts import references
from gpu_parts.checks import CheckUnit
from gpu_parts.compare import Finding, compare, identical, poisoned
from gpu_parts.place import Place

SETTINGS: dict[str, Any] = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def units(place: Place) -> list[CheckUnit]:
    """Totals of elements that make the planner choose each chunk size."""
    totals = (3000,) if place.tiny else (1_000_000, 3_000_000, 6_000_000, 10_000_000, 20_000_000, 40_000_000)
    result = []
    for total in totals:
        for grad, copies in ((torch.float32, False), (torch.bfloat16, True)):
            if place.tiny and copies:
                continue  # bf16 is not the interpreter's strength
            run = partial(check_adamw, total=total, grad=grad, copies=copies)
            name = f"{total} elements, {str(grad).removeprefix('torch.')} gradients{', copies' if copies else ''}"
            result.append(CheckUnit(op="adamw", name=name, run=run))
    return result


def check_adamw(
    place: Place, generator: torch.Generator, *, total: int, grad: torch.dtype, copies: bool, update: Any = None
) -> list[Finding]:
    """Three updates, one of them skipped, against fp64. Slices of flat buffers: each starts at another alignment."""
    from megallm_kernels.adamw import adamw_

    step_of = adamw_ if update is None else update
    sizes = [total // 2 + 3, total // 3 + 1, 1, total // 7, 5]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    draw = partial(place.normal, sum(sizes), generator=generator, dtype=torch.float32)
    flat = [draw() * 0.1, torch.zeros_like(draw()), torch.zeros_like(draw())]
    copy = torch.empty(sum(sizes), dtype=torch.bfloat16, device=place.device) if copies else None
    decayed = [True, False, True, True, False]

    def cut(buffer: torch.Tensor) -> list[torch.Tensor]:
        return [buffer[a : a + n] for a, n in zip(starts, sizes, strict=True)]

    scalars = {name: torch.zeros((), device=place.device) for name in ("step", "is_bad")}
    scalars["learning_rate"] = torch.full((), 0.05, device=place.device)
    scalars["grad_divisor"] = torch.full((), 2.0, device=place.device)
    expected = [[t.double() for t in cut(buffer)] for buffer in flat]
    plan = None
    findings = []
    for number, bad in enumerate((0.0, 1.0, 0.0, 0.0)):
        gradient = (draw() * 3.0).to(grad)
        scalars["is_bad"].fill_(bad)
        before = flat[0].clone()
        with poisoned():
            plan = step_of(
                plan, *([*cut(b)] for b in (flat[0], gradient, flat[1], flat[2])),
                [] if copy is None else cut(copy), decayed=decayed, **scalars, **SETTINGS,
            )  # fmt: skip
        if bad:
            findings.append(identical("a skipped step", flat[0], before))
            continue
        step = number + 1 - int(number > 1)
        for i, g in enumerate(cut(gradient)):
            now = references.adamw(
                expected[0][i], g.double() / 2.0, expected[1][i], expected[2][i], step=step, lr=0.05,
                **(SETTINGS | {"weight_decay": 0.1 if decayed[i] else 0.0}),
            )  # fmt: skip
            expected[0][i], expected[1][i], expected[2][i] = now
    for name, buffer, reference in zip(("params", "exp_avg", "exp_avg_sq"), flat, expected, strict=True):
        findings.append(compare(name, buffer, torch.cat(reference), roundings=16))
    findings.append(compare("step", scalars["step"], torch.full((), 3.0, device=place.device)))
    if copy is not None:
        findings.append(identical("copies", copy, flat[0].to(copy.dtype)))
    return findings
