"""RMSNorm and LayerNorm as they are launched: every row of the launch tables."""

from __future__ import annotations

from typing import Any

from megallm.testing.compiled_kernel import CompileCase
from megallm_kernels import norm

_POINTERS = {name: "*bf16" for name in ("x", "residual", "weight", "bias", "y", "new_residual", "dy")}
_POINTERS |= {name: "*bf16" for name in ("dnew_residual", "dx")}
_POINTERS |= {name: "*fp32" for name in ("mean", "rstd", "dweight", "dbias")}


def cases() -> list[CompileCase]:
    """Both passes of each table row; the residual form, which takes most registers; fp32 where rows are long.

    Not what spills: fp32 LayerNorm's backward and unaligned rows, both past 8192; see the tables.
    """
    sizes = [(size, False) for size in (128, 1024, 4096, 8192, 16384)] + [(8192, True)]
    out = [_case(size, backward, centered) for size, centered in sizes for backward in (False, True)]
    out += [_case(16384, True, True), _case(16384, True, False, dtype="fp32")]
    out += [_case(16384, False, True, dtype="fp32"), _case(4001, False, True), _case(4001, True, True)]
    for arch in (80, 90, 89):  # the stages depend on the shared memory
        out.append(_case(8192, True, True, dtype="fp32", arch=arch))
    return [*out, _apart_case(), _sum_case()]


def _apart_case() -> CompileCase:
    kernel: Any = norm.sums_kernel
    return CompileCase(
        name="layer_norm sums apart",
        kernel=kernel,
        signature={**{name: "i32" for name in kernel.arg_names}, **_POINTERS},
        constexprs={
            "ROWS": norm._APART_ROWS, "COLUMNS": norm._APART_COLUMNS, "CENTERED": True,
            **{name: 1 for name in kernel.arg_names if name.endswith("inner_rows")},
        },
        unaligned=("num_rows",),
    )  # fmt: skip


def _sum_case() -> CompileCase:
    return CompileCase(
        name="sum of partial rows",
        kernel=norm.sum_rows_kernel,
        signature={"partial": "*fp32", "out": "*bf16", "num_rows": "i32", "hidden": "i32"},
        constexprs={"ROWS": norm._SUM_ROWS, "COLUMNS": norm._SUM_COLUMNS},
        unaligned=("num_rows",),
    )


def _case(hidden_size: int, backward: bool, centered: bool, *, dtype: str = "bf16", arch: int = 0) -> CompileCase:
    """On both architectures, which share their settings, unless `arch` is given."""
    launch = norm.plan(
        hidden_size, backward=backward, arch=arch or 80, element_bytes=2 if dtype == "bf16" else 4, centered=centered
    )
    kernel: Any = norm.backward_kernel if backward else norm.forward_kernel
    constexprs = {"ROWS": launch.rows, "BLOCK": launch.block, "CENTERED": centered, "ADD": True}
    constexprs |= {name: 1 for name in kernel.arg_names if name.endswith("inner_rows")}
    if backward:
        constexprs |= {"NEEDS_DWEIGHT": not launch.sums_apart, "STAGES": launch.stages}
    types = {name: "i32" for name in kernel.arg_names}
    types |= {name: kind.replace("bf16", dtype) for name, kind in _POINTERS.items()}
    strides = [name for name in kernel.arg_names if name.endswith(("_outer", "_inner"))]
    direction = "backward" if backward else "forward"
    words = ["layer_norm" if centered else "rms_norm", direction, str(hidden_size)]
    words += [dtype] * (dtype != "bf16") + [f"sm_{arch}"] * (arch != 0)
    return CompileCase(
        name=" ".join(words),
        kernel=kernel,
        signature={**types, "eps": "fp32"},
        constexprs=constexprs,
        unaligned=("num_rows", *(("hidden", *strides) if hidden_size % 16 else ())),
        num_warps=launch.num_warps,
        arches=(arch,) if arch else (80, 90),
    )
