"""Grouped product kernels as they are launched: every row of the launch tables in bf16, forward and dx, and fp32."""

from __future__ import annotations

from typing import Any

from megallm.testing.compiled_kernel import CompileCase
from megallm_kernels import grouped_gemm as gg


def cases() -> list[CompileCase]:
    """Names: direction, average rows an expert, the table that is read."""
    pointers = [_rows(dx=dx, rows=rows, arch=80) for dx in (False, True) for rows in (32, 1024)]
    descriptors = [_rows(dx=dx, rows=rows, arch=90) for dx in (False, True) for rows in (32, 1024)]
    masked = _rows(dx=False, rows=1024, arch=80, even=False)
    wide = [_rows(dx=False, rows=1024, arch=80, dtype="fp32"), _dweight(80, dtype="fp32")]
    return [*pointers, *descriptors, masked, *wide, _dweight(80), _dweight(90)]


def _name(direction: str, launch: gg.Launch, *marks: str) -> str:
    tile = f"{launch.block_m}x{launch.block_n}x{launch.block_k}"
    return " ".join([direction, tile, "tma" if launch.tma else "pointers", *[m for m in marks if m]])


def _case(name: str, kernel: Any, launch: gg.Launch, pointers: dict[str, str], **constexprs: Any) -> CompileCase:
    constexprs |= {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "BLOCK_K": launch.block_k}
    return CompileCase(
        name=name,
        kernel=kernel,
        signature={**{n: "i32" for n in kernel.arg_names}, **pointers},
        constexprs=constexprs | {"SECTION": gg.SECTION, "TMA": launch.tma},
        unaligned=tuple(n for n in ("num_rows", "num_experts") if n in kernel.arg_names),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        arches=(90,) if launch.tma else (80, 90),
        tensor_cores=True,
        tma=launch.tma,
    )


def _plan(arch: int, rows: int, dtype: str, *, dweight: bool) -> gg.Launch:
    size = 4 if dtype == "fp32" else 2
    return gg.plan(arch, rows, dweight=dweight, element_bytes=size, aligned=True)


def _rows(*, dx: bool, rows: int, arch: int, even: bool = True, dtype: str = "bf16") -> CompileCase:
    launch = _plan(arch, rows, dtype, dweight=False)
    types = {name: f"*{dtype}" for name in ("x", "weight", "y")} | {"offsets": "*i32"}
    if launch.tma:
        box = (launch.block_k, launch.block_n) if dx else (launch.block_n, launch.block_k)
        types["x"] = f"tensordesc<{dtype}[{launch.block_m},{launch.block_k}]>"
        types["weight"] = f"tensordesc<{dtype}[1,{box[0]},{box[1]}]>"
    marks = ("" if even else "masked", "fp32" if dtype == "fp32" else "")
    name = _name("dx" if dx else "forward", launch, *marks)
    unit = {"w_n" if dx else "w_k": 1}
    return _case(name, gg.rows_kernel, launch, types, EVEN=even, K_MAJOR=not dx, **unit)


def _dweight(arch: int, dtype: str = "bf16") -> CompileCase:
    launch = _plan(arch, 0, dtype, dweight=True)
    types = {name: f"*{dtype}" for name in ("dy_tiles", "x_tiles", "dy", "x", "dweight")} | {"offsets": "*i32"}
    if launch.tma:
        types["dy_tiles"] = f"tensordesc<{dtype}[{launch.block_k},{launch.block_m}]>"
        types["x_tiles"] = f"tensordesc<{dtype}[{launch.block_k},{launch.block_n}]>"
    return _case(_name("dweight", launch, "fp32" if dtype == "fp32" else ""), gg.dweight_kernel, launch, types)
