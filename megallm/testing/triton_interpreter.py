"""Triton's CPU interpreter with bf16 made right, for tests.

The interpreter keeps bf16 numbers as their 16-bit patterns: `tl.dot` multiplies the patterns, and casts from fp32 cut
the low bits off. `repair_bf16` makes dot widen first and casts round to nearest even, as the hardware does; arithmetic
on bf16 stays wrong there, which is why kernels widen right after a load (`tl.dot` alone takes bf16).
"""

from __future__ import annotations

from typing import Any

import numpy as np


def repair_bf16() -> None:
    """Patches the interpreter of this process, once; call it before a kernel runs."""
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "rounds_bf16", False):
        return
    builder.rounds_bf16 = True
    tl, handle = interpreter.tl, interpreter.TensorHandle
    dot, cast, convert = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def widened(tensor: Any) -> Any:
        if tensor.dtype.scalar != tl.bfloat16:
            return tensor
        return handle((tensor.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == tl.float32 and after == tl.bfloat16:
            return handle(_round_to_bf16(source.data), tl.bfloat16)
        if before == tl.bfloat16 and after == tl.float32:
            return widened(source)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            return cast_impl(self, source, target)
        return convert(self, source, target, rounding_mode)

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp


def _round_to_bf16(numbers: np.ndarray) -> np.ndarray:
    """fp32 -> the uint16 patterns of the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)
