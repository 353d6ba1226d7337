"""Activations as they are launched on rows of an MLP."""

from __future__ import annotations

from typing import Any

from megallm.testing.compiled_kernel import CompileCase
from megallm_kernels import activation


def cases() -> list[CompileCase]:
    """Both passes of each kind, gated; the plain form once; a short row once."""
    gated = [_case(kind, True, 14336, back) for kind in activation.KINDS for back in (False, True)]
    return [*gated, _case("gelu", False, 8192, False), _case("gelu", False, 8192, True), _case("silu", True, 512, True)]


def _case(kind: str, gated: bool, features: int, backward: bool) -> CompileCase:
    block, num_warps = activation.plan(features)
    kernel: Any = activation.backward_kernel if backward else activation.forward_kernel
    constexprs = {"BLOCK": block, "KIND": kind, "GATED": gated}
    pointers = {"x": "*bf16", "y": "*bf16", "dy": "*bf16", "dx": "*bf16"}
    return CompileCase(
        name=f"{kind}{' gated' if gated else ''} {'backward' if backward else 'forward'} {features}",
        kernel=kernel,
        signature={name: pointers.get(name, "i32") for name in kernel.arg_names if name not in constexprs},
        constexprs=constexprs,
        num_warps=num_warps,
    )
