"""Rotary position embedding (Su et al., arXiv 2104.09864), in place or into a new tensor.

    y1 = x1 cos - x2 sin       x = [x1 | x2 | rest], x1 and x2 of R/2 elements; rest (D - R, partial rotary) stays
    y2 = x2 cos + x1 sin       row of the tables: the token itself, positions[token], or token - start of its document

Backward is the rotation by the opposite angle: the same kernel with sin negated (CONJUGATE).

Bytes per element in bf16: 4 in place (the tables, shared by all heads, come from L2).
Tiling: a program holds TOKENS x HEADS x R/2 pairs, eight heads at most, which share the table rows it loads; x may be a
slice of the packed qkv buffer (any strides of tokens and heads). The arithmetic is fp32, rounded once at the store.
A row that the tables do not have gives NaN, not what lies behind them in memory.
int64: token numbers are widened before they meet a stride.

Letters: T tokens, h heads, D head dim, R rotary dim, P rows of the tables, B documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from megallm_kernels.device import check_dtypes, on_its_device
from megallm_kernels.rows import next_power_of_2


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Settings of one launch."""

    tokens: int
    """Tokens of a program (TOKENS), a power of two."""
    heads: int
    """Heads of a program (HEADS), a power of two."""
    half: int
    """Pairs of a head (HALF), the power of two at or above R/2."""
    num_warps: int = 4


_TILE_PAIRS = 2048
"""Pairs a program rotates: 16 for each of 128 threads, two 16-byte accesses of each half."""
_MAX_HEADS = 8


