"""Rotary embedding as it is launched: the head dims of common models, in place in the packed buffer."""

from __future__ import annotations

from megallm.testing.compiled_kernel import CompileCase
from megallm_kernels import rope


def cases() -> list[CompileCase]:
    """Each head dim with the token as position; one with positions, one with document offsets."""
    return [_case(dim, 0) for dim in (64, 80, 128, 256)] + [_case(128, 1), _case(128, 2)]


def _case(head_dim: int, source: int) -> CompileCase:
    launch = rope.plan(40, head_dim)
    pointers = {"x": "*bf16", "out": "*bf16", "cos": "*fp32", "sin": "*fp32", "positions": "*i64", "cu_seqlens": "*i32"}
    sizes = ("num_tokens", "num_heads", "num_documents", "num_rows")
    return CompileCase(
        name=f"rope {head_dim} from {('token', 'positions', 'cu_seqlens')[source]}",
        kernel=rope.rope_kernel,
        signature={**pointers, **{name: "i32" for name in (*sizes, "x_token", "x_head", "out_token", "out_head")}},
        constexprs={
            "half": head_dim // 2, "TOKENS": launch.tokens, "HEADS": launch.heads, "HALF": launch.half,
            "ROW_SOURCE": source, "CONJUGATE": False,
        },
        unaligned=sizes,
        num_warps=launch.num_warps,
    )  # fmt: skip
