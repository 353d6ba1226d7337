"""Dequantising as it is launched: with and without double quantisation, to each dtype."""

from __future__ import annotations

from megallm.testing.compiled_kernel import CompileCase
from megallm_kernels import nf4


def cases() -> list[CompileCase]:
    """Every form."""
    return [_case(dtype, double) for dtype in ("bf16", "fp32") for double in (True, False)]


def _case(dtype: str, double: bool) -> CompileCase:
    pointers = {"out": f"*{dtype}", "codes": "*u8", "values": "*u8" if double else "*fp32"}
    pointers |= {"nested": "*fp32", "offset": "*fp32"}
    pointers |= {"code": "*fp32", "code8": "*fp32"}
    constexprs = {"BLOCKS": nf4.BLOCKS, "DOUBLE": double}
    names = nf4.dequantize_kernel.arg_names
    return CompileCase(
        name=f"{dtype}{' double' if double else ''}",
        kernel=nf4.dequantize_kernel,
        signature={name: pointers.get(name, "i32") for name in names if name not in constexprs},
        constexprs=constexprs,
        num_warps=nf4.NUM_WARPS,
        options={"enable_fp_fusion": False},
        unaligned=("first", "per_row", "stride"),
    )
