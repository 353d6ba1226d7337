"""Attention's backward pass as it is launched: every row of the tables, and the forms that take most registers."""

from __future__ import annotations

from typing import Any

from megallm.testing.compiled_kernel import CompileCase
from megallm_kernels import attention_backward as planned
from megallm_kernels import attention_backward_kernels as kernels

_BYTES = {"bf16": 2, "fp32": 4}


def cases() -> list[CompileCase]:
    """D 64, 128 and 256 on both architectures; softcap and window where they take most; fp32 inputs.

    Not fp32 above D = 128, which spills: see the table.
    """
    out = []
    for head_dim in (64, 128, 256):
        out += [_keys(80, head_dim, deterministic=True), _queries(80, head_dim)]
        out += [_keys(90, head_dim, deterministic=each) for each in (True, False)] + [_queries(90, head_dim)]
    full = {"capped": True, "windowed": True}
    for deterministic in (True, False):
        out.append(_keys(90, 128, deterministic=deterministic, **full))
    out += [_keys(90, 256, deterministic=False, **full), _keys(80, 128, deterministic=True, **full)]
    out += [_keys(80, 64, deterministic=True, windowed=True)]
    out += [_queries(80, 128, windowed=True, capped=each) for each in (True, False)]
    out += [_queries(90, head_dim, **full) for head_dim in (32, 64, 128, 256)]
    for head_dim in (64, 128):
        out += [_keys(80, head_dim, deterministic=True, dtype="fp32"), _queries(80, head_dim, dtype="fp32")]
    out += [_keys(90, 64, deterministic=True, dtype="fp32", **full), _queries(90, 128, dtype="fp32", **full)]
    return [*out, _queries(89, 256, **full), _prepare(), _convert()]


def _keys(
    arch: int, head_dim: int, *, deterministic: bool, capped: bool = False, windowed: bool = False, dtype: str = "bf16"
) -> CompileCase:
    settings = planned.plan(
        arch, head_dim, element_bytes=_BYTES[dtype], deterministic=deterministic, capped=capped, windowed=windowed
    )
    form = {"CAPPED": capped, "WINDOWED": windowed, "ADD_DQ": settings.queries is None}
    return _attention(kernels.keys_kernel, settings, settings.keys, arch, head_dim, form, dtype)


def _queries(
    arch: int, head_dim: int, *, capped: bool = False, windowed: bool = False, dtype: str = "bf16"
) -> CompileCase:
    settings = planned.plan(
        arch, head_dim, element_bytes=_BYTES[dtype], deterministic=True, capped=capped, windowed=windowed
    )
    assert settings.queries is not None
    form = {"CAPPED": capped, "WINDOWED": windowed}
    return _attention(kernels.queries_kernel, settings, settings.queries, arch, head_dim, form, dtype)


def _attention(
    kernel: Any, settings: planned.Plan, launch: planned.Launch, arch: int, head_dim: int, form: dict[str, bool],
    dtype: str,
) -> CompileCase:  # fmt: skip
    m, n, d = launch.block_m, launch.block_n, settings.block_d
    signature = {name: "i32" for name in kernel.arg_names} | {"table": "*i32", "stats": "*fp32"}
    signature |= {name: f"*{dtype}" for name in ("q", "k", "v", "dout", "dq", "dk", "dv")}
    signature |= {name: "fp32" for name in ("scale", "softcap", "factor")}
    if kernel is kernels.keys_kernel:
        signature["dq"] = "*fp32"
    if launch.tma:
        signature |= {name: f"tensordesc<{dtype}[1,{m},{d}]>" for name in ("q", "dout")}
        signature |= {name: f"tensordesc<{dtype}[1,{n},{d}]>" for name in ("k", "v")}
        signature["stats"] = f"tensordesc<fp32[1,{m}]>"
        if form.get("ADD_DQ"):
            signature["dq"] = f"tensordesc<fp32[1,{d},{m}]>"
    constexprs = {"HEADS": 32, "GROUP": 4, "D": head_dim, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": d, "CAUSAL": True}
    constexprs |= {"PACKED": True, "TMA": launch.tma, "WARP_SPECIALIZE": launch.warp_specialize}
    constexprs |= {"STAGES": launch.num_stages, **form}
    words = [kernel.fn.__name__.removesuffix("_kernel"), dtype, str(head_dim), f"sm_{arch}"]
    words += [name for name in form if form[name]]
    return CompileCase(
        name=" ".join(words), kernel=kernel, signature=signature, constexprs=constexprs,
        unaligned=("num_queries", "num_keys", "num_sequences", "num_tiles", "section", "window", "pitch"),
        num_warps=launch.num_warps, num_stages=launch.num_stages, arches=(arch,), tensor_cores=dtype == "bf16",
        tma=launch.tma,
    )  # fmt: skip


def _rows(kernel: Any, pointers: dict[str, str], **form: bool) -> CompileCase:
    signature = {name: "i32" for name in kernel.arg_names} | {"factor": "fp32", "offsets": "*i32"} | pointers
    return CompileCase(
        name=kernel.fn.__name__.removesuffix("_kernel"), kernel=kernel, signature=signature,
        constexprs={"HEADS": 32, "D": 128, "BLOCK_D": 128, "ROWS": planned.ROWS, "PACKED": True, **form},
        unaligned=("num_queries", "num_sequences", "pitch"),
    )  # fmt: skip


def _prepare() -> CompileCase:
    floats = {name: "*fp32" for name in ("lse", "dlse", "stats")}
    return _rows(kernels.prepare_kernel, {"out": "*bf16", "dout": "*bf16", **floats}, HAS_DLSE=True)


def _convert() -> CompileCase:
    return _rows(kernels.convert_kernel, {"accumulator": "*fp32", "dq": "*bf16"})
