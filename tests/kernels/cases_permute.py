"""Permutation kernels as they are launched: every row of the launch tables, 8 experts per token."""

from __future__ import annotations

from typing import Any

from megallm.testing.compiled_kernel import CompileCase
from megallm_kernels import permute

_POINTERS = {name: "*bf16" for name in ("x", "rows", "y", "dy", "drows")}
_POINTERS |= {name: "*i32" for name in ("source", "destination")}
_POINTERS |= {name: "*fp32" for name in ("weights", "dweights")}


def cases() -> list[CompileCase]:
    """Forward and backward of both operations, and the rows too long for one tile."""
    return [
        _case("permute 512", permute.permute_kernel, 512),
        _case("permute 4096", permute.permute_kernel, 4096),
        _case("unpermute 4096", permute.unpermute_kernel, 4096, WEIGHTED=True),
        _case("permute backward 4096", permute.unpermute_kernel, 4096, WEIGHTED=False),
        *(_case(f"unpermute backward {h}", permute.unpermute_backward_kernel, h) for h in (512, 4096, 7168, 16384)),
    ]


def _case(name: str, kernel: Any, hidden_size: int, **constexprs: Any) -> CompileCase:
    backward = kernel is permute.unpermute_backward_kernel
    launch = permute.plan(hidden_size, backward=backward)
    constexprs |= {"K": 8, "ROWS": launch.rows, "BLOCK": launch.block}
    if "FILL" in kernel.arg_names:
        constexprs["FILL"] = permute.FILL
    if backward:
        constexprs |= {"BLOCKS": -(-hidden_size // launch.block), "NEEDS_DWEIGHTS": True}
    return CompileCase(
        name=name,
        kernel=kernel,
        signature={**{name: "i32" for name in kernel.arg_names}, **_POINTERS},
        constexprs=constexprs,
        unaligned=tuple(n for n in ("num_tokens", "num_rows") if n in kernel.arg_names),
        num_warps=launch.num_warps,
    )
