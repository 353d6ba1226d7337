"""RMSNorm and LayerNorm as they are launched: every row of the launch tables."""

from __future__ import annotations

from typing import Any

from megallm.testing.compiled_kernel import CompileCase
from megallm_kernels import norm

_POINTERS = {name: "*bf16" for name in ("x", "residual", "weight", "bias", "y", "new_residual", "dy")}
_POINTERS |= {name: "*bf16" for name in ("dnew_residual", "dx")}
_POINTERS |= {name: "*fp32" for name in ("mean", "rstd", "dweight", "dbias")}


def cases() -> list[CompileCase]:
    """Both passes of each table row; the residual form, which takes most registers."""
    sizes = [(size, False) for size in (128, 1024, 4096, 8192, 16384)] + [(8192, True)]
    both = [_case(size, backward, centered) for size, centered in sizes for backward in (False, True)]
    return [*both, _sum_case()]


def _sum_case() -> CompileCase:
    return CompileCase(
        name="sum of partial rows",
        kernel=norm.sum_rows_kernel,
        signature={"partial": "*fp32", "out": "*bf16", "num_rows": "i32", "hidden": "i32"},
        constexprs={"ROWS": norm._SUM_ROWS, "COLUMNS": norm._SUM_COLUMNS},
        unaligned=("num_rows",),
    )


def _case(hidden_size: int, backward: bool, centered: bool) -> CompileCase:
    launch = norm.plan(hidden_size, backward=backward)
    kernel: Any = norm.backward_kernel if backward else norm.forward_kernel
    constexprs = {"ROWS": launch.rows, "BLOCK": launch.block, "CENTERED": centered, "ADD": True}
    constexprs |= {name: 1 for name in kernel.arg_names if name.endswith("inner_rows")}
    if backward:
        constexprs |= {"NEEDS_DWEIGHT": True, "STAGES": launch.stages}
    integers = {name: "i32" for name in kernel.arg_names}
    direction = "backward" if backward else "forward"
    return CompileCase(
        name=f"{'layer_norm' if centered else 'rms_norm'} {direction} {hidden_size}",
        kernel=kernel,
        signature={**integers, **_POINTERS, "eps": "fp32"},
        constexprs=constexprs,
        unaligned=("num_rows",),
        num_warps=launch.num_warps,
    )
