"""What is timed of the norms, RoPE and the activations, beside whom.

Letters: T tokens, H hidden, F features, N query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from gpu_parts import references
from gpu_parts.calls import (
    OURS,
    Buffers,
    Case,
    Contender,
    Direction,
    Directions,
    autograd_directions,
    backend_absent,
    compiled,
    differentiable,
    forced,
    needs,
)
from gpu_parts.place import Place

EPS = 1e-5


def norm_cases(place: Place, *, section: str, centered: bool) -> list[Case]:
    """Each hidden size, alone and after the residual addition; the commonest sizes first."""
    tokens = place.pick(8192, 4)
    sizes = (64,) if place.tiny else (4096, 8192, 2048, 16384)
    op = "layer_norm" if centered else "rms_norm"
    cases = []
    for hidden in sizes:
        for added in (False, True):
            element = place.dtype.itemsize
            elements = float(tokens * hidden)
            forward, backward = (4, 4) if added else (2, 3)
            cases.append(
                Case(
                    section=section, op=op, name=f"H {hidden}{' add' if added else ''}", size=-1 if added else hidden,
                    make=partial(_norm_buffers, tokens=tokens, hidden=hidden, centered=centered, added=added),
                    contenders=_norm_contenders(place, op, hidden, centered, added),
                    bytes_moved={
                        "fwd": forward * elements * element, "bwd": backward * elements * element,
                        "both": (forward + backward) * elements * element,
                    },
                    set_bytes=(4 if added else 2) * elements * element,
                )
            )  # fmt: skip
    return cases


def _norm_buffers(
    place: Place, generator: torch.Generator, count: int, *, tokens: int, hidden: int, centered: bool, added: bool
) -> list[Buffers]:
    """inputs: x, residual (if added), weight, bias (if centered)."""
    draw = partial(place.normal, generator=generator)
    weight = (draw(hidden) * 0.1 + 1).requires_grad_()
    rest = (weight, draw(hidden).requires_grad_()) if centered else (weight,)
    result = []
    for _ in range(count):
        rows = [draw(tokens, hidden).requires_grad_() for _ in range(2 if added else 1)]
        grads = tuple(draw(tokens, hidden) for _ in rows)
        result.append(Buffers(inputs=(*rows, *rest), grads=grads))
    return result


def _norm_contenders(place: Place, op: str, hidden: int, centered: bool, added: bool) -> tuple[Contender, ...]:
    def ours(*inputs: torch.Tensor) -> Any:
        from megallm_kernels.norm import add_norm, norm

        x, *rest = inputs
        bias = rest[-1] if centered else None
        if added:
            return add_norm(x, rest[0], rest[1], bias, EPS)[:2]
        return norm(x, rest[0], bias, EPS)[0]

    def of_backend(backends: Any, *inputs: torch.Tensor) -> Any:
        from megallm.ops.norm import add_norm, norm

        x, *rest = inputs
        bias = rest[-1] if centered else None
        if added:
            return add_norm(x, rest[0], rest[1], bias, EPS, backends=backends)
        return norm(x, rest[0], bias, EPS, backends=backends)

    def formula(*inputs: torch.Tensor) -> Any:
        x, *rest = inputs
        total = x + rest.pop(0) if added else x
        if centered:
            y = F.layer_norm(total, (hidden,), rest[0], rest[1], EPS)
        else:
            y = F.rms_norm(total, (hidden,), rest[0], EPS)
        return (y, total) if added else y

    names = ("torch", "apex") if centered else ("torch", "cuda", "apex")
    others = [
        differentiable(name, partial(of_backend, forced(op, name)), why_absent=backend_absent(op, name, place, hidden))
        for name in names
    ]
    liger_absent = _liger_norm_absent(centered, added)
    peers = [differentiable("liger", partial(_liger_norm, centered, added), why_absent=liger_absent)]
    if not centered:
        peers.append(differentiable("quack", partial(_quack_norm, added), why_absent=needs("quack")))
    return (differentiable(OURS, ours), compiled(formula), *others, *peers)


def _liger_norm_absent(centered: bool, added: bool) -> Any:
    if centered and added:
        return lambda: "has no fused addition"
    return needs("liger_kernel.ops")


def _liger_norm(centered: bool, added: bool, *inputs: torch.Tensor) -> Any:
    from liger_kernel import ops

    if centered:
        return ops.LigerLayerNormFunction.apply(*inputs, EPS)
    if added:
        return ops.LigerFusedAddRMSNormFunction.apply(*inputs, EPS, 0.0, "llama", False)
    return ops.LigerRMSNormFunction.apply(*inputs, EPS, 0.0, "llama", False)


def _quack_norm(added: bool, *inputs: torch.Tensor) -> Any:
    from quack import rmsnorm

    if added:
        return rmsnorm(inputs[0], inputs[2], residual=inputs[1], eps=EPS, prenorm=True)
    return rmsnorm(inputs[0], inputs[1], eps=EPS)


# -- RoPE -------------------------------------------------------------------------------------------------------------


def rope_cases(place: Place) -> list[Case]:
    """32 query and 8 key heads of D 128, slices of the packed qkv buffer with 8 value heads."""
    tokens, heads, kv_heads, dim = place.pick(8192, 6), place.pick(32, 4), place.pick(8, 2), place.pick(128, 16)
    moved = 2.0 * tokens * (heads + kv_heads) * dim * place.dtype.itemsize
    make = partial(_rope_buffers, tokens=tokens, heads=heads + kv_heads, values=kv_heads, dim=dim)
    contenders = (
        Contender(name=OURS, build=_rope_in_place, note="in place"),
        compiled(_rope_formula),
        *(
            differentiable(name, partial(_rope_backend, forced("rope", name)), note="into a new tensor",
                           why_absent=backend_absent("rope", name, place, dim))
            for name in ("torch", "cuda")
        ),
        Contender(name="liger", build=partial(_liger_rope, heads), why_absent=needs("liger_kernel.ops"),
                  note="q and k as two tensors"),
        Contender(name="quack", build=_quack_rope, why_absent=needs("quack.rotary"), note="into a new tensor"),
    )  # fmt: skip
    return [
        Case(
            section="rope", op="rope", name=f"heads {heads}/{kv_heads} D {dim}", size=dim, make=make,
            contenders=contenders, bytes_moved={"fwd": moved, "bwd": moved, "both": 2 * moved}, set_bytes=moved,
        )
    ]  # fmt: skip


def _rope_buffers(
    place: Place, generator: torch.Generator, count: int, *, tokens: int, heads: int, values: int, dim: int
) -> list[Buffers]:
    """inputs: q and k [T, N + K, D], a slice; constants cos, sin [T, D/2]."""
    cos, sin = references.rope_tables(tokens, dim // 2, place.device)
    result = []
    for _ in range(count):
        packed = place.normal(tokens, heads + values, dim, generator=generator)
        x = packed[:, :heads].detach().requires_grad_()
        grads = (place.normal(tokens, heads, dim, generator=generator),)
        result.append(Buffers(inputs=(x,), grads=grads, constants={"cos": cos, "sin": sin}))
    return result


def _rope_in_place(sets: Sequence[Buffers]) -> Directions:
    from megallm_kernels.rope import rope_

    views = [each.inputs[0].detach() for each in sets]

    def rotate(i: int, conjugate: bool) -> None:
        rope_(views[i], sets[i].constants["cos"], sets[i].constants["sin"], None, None, conjugate)

    def both(i: int) -> None:
        rotate(i, False)
        rotate(i, True)

    return {
        "fwd": Direction(call=lambda i: rotate(i, False)),
        "bwd": Direction(call=lambda i: rotate(i, True)),
        "both": Direction(call=both),
    }


def _rope_backend(backends: Any, x: torch.Tensor, *, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    from megallm.ops.rope import rope

    return rope(x, cos, sin, backends=backends)


def _rope_formula(x: torch.Tensor, *, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return references.rope(x, cos, sin).to(x.dtype)


def _liger_rope(heads: int, sets: Sequence[Buffers]) -> Directions:
    """Takes [B, heads, S, D] views of what lies as [B, S, heads, D], and tables of D columns."""
    from liger_kernel.ops import LigerRopeFunction

    def parts(x: torch.Tensor) -> list[torch.Tensor]:
        split = x.detach().split([heads, x.size(1) - heads], dim=1)
        return [part.contiguous().unsqueeze(0).transpose(1, 2) for part in split]

    own = []
    for each in sets:
        tables = [torch.cat([each.constants[name]] * 2, dim=-1).unsqueeze(0) for name in ("cos", "sin")]
        q, k = (part.requires_grad_() for part in parts(each.inputs[0]))
        own.append(Buffers(inputs=(q, k, *tables), grads=tuple(parts(each.grads[0]))))
    return autograd_directions(LigerRopeFunction.apply, own)


def _quack_rope(sets: Sequence[Buffers]) -> Directions:
    """Takes [B, S, heads, D] and tables in the dtype of x."""
    from quack.rotary import apply_rotary_emb

    own = []
    for each in sets:
        x = each.inputs[0].detach().unsqueeze(0).requires_grad_()
        tables = [each.constants[name].to(x.dtype) for name in ("cos", "sin")]
        own.append(Buffers(inputs=(x, *tables), grads=(each.grads[0].unsqueeze(0),)))
    return autograd_directions(apply_rotary_emb, own)


# -- activations ------------------------------------------------------------------------------------------------------


def activation_cases(place: Place, *, section: str, kinds: Sequence[str]) -> list[Case]:
    """[gate | up] of F 14336."""
    tokens, features = place.pick(8192, 3), place.pick(14336, 40)
    moved = float(tokens * features * place.dtype.itemsize)
    cases = []
    for kind in kinds:
        contenders = (
            differentiable(OURS, partial(_ours_gated, kind)),
            compiled(partial(_gated_formula, kind)),
            differentiable("torch", partial(_backend_gated, kind, forced("activation", "torch"))),
            Contender(name="liger", build=partial(_liger_gated, kind), why_absent=needs("liger_kernel.ops"),
                      note="gate and up as two tensors"),
        )  # fmt: skip
        make = partial(_gated_buffers, tokens=tokens, features=features)
        cases.append(
            Case(
                section=section, op="activation", name=f"{kind} F {features}", size=features if kind == "silu" else -1,
                make=make, contenders=contenders, set_bytes=2 * moved,
                bytes_moved={"fwd": 3 * moved, "bwd": 5 * moved, "both": 8 * moved},
            )
        )  # fmt: skip
    return cases


def _gated_buffers(
    place: Place, generator: torch.Generator, count: int, *, tokens: int, features: int
) -> list[Buffers]:
    return [
        Buffers(
            inputs=(place.normal(tokens, 2 * features, generator=generator).requires_grad_(),),
            grads=(place.normal(tokens, features, generator=generator),),
        )
        for _ in range(count)
    ]


def _ours_gated(kind: str, x: torch.Tensor) -> torch.Tensor:
    from megallm_kernels.activation import activation

    return activation(x, kind, True)


def _backend_gated(kind: Any, backends: Any, x: torch.Tensor) -> torch.Tensor:
    from megallm.ops.activation import gated

    return gated(x, kind, backends=backends)


def _gated_formula(kind: str, x: torch.Tensor) -> torch.Tensor:
    return references.gated(x, kind)


def _liger_gated(kind: str, sets: Sequence[Buffers]) -> Directions:
    from liger_kernel import ops

    function = ops.LigerSiLUMulFunction if kind == "silu" else ops.LigerGELUMulFunction
    halves = []
    for each in sets:
        gate, up = (half.detach().contiguous().requires_grad_() for half in each.inputs[0].chunk(2, dim=-1))
        halves.append(Buffers(inputs=(gate, up), grads=each.grads))
    return autograd_directions(function.apply, halves)
