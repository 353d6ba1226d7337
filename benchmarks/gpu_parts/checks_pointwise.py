"""Checks of the norms, RoPE and the activations.

Letters: R rows, H hidden, F features, T tokens, h heads, D head dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from gpu_parts import references
from gpu_parts.checks import CheckUnit
from gpu_parts.compare import Finding, compare, identical, poisoned
from gpu_parts.place import Place

EPS = 1e-5
FAR_ROWS = 140_000
"""x 16384 columns: over 2^31 elements, so that a row number that stays 32 bits wide shows."""


def units(place: Place) -> list[CheckUnit]:
    """One unit for each size that reaches another table row, and one over 2^31 elements on a GPU."""
    result = []
    sizes = (128, 200, 1000, 4096) if place.tiny else (128, 256, 1000, 1024, 2048, 4000, 4096, 5120, 8192, 16384)
    for size in sizes:
        for centered in (False, True):
            op = "layer_norm" if centered else "rms_norm"
            run = partial(_norm, hidden=size, centered=centered, dtype=None)
            result.append(CheckUnit(op=op, name=f"H {size}", run=run))
    run = partial(_norm, hidden=2048, centered=False, dtype=torch.float32)
    result.append(CheckUnit(op="rms_norm", name="H 2048 fp32", run=run))
    for heads, dim, rotary in ((5, 64, 64), (40, 128, 128), (8, 80, 80), (3, 128, 32), (1, 256, 256)):
        run = partial(_rope, heads=heads, dim=dim, rotary=rotary)
        result.append(CheckUnit(op="rope", name=f"heads {heads} D {dim} R {rotary}", run=run))
    for kind in ("silu", "gelu", "gelu_tanh"):
        for features in (96, 300, 1000, 2048) if place.tiny else (96, 300, 512, 1024, 1000, 14336):
            run = partial(_activation, features=features, kind=kind)
            result.append(CheckUnit(op="activation", name=f"{kind} F {features}", run=run))
    result += _compiled_units(place)
    if not place.tiny:
        result.append(CheckUnit(op="rms_norm", name="over 2^31 elements", run=_far_norm))
        result.append(CheckUnit(op="activation", name="over 2^31 elements", run=_far_activation))
    return result


def _compiled_units(place: Place) -> list[CheckUnit]:
    """The CUDA kernels of csrc/, where they were built; AdamW's is compared with ours in Triton."""
    from gpu_parts.calls import backend_absent

    units = []
    for op, run in (("rms_norm", _compiled_norm), ("rope", _compiled_rope), ("adamw", _compiled_adamw)):
        if backend_absent(op, "cuda", place, 4096)() is None:
            units.append(CheckUnit(op=op, name="csrc", run=run, backend="cuda"))
    return units


def _compiled_norm(place: Place, generator: torch.Generator) -> list[Finding]:
    from megallm_kernels.compiled import add_rms_norm, rms_norm

    findings = []
    for hidden in (2048, 4096, 5120, 8192, 16384):
        x, residual, dy = (place.normal(515, hidden, generator=generator) for _ in range(3))
        weight = place.normal(hidden, generator=generator)
        for added in (False, True):
            leaves = references.wide(x + residual if added else x, weight)
            y = references.norm(leaves[0], leaves[1], None, EPS)
            expected = torch.autograd.grad(y, leaves, dy.double())
            own = [t.detach().clone().requires_grad_() for t in (x, weight)]
            with poisoned():
                out = add_rms_norm(own[0], residual, own[1], EPS)[0] if added else rms_norm(own[0], own[1], EPS)[0]
                grads = torch.autograd.grad(out, own, dy)
            for name, result, reference in zip(("y", "dx", "dweight"), (out, *grads), (y, *expected), strict=True):
                findings.append(compare(f"{name} H {hidden} {'add' if added else ''}", result, reference, terms=hidden))
    return findings


