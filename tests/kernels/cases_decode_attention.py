"""The kernels of decoding as they are launched: every row of the launch tables, with a window, in pages of 32."""

from __future__ import annotations

from typing import Any

from megallm.testing.compiled_kernel import CompileCase
from megallm_kernels import decode_attention as attention

_LENGTHS = ("num_cells", "window", "table_row", "num_chunks")


def cases() -> list[CompileCase]:
    """8 query heads of a kv head; one page a sequence; fp32; the sum of chunks."""
    out = [_attend(arch, dim) for arch in (80, 90) for dim in (64, 128, 256)]
    out += [_attend(80, 128, element="fp32"), _attend(90, 128, page=0), _attend(89, 128)]
    return [*out, _combine(128), _combine(256)]


def _attend(arch: int, dim: int, *, element: str = "bf16", page: int = 32) -> CompileCase:
    kernel: Any = attention.decode_kernel
    wide = element == "fp32"
    launch = attention.plan(arch, dim, group=8, num_cells=4096, element_bytes=4 if wide else 2)
    types = {name: "i32" for name in kernel.arg_names}
    types |= {name: f"*{element}" for name in ("q", "keys", "values")}
    types |= {"table": "*i64", "positions": "*i64", "outs": "*fp32", "stats": "*fp32", "scale": "fp32"}
    return CompileCase(
        name=f"D {dim} {element} page {page or 'whole'}, table of sm_{arch}",
        kernel=kernel,
        signature=types,
        constexprs={
            "HEADS": 32, "GROUP": 8, "D": dim, "PAGE": page, "CHUNK": launch.chunk, "BLOCK_G": launch.block_g,
            "BLOCK_N": launch.block_n, "BLOCK_D": launch.block_d, "WINDOWED": True,
        },
        unaligned=_LENGTHS,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        arches=(arch,),
    )  # fmt: skip


def _combine(dim: int) -> CompileCase:
    kernel: Any = attention.combine_kernel
    types = {name: "i32" for name in kernel.arg_names}
    return CompileCase(
        name=f"combine D {dim}",
        kernel=kernel,
        signature={**types, "outs": "*fp32", "stats": "*fp32", "positions": "*i64", "out": "*bf16"},
        constexprs={"HEADS": 32, "D": dim, "CHUNK": 128, "CHUNKS": 64, "BLOCK_S": 16, "BLOCK_D": dim},
        unaligned=("num_cells", "num_chunks"),
        num_warps=4,
    )
