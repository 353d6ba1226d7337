"""The attention forward kernel as it is launched: every row of the launch tables, with every feature at once."""

from __future__ import annotations

from typing import Any

from megallm.testing.compiled_kernel import CompileCase
from megallm_kernels import attention_forward as attention

_LENGTHS = ("num_queries", "num_keys", "num_sequences", "num_tiles", "section", "window")


def cases() -> list[CompileCase]:
    """Packed documents with a window and a softcap, which take most registers; causal alone, as in training."""
    out = [_case(arch, head_dim, True) for arch in (80, 90) for head_dim in (64, 128, 256)]
    out += [_case(80, head_dim, True, wide=True) for head_dim in (16, 64, 128, 256)]
    out.append(_case(90, 64, True, wide=True))
    out += [_case(80, 128, False), _case(90, 128, False), _case(90, 80, False)]
    return [*out, _case(89, 256, True)]


def _case(arch: int, head_dim: int, full: bool, *, wide: bool = False) -> CompileCase:
    kernel: Any = attention.forward_kernel
    element = "fp32" if wide else "bf16"
    launch = attention.plan(arch, head_dim, element_bytes=4 if wide else 2)
    source = f"tensordesc<{element}[1,{launch.block_n},{launch.block_d}]>" if launch.tma else f"*{element}"
    types = {name: "i32" for name in kernel.arg_names}
    types |= {"q": f"*{element}", "k": source, "v": source, "out": f"*{element}", "lse": "*fp32", "table": "*i32"}
    what = "packed, window, softcap" if full else "causal"
    return CompileCase(
        name=f"D {head_dim} {element} {what}, table of sm_{arch}",
        kernel=kernel,
        signature={**types, "scale": "fp32", "softcap": "fp32"},
        constexprs={
            "HEADS": 32, "GROUP": 4, "D": head_dim, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n,
            "BLOCK_D": launch.block_d, "CAUSAL": True, "WINDOWED": full, "CAPPED": full, "PACKED": full,
            "TMA": launch.tma, "WARP_SPECIALIZE": launch.warp_specialize,
        },
        unaligned=_LENGTHS,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        arches=(arch,),
        tensor_cores=not wide,
        tma=launch.tma,
    )  # fmt: skip