def _compiled_rope(place: Place, generator: torch.Generator) -> list[Finding]:
    from megallm_kernels.compiled import rope

    findings = []
    for dim in (64, 128, 256):
        x = place.normal(515, 42, dim, generator=generator)[:, :40]
        cos, sin = references.rope_tables(515, dim // 2, place.device)
        with poisoned():
            out = rope(x, cos, sin)
        findings.append(compare(f"D {dim}", out, references.rope(x.double(), cos.double(), sin.double())))
    return findings


def _compiled_adamw(place: Place, generator: torch.Generator) -> list[Finding]:
    from gpu_parts.checks_update import check_adamw
    from megallm_kernels.compiled import adamw_

    return check_adamw(place, generator, total=3_000_000, grad=torch.float32, copies=True, update=adamw_)


def _norm(
    place: Place, generator: torch.Generator, *, hidden: int, centered: bool, dtype: torch.dtype | None
) -> list[Finding]:
    """Forward and backward, alone and after the addition; determinism, since there are no atomics."""
    from megallm_kernels.norm import add_norm, norm

    rows = place.pick(517, 5)
    draw = partial(place.normal, generator=generator, dtype=dtype)
    x, residual, dy, dres = (draw(rows, hidden) for _ in range(4))
    weight = draw(hidden) * 0.2 + 1.0
    bias = draw(hidden) if centered else None
    findings: list[Finding] = []
    for added in (False, True):
        normalised = (x + residual) if added else x  # the stored sum is rounded before it is normalised
        leaves = references.wide(normalised, weight, *([bias] if bias is not None else []))
        y = references.norm(leaves[0], leaves[1], leaves[2] if centered else None, EPS)
        extra = (leaves[0] * dres.double()).sum() if added else 0.0
        expected = torch.autograd.grad((y * dy.double()).sum() + extra, leaves)
        runs = []
        for _ in range(2):
            own = [t.detach().clone().requires_grad_() for t in (x, residual, weight, *([bias] if centered else []))]  # type: ignore[union-attr]
            with poisoned():
                shift = own[3] if centered else None
                if added:
                    out, total, *_ = add_norm(own[0], own[1], own[2], shift, EPS)
                    grads = torch.autograd.grad((out, total), own, (dy, dres))
                else:
                    out, *_ = norm(own[0], own[2], shift, EPS)
                    grads = torch.autograd.grad(out, [own[0], *own[2:]], dy)
            runs.append((out, *grads))
        names = ("y", "dx", "dresidual", "dweight", "dbias") if added else ("y", "dx", "dweight", "dbias")
        wanted = (y, expected[0], *((expected[0],) if added else ()), *expected[1:])
        label = "add " if added else ""
        for name, out, again, reference in zip(names, *runs, wanted, strict=False):
            findings.append(compare(label + name, out, reference, terms=max(hidden, rows)))
            findings.append(identical(label + name, out, again))
    return findings


def _far_norm(place: Place, generator: torch.Generator) -> list[Finding]:
    """The last rows of more than 2^31 elements."""
    from megallm_kernels.norm import norm

    hidden, last = 16384, 16
    x = torch.empty(FAR_ROWS, hidden, device=place.device, dtype=place.dtype)
    x[-last:] = place.normal(last, hidden, generator=generator)
    weight = place.normal(hidden, generator=generator)
    y = norm(x, weight, None, EPS)[0][-last:].clone()
    reference = references.norm(x[-last:].double(), weight.double(), None, EPS)
    return [compare("last rows of y", y, reference, terms=hidden)]


def _far_activation(place: Place, generator: torch.Generator) -> list[Finding]:
    from megallm_kernels.activation import activation

    features, last = 8192, 16
    x = torch.empty(FAR_ROWS, 2 * features, device=place.device, dtype=place.dtype)
    x[-last:] = place.normal(last, 2 * features, generator=generator)
    y = activation(x, "silu", True)[-last:].clone()
    return [compare("last rows of y", y, references.gated(x[-last:].double(), "silu"))]


def _rope(place: Place, generator: torch.Generator, *, heads: int, dim: int, rotary: int) -> list[Finding]:
    """In place in a packed buffer and into a new tensor, by token, by position and by document; the way back."""
    from megallm_kernels.rope import rope, rope_

    tokens = place.pick(1037, 13)
    cos, sin = references.rope_tables(tokens, rotary // 2, place.device)
    packed = place.normal(tokens, heads + 2, dim, generator=generator)
    x = packed[:, :heads]
    positions = torch.randint(0, tokens, (tokens,), generator=generator, device=place.device)
    cut = tokens // 3
    cu_seqlens = torch.tensor([0, cut, cut, tokens], dtype=torch.int32, device=place.device)
    arange = torch.arange(tokens, device=place.device)
    sources: tuple[tuple[str, dict[str, Any], torch.Tensor], ...] = (
        ("token", {}, arange),
        ("positions", {"positions": positions}, positions),
        ("documents", {"cu_seqlens": cu_seqlens}, torch.where(arange < cut, arange, arange - cut)),
    )
    findings = []
    for name, settings, row in sources:
        expected = references.rope(x.double(), cos.double()[row], sin.double()[row])
        with poisoned():
            findings.append(compare(name, rope(x, cos, sin, **settings), expected))
        own = packed.clone()
        rope_(own[:, :heads], cos, sin, **settings)
        findings.append(compare(f"{name} in place", own[:, :heads], expected))
        findings.append(identical(f"{name} other heads", own[:, heads:], packed[:, heads:]))
        rope_(own[:, :heads], cos, sin, conjugate=True, **settings)
        findings.append(compare(f"{name} back", own[:, :heads], x, roundings=2))
    leaf = x.detach().clone().requires_grad_()
    dy = torch.randn_like(leaf)
    (dx,) = torch.autograd.grad(rope(leaf, cos, sin), leaf, dy)
    findings.append(compare("dx", dx, references.rope(dy.double(), cos.double(), -sin.double())))
    return findings


def _activation(place: Place, generator: torch.Generator, *, features: int, kind: str) -> list[Finding]:
    from megallm_kernels.activation import activation

    rows = place.pick(257, 3)
    findings = []
    for gated in (True, False):
        x = place.normal(rows, features * (2 if gated else 1), generator=generator) * 2.0
        dy = place.normal(rows, features, generator=generator)
        (leaf,) = references.wide(x)
        y = references.gated(leaf, kind) if gated else references.act(leaf, kind)
        (expected,) = torch.autograd.grad(y, leaf, dy.double())
        runs = []
        for _ in range(2):
            own = x.detach().clone().requires_grad_()
            with poisoned():
                out = activation(own, kind, gated)
                (dx,) = torch.autograd.grad(out, own, dy)
            runs.append((out, dx))
        label = "gated" if gated else "plain"
        # terms: exp and erf on a GPU are a few fp32 units off
        findings.append(compare(f"{label} y", runs[0][0], y, terms=64))
        findings.append(compare(f"{label} dx", runs[0][1], expected, terms=64))
        findings += [identical(f"{label} {n}", a, b) for n, a, b in zip(("y", "dx"), *runs, strict=True)]
    return findings
