"""Weights in 4 bits (NF4) to fp32, bf16 or fp16 in one pass.

    w = CODE[c] s      s one for 64 weights, or  s = CODE8[q] t + m  with q a byte for 64 and t one for 256 of those

Bytes a weight: reads 1/2 + 1/64 (double quantisation; 1/16 without), writes the result. The tables are 16 and 256
numbers, which stay in the L1 cache. Tiling: a program takes BLOCKS scales with their 64 weights, in the order they lie.
Every product and sum is rounded by itself (no fused multiply-add), so that the numbers are those of plain torch.
int64: a program's first block is widened before it meets a size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megallm_kernels.device import check_dtypes, on_its_device

BLOCKS, NUM_WARPS = 32, 4
"""2048 weights, 16 a thread: their bytes are one 8-byte load, and bf16 results two 16-byte stores. Not tuned yet."""


@triton.jit
def dequantize_kernel(
    out, codes, values, nested, offset, code, code8, size, first, per_row, stride,
    BLOCKS: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of out [size]; block b is number first + b // per_row stride + b % per_row of its matrix."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = block * 64 < size
    if DOUBLE:
        number = first + block // per_row * stride + block % per_row
        q = tl.load(values + block, mask=there, other=0).to(tl.int32)
        scale = tl.load(code8 + q) * tl.load(nested + number // 256, mask=there, other=0.0) + tl.load(offset)
    else:
        scale = tl.load(values + block, mask=there, other=0.0)
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    pair = tl.load(codes + byte, mask=byte * 2 < size, other=0).to(tl.int32)
    weights = tl.interleave(tl.load(code + (pair >> 4)), tl.load(code + (pair & 15))) * scale[:, None]
    place = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + place, weights.to(out.dtype.element_ty), mask=place < size)


@torch.library.custom_op("megallm_kernels::dequantize_nf4", mutates_args=("out",))
@on_its_device
def dequantize_(
    out: torch.Tensor,
    codes: torch.Tensor,
    values: torch.Tensor,
    nested: torch.Tensor | None,
    offset: torch.Tensor | None,
    code: torch.Tensor,
    code8: torch.Tensor,
    *,
    first: int,
    per_row: int,
    stride: int,
) -> None:
    """Writes the weights into out, contiguous.

    codes: uint8, two weights each. values: of every 64 weights, uint8 with `nested` and `offset`, else fp32.
    code [16], code8 [256]: fp32. first, per_row, stride: which blocks of the whole matrix these are, for `nested`.
    """
    check_dtypes(out=out)
    if not (out.is_contiguous() and codes.is_contiguous() and values.is_contiguous()):
        raise ValueError("NF4 weights are read and written in the order they lie: give contiguous tensors")
    blocks = triton.cdiv(out.numel(), 64)
    if codes.numel() != triton.cdiv(out.numel(), 2) or values.numel() != blocks:
        raise ValueError(
            f"{out.numel()} weights have {triton.cdiv(out.numel(), 2)} codes and {blocks} scales, "
            f"got {codes.numel()} and {values.numel()}"
        )
    if blocks:
        dequantize_kernel[(triton.cdiv(blocks, BLOCKS),)](
            out, codes, values, values if nested is None else nested, values if offset is None else offset, code,
            code8, out.numel(), first, per_row, stride, BLOCKS=BLOCKS, DOUBLE=nested is not None,
            num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
