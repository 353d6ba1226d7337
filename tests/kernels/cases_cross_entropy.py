"""The cross-entropy kernels as they are launched: short, middle and long rows; the fp32 form of the long ones."""

from __future__ import annotations

from typing import Any

from megallm.testing.compiled_kernel import CompileCase
from megallm_kernels import cross_entropy_kernels as kernels
from megallm_kernels.linear_cross_entropy_chunks import scale_kernel

_FP32 = ("row_max", "sums", "lse", "entropy", "loss", "dloss", "dlse", "dentropy")
_POINTERS = {**{name: "*fp32" for name in _FP32}, "labels": "*i64"}
_FLOATS = {name: "fp32" for name in ("label_smoothing", "vocab_size", "z_loss")}
_UNALIGNED = ("num_rows", "first_column", "valid_columns", "ignore_index", "sums_stride")
_UNIT_STRIDES = ("label_stride", "dlse_stride", "dentropy_stride", "dloss_stride")


def cases() -> list[CompileCase]:
    """One case for each kind of tile."""
    return [
        _case(kernels.statistics_kernel, 256, entropy=True),
        _case(kernels.statistics_kernel, 16384),
        _case(kernels.statistics_kernel, 131072),
        _case(kernels.statistics_kernel, 131072, entropy=True),
        _case(kernels.statistics_kernel, 131072, dtype="fp32", entropy=True),
        _case(kernels.gradient_kernel, 256, entropy=True),
        _case(kernels.gradient_kernel, 131072),
        _case(kernels.gradient_kernel, 131072, dtype="fp32", entropy=True),
        _losses(),
        _scale(),
    ]


def _case(kernel: Any, columns: int, *, dtype: str = "bf16", entropy: bool = False) -> CompileCase:
    gradient = kernel is kernels.gradient_kernel
    launch = kernels.plan(columns, arch=90, gradient=gradient)
    constexprs: dict[str, Any] = {"ROWS": launch.rows, "BLOCK": launch.block}
    if gradient:
        constexprs |= {"DLSE": entropy, "DENTROPY": entropy}
    else:
        constexprs |= {"VECTOR": 8 if dtype == "bf16" else 4, "ENTROPY": entropy}
    constexprs |= {name: 1 for name in _UNIT_STRIDES if name in kernel.arg_names}
    logits = {"logits": f"*{dtype}", "dlogits": f"*{dtype}"}
    return CompileCase(
        name=f"{'gradient' if gradient else 'statistics'} {dtype} {columns}{' with entropy' if entropy else ''}",
        kernel=kernel,
        signature={**{name: "i32" for name in kernel.arg_names}, **_POINTERS, **_FLOATS, **logits},
        constexprs=constexprs,
        unaligned=tuple(name for name in _UNALIGNED if name in kernel.arg_names),
        num_warps=launch.num_warps,
    )


def _losses() -> CompileCase:
    kernel: Any = kernels.losses_kernel
    return CompileCase(
        name="losses",
        kernel=kernel,
        signature={**{name: "i32" for name in kernel.arg_names}, **_POINTERS, **_FLOATS},
        constexprs={"BLOCK": 256, "SMOOTH": True, "ENTROPY": True, "label_stride": 1},
        unaligned=tuple(name for name in _UNALIGNED if name in kernel.arg_names),
    )


def _scale() -> CompileCase:
    return CompileCase(
        name="scale",
        kernel=scale_kernel,
        signature={"x": "*bf16", "factor": "*fp32", "num_elements": "i64"},
        constexprs={"BLOCK": 4096},
        num_warps=8,
    )