def plan(num_heads: int, rotary_dim: int) -> Launch:
    """Launch settings for h heads of R rotated elements."""
    half = next_power_of_2(rotary_dim // 2)
    heads = min(next_power_of_2(num_heads), _MAX_HEADS)
    return Launch(tokens=max(_TILE_PAIRS // (heads * half), 1), heads=heads, half=half)


@triton.jit(do_not_specialize=["num_tokens", "num_documents", "num_rows"])
def rope_kernel(
    x, out, cos, sin, positions, cu_seqlens, num_tokens, num_heads, num_documents, num_rows,
    x_token, x_head, out_token, out_head,
    half: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, ROW_SOURCE: tl.constexpr,
    CONJUGATE: tl.constexpr,
):  # fmt: skip
    """ROW_SOURCE: 0 = the token, 1 = positions, 2 = cu_seqlens. half = R/2, the tables' row length: as a constant, it
    lets the compiler prove that second halves are aligned (R/2 = 40 is a multiple of 8, not of 16).
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    is_pair = pair < half
    inside = (is_token[:, None] & is_pair[None, :])[:, None, :] & (head < num_heads)[None, :, None]
    at = (token * x_token)[:, None, None] + (head.to(tl.int64) * x_head)[None, :, None] + pair[None, None, :]
    x1 = tl.load(x + at, mask=inside, other=0.0)  # on their way while the angles are looked up
    x2 = tl.load(x + at + half, mask=inside, other=0.0)
    row = token
    if ROW_SOURCE == 1:
        row = tl.load(positions + token, mask=is_token, other=0).to(tl.int64)
    if ROW_SOURCE == 2:  # the last document that starts at or before the token; tokens past the end count on
        first = tl.zeros([TOKENS], dtype=tl.int32)
        last = tl.zeros([TOKENS], dtype=tl.int32) + (num_documents - 1)
        width = num_documents
        while width > 1:
            middle = (first + last + 1) // 2
            starts_before = tl.load(cu_seqlens + middle, mask=first < last, other=0) <= token
            first = tl.where((first < last) & starts_before, middle, first)
            last = tl.where((first < last) & (starts_before == 0), middle - 1, last)
            width = (width + 1) // 2
        row = token - tl.load(cu_seqlens + first)
    at = row[:, None] * half + pair[None, :]
    known = (is_token & (row >= 0) & (row < num_rows))[:, None] & is_pair[None, :]
    c = tl.load(cos + at, mask=known, other=float("nan")).to(tl.float32)[:, None, :]
    s = tl.load(sin + at, mask=known, other=float("nan")).to(tl.float32)[:, None, :]
    if CONJUGATE:
        s = -s
    x1 = x1.to(tl.float32)
    x2 = x2.to(tl.float32)
    at = (token * out_token)[:, None, None] + (head.to(tl.int64) * out_head)[None, :, None] + pair[None, None, :]
    tl.store(out + at, (x1 * c - x2 * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + half, (x2 * c + x1 * s).to(out.dtype.element_ty), mask=inside)


@on_its_device
def launch_rope(
    x: torch.Tensor, out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, *, conjugate: bool,
) -> None:  # fmt: skip
    """Writes the first R = 2 cos.size(1) elements of every head of x [T, h, D], rotated, into out (which may be x).

    Both with unit stride along D. cos, sin [P, R/2] contiguous; ValueError if their shapes do not fit.
    """
    _check(x, cos, sin, positions, cu_seqlens)
    num_tokens, num_heads, _ = x.shape
    if x.numel() == 0 or cos.size(1) == 0:
        return
    positions, cu_seqlens = (None if t is None else t.contiguous() for t in (positions, cu_seqlens))
    launch = plan(num_heads, 2 * cos.size(1))
    source = 1 if positions is not None else 2 if cu_seqlens is not None else 0
    rope_kernel[(triton.cdiv(num_tokens, launch.tokens), triton.cdiv(num_heads, launch.heads))](
        x, out, cos, sin, cos if positions is None else positions, cos if cu_seqlens is None else cu_seqlens,
        num_tokens, num_heads, 0 if cu_seqlens is None else cu_seqlens.numel() - 1, cos.size(0),
        x.stride(0), x.stride(1), out.stride(0), out.stride(1), half=cos.size(1),
        TOKENS=launch.tokens, HEADS=launch.heads, HALF=launch.half, ROW_SOURCE=source, CONJUGATE=conjugate,
        num_warps=launch.num_warps,
    )  # fmt: skip


def _check(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:  # fmt: skip
    if x.dim() != 3 or cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.size(1) > x.size(2):
        shapes = f"x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        raise ValueError(f"rope takes x [tokens, heads, head_dim], equal tables [rows, rotary_dim / 2], got {shapes}")
    check_dtypes(x=x, cos=cos, sin=sin)
    for name, numbers in (("positions", positions), ("cu_seqlens", cu_seqlens)):
        if numbers is not None and numbers.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} are {numbers.dtype}: rope takes int32 and int64")
    if positions is not None and cu_seqlens is not None:
        raise ValueError("rope takes positions or cu_seqlens, not both")
    if positions is None and cu_seqlens is None and cos.size(0) < x.size(0):
        raise ValueError(f"rope's tables have {cos.size(0)} rows for {x.size(0)} tokens: give positions or more rows")
    others = [t for t in (cos, sin, positions, cu_seqlens) if t is not None and t.device != x.device]
    if others:
        raise ValueError(f"rope's x is on {x.device}, the tables or positions on {others[0].device}: move them")
    if positions is not None and positions.shape != x.shape[:1]:
        raise ValueError(f"positions {tuple(positions.shape)} do not match {x.size(0)} tokens")


@torch.library.custom_op("megallm_kernels::rope", mutates_args=())
def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None, conjugate: bool = False,
) -> torch.Tensor:  # fmt: skip
    """x [T, h, D] rotated, a new contiguous tensor. Differentiable in x."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rotary_dim = 2 * cos.size(-1)
    if rotary_dim < x.size(-1):
        out[..., rotary_dim:] = x[..., rotary_dim:]
    launch_rope(x, out, cos.contiguous(), sin.contiguous(), positions, cu_seqlens, conjugate=conjugate)
    return out


@torch.library.custom_op("megallm_kernels::rope_", mutates_args=("x",))
def rope_(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None, conjugate: bool = False,
) -> None:  # fmt: skip
    """Rotates x [T, h, D] in place; unit stride along D. Not differentiable: the caller's Function undoes it."""
    if x.stride(-1) != 1 and x.size(-1) > 1:
        raise ValueError(f"rope_ needs unit stride along head_dim, got strides {tuple(x.stride())}: use rope")
    if x.numel() and _overlaps(x):
        raise ValueError(f"rope_ would rotate elements of x twice, strides {tuple(x.stride())} overlap: use rope")
    launch_rope(x, x, cos.contiguous(), sin.contiguous(), positions, cu_seqlens, conjugate=conjugate)


def _overlaps(x: torch.Tensor) -> bool:
    """Whether elements of x [T, h, D] may share memory: a stride is shorter than what lies inside it."""
    reach = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


@rope.register_fake
def _rope_fake(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None, conjugate: bool = False,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape)


@rope_.register_fake
def _rope_in_place_fake(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None, conjugate: bool = False,
) -> None:  # fmt: skip
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, cos, sin, positions, cu_seqlens, ctx.conjugate = inputs
    ctx.save_for_backward(cos, sin, positions, cu_seqlens)


def _rope_grad(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    cos, sin, positions, cu_seqlens = ctx.saved_tensors
    return rope(dy, cos, sin, positions, cu_seqlens, not ctx.conjugate), None, None, None, None, None


rope.register_autograd(_rope_grad, setup_context=_save)
