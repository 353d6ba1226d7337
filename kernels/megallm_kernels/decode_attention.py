"""Attention of one new token a sequence to a cache in pages: what a step of decoding does in every layer.

    s = scale q k^T over the cells that the sequence sees;  out = softmax(s) v

The cache: pools of keys and values [pages, K, page cells, D]; table [B, P], the pages of each sequence in order; the
key of position p lies in cell p mod R, R = P x page cells. A sequence at position `at` sees the cells of positions
at - window + 1 .. at; without a window, of all up to `at`.

It is bound by reading keys and values: 4 K D bytes a cell in bf16, once, for all query heads of a kv head together
(fewer than 16 are filled up, which the tensor cores need). A sequence is cut into chunks of cells, a program each, so
that a long one occupies the whole GPU (FlashDecoding, Dao and others, 2023); each leaves a maximum, a sum and an output
without division, in fp32, and a second kernel combines them, in order. Chunks depend on R alone, so no sequence's bits
depend on what is beside it. The grid follows from sizes of buffers, never from what is in them: programs beyond a
sequence's end return at once, and a launch can be captured in a CUDA graph.

Scores, maximum, sum and output accumulate in fp32; p is rounded to v's dtype for the second product; fp32 inputs are
multiplied as three tf32 products. int64: rows and pages are widened before they meet a stride.

Letters: B sequences, N query heads, K kv heads (head n reads n // (N / K)), G = N / K, D head dim, P pages a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megallm_kernels.attention_tiles import LOG2_E, columns_of, family
from megallm_kernels.device import check_dtypes, on_its_device, target_of
from megallm_kernels.rows import next_power_of_2

MAX_CHUNKS = 64
"""Of a sequence: what the second kernel takes at a time."""
_CHUNK = 128
"""Cells of a chunk, where that makes no more than MAX_CHUNKS; else doubled until it does."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Settings of one launch."""

    block_g: int
    """Query heads of a tile: a power of two, at least 16."""
    block_n: int
    """Cells of a tile."""
    block_d: int
    """Columns of a tile: the power of two at or above D, at least 16."""
    chunk: int
    """Cells of a program, a multiple of block_n."""
    num_chunks: int
    """Programs of a sequence and kv head."""
    num_warps: int
    num_stages: int


# family -> largest BLOCK_D -> (BLOCK_N, warps, stages), for two-byte elements; fp32 takes half of BLOCK_N.
_TABLE: dict[int, dict[int, tuple[int, int, int]]] = {
    0: {256: (32, 4, 1)},
    80: {64: (64, 4, 3), 128: (64, 4, 3), 256: (32, 4, 3)},
    86: {64: (64, 4, 2), 128: (64, 4, 2), 256: (32, 4, 2)},
    90: {64: (64, 4, 3), 128: (64, 4, 3), 256: (32, 4, 3)},
}


def plan(arch: int, head_dim: int, *, group: int, num_cells: int, element_bytes: int) -> Launch:
    """Launch settings; ValueError if D is too large or the GPU too old."""
    block_d, key = columns_of(head_dim), family(arch)
    block_n, num_warps, num_stages = next(row for largest, row in _TABLE[key].items() if block_d <= largest)
    if element_bytes > 2 and key:
        block_n, num_stages = block_n // 2, 2
    chunk = _CHUNK
    while chunk * MAX_CHUNKS < num_cells:
        chunk *= 2
    return Launch(
        block_g=max(next_power_of_2(group), 16), block_n=block_n, block_d=block_d, chunk=chunk,
        num_chunks=triton.cdiv(num_cells, chunk), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


@triton.jit
def _used(position, num_cells):
    """Cells, from the first one on, that a sequence at this position has written."""
    return tl.minimum(position + 1, num_cells).to(tl.int32)


@triton.jit(do_not_specialize=["num_cells", "window", "table_row", "num_chunks"])
def decode_kernel(
    q, keys, values, table, positions, outs, stats,
    q_row, q_head, page_stride, head_stride, table_row, num_cells, window, num_chunks, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, kv heads, sequences): outs [B, N, chunks, D] fp32, not divided; stats [2, B, N, chunks] fp32, the
    maximum in base 2 and the sum. PAGE: cells of a page; 0: one page holds a sequence. Chunks of no cell write nothing.
    """
    chunk = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    at = tl.load(positions + row)
    used = _used(at, num_cells)
    low = chunk * CHUNK
    if low >= used:
        return
    high = tl.minimum(low + CHUNK, used)
    precision: tl.constexpr = "tf32x3" if q.dtype.element_ty == tl.float32 else "tf32"
    scale = tl.cast(scale, tl.float32)
    member = tl.arange(0, BLOCK_G)
    column = tl.arange(0, BLOCK_D)
    inside = (member < GROUP)[:, None] & (column < D)[None, :]
    head = kv_head * GROUP + member
    queries = tl.load(q + row * q_row + head[:, None] * q_head + column[None, :], mask=inside, other=0.0)
    pages = table + row * table_row
    first_page = tl.load(pages).to(tl.int64) * page_stride + kv_head.to(tl.int64) * head_stride
    acc = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_G], dtype=tl.float32)
    largest = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    for first in tl.range(low, high, BLOCK_N):
        cell = first + tl.arange(0, BLOCK_N)
        there = cell < high
        if PAGE == 0:
            place = first_page + cell.to(tl.int64) * D
        else:
            page = tl.load(pages + cell // PAGE, mask=there, other=0).to(tl.int64)
            place = page * page_stride + kv_head.to(tl.int64) * head_stride + (cell % PAGE) * D
        where = place[:, None] + column[None, :]
        readable = there[:, None] & (column < D)[None, :]
        k = tl.load(keys + where, mask=readable, other=0.0)
        s = tl.dot(queries, k.T, input_precision=precision) * scale
        seen = there
        if WINDOWED:  # its newest position may be older than the window, in cells that the ring has not yet reused
            age = ((at - cell) % num_cells + num_cells) % num_cells
            seen = seen & (age < window)
        s = tl.where(seen[None, :], s, float("-inf"))
        new = tl.maximum(largest, tl.max(s, axis=1))
        below = tl.where(new == float("-inf"), 0.0, new)  # exp2(-inf - 0) = 0 instead of exp2(-inf + inf)
        p = tl.exp2(s - below[:, None])
        shrink = tl.exp2(largest - below)
        total = total * shrink + tl.sum(p, axis=1)
        v = tl.load(values + where, mask=readable, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=precision)
        largest = new
    result = (row * HEADS + head) * num_chunks + chunk
    tl.store(outs + result[:, None] * D + column[None, :], acc, mask=inside)
    num_stats = tl.num_programs(2).to(tl.int64) * HEADS * num_chunks
    tl.store(stats + result, largest, mask=member < GROUP)
    tl.store(stats + num_stats + result, total, mask=member < GROUP)


@triton.jit(do_not_specialize=["num_cells", "num_chunks"])
def combine_kernel(
    outs, stats, positions, out, num_cells, num_chunks,
    HEADS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (query heads, sequences): out [B, N, D] of the chunks that have cells. CHUNKS: the power of two above."""
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    used = tl.cdiv(_used(tl.load(positions + row), num_cells), CHUNK)
    first = (row * HEADS + head) * num_chunks
    num_stats = tl.num_programs(1).to(tl.int64) * HEADS * num_chunks
    chunk = tl.arange(0, CHUNKS)
    maxima = tl.load(stats + first + chunk, mask=chunk < used, other=float("-inf"))
    largest = tl.max(maxima, axis=0)
    sums = tl.load(stats + num_stats + first + chunk, mask=chunk < used, other=0.0)
    total = tl.sum(sums * tl.exp2(maxima - largest), axis=0)
    column = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in tl.range(0, used, BLOCK_S):
        part = start + tl.arange(0, BLOCK_S)
        maximum = tl.load(stats + first + part, mask=part < used, other=float("-inf"))
        mask = (part < used)[:, None] & (column < D)[None, :]
        partial = tl.load(outs + (first + part)[:, None] * D + column[None, :], mask=mask, other=0.0)
        acc += tl.sum(partial * tl.exp2(maximum - largest)[:, None], axis=0)
    result = (acc / total).to(out.dtype.element_ty)
    tl.store(out + (row * HEADS + head) * D + column, result, mask=column < D)


@on_its_device
def forward(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, *,
    window: int, scale: float, launch: Launch | None = None,
) -> torch.Tensor:  # fmt: skip
    """[B, N, D] of q [B, N, D] over pools keys and values [pages, K, page cells, D], table [B, P], positions [B].

    table and positions: int32 or int64; positions at least 0. window 0: none. No cell that a sequence does not see is
    read, but for those that have left the window. `launch` replaces the settings of the table, for tests.
    """
    check(q, keys, values, table, positions, window=window, scale=scale)
    (rows, num_heads, dim), (_, kv_heads, page_size, _) = q.shape, keys.shape
    out = torch.empty((rows, num_heads, dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    num_cells, group = table.size(1) * page_size, num_heads // kv_heads
    if launch is None:
        settings = {"group": group, "num_cells": num_cells, "element_bytes": q.element_size()}
        launch = plan(target_of(q).arch, dim, **settings)
    q = q if q.stride(2) == 1 else q.contiguous()
    outs = torch.empty((rows, num_heads, launch.num_chunks, dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((2, rows, num_heads, launch.num_chunks), dtype=torch.float32, device=q.device)
    decode_kernel[(launch.num_chunks, kv_heads, rows)](
        q, keys, values, table, positions, outs, stats,
        q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), table.stride(0), num_cells, window,
        launch.num_chunks, scale * LOG2_E,
        HEADS=num_heads, GROUP=group, D=dim, PAGE=page_size if table.size(1) > 1 else 0, CHUNK=launch.chunk,
        BLOCK_G=launch.block_g, BLOCK_N=launch.block_n, BLOCK_D=launch.block_d, WINDOWED=window > 0,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    combine_kernel[(num_heads, rows)](
        outs, stats, positions, out, num_cells, launch.num_chunks,
        HEADS=num_heads, D=dim, CHUNK=launch.chunk, CHUNKS=next_power_of_2(launch.num_chunks), BLOCK_S=16,
        BLOCK_D=launch.block_d, num_warps=4,
    )  # fmt: skip
    return out


def check(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, *,
    window: int, scale: float,
) -> None:  # fmt: skip
    """ValueError, in words, for arguments that do not fit together."""
    shapes = f"q {list(q.shape)}, keys {list(keys.shape)}, values {list(values.shape)}"
    if q.dim() != 3 or keys.dim() != 4 or keys.shape != values.shape or q.size(2) != keys.size(3):
        raise ValueError(f"{shapes}: expected q [B, N, D], keys and values [pages, K, cells, D]")
    check_dtypes(q=q, keys=keys, values=values)
    if not q.dtype == keys.dtype == values.dtype:
        raise ValueError(f"q, keys, values of {q.dtype}, {keys.dtype}, {values.dtype}: cast them to one dtype")
    if keys.size(1) == 0 or q.size(1) % keys.size(1):
        raise ValueError(f"{q.size(1)} query heads do not divide among {keys.size(1)} kv heads ({shapes})")
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(f"{shapes}: the pools must be contiguous")
    for name, tensor in (("table", table), ("positions", positions)):
        if tensor.dtype not in (torch.int32, torch.int64) or tensor.size(0) != q.size(0):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}: expected integers for {q.size(0)} rows")
    if table.dim() != 2 or table.size(1) == 0 or table.stride(1) != 1 or positions.stride() != (1,):
        shapes = f"table {list(table.shape)}, positions {list(positions.shape)}"
        raise ValueError(f"{shapes}: expected [B, P] and [B], with unit stride")
    if window < 0 or scale <= 0:
        raise ValueError(f"window {window}, scale {scale}: a window is 1 or more (0 = none), scale above 0")


@torch.library.custom_op("megallm_kernels::decode_attention", mutates_args=())
def decode_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, positions: torch.Tensor,
    window: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """`forward` with the settings of the table, as an operator. It has no gradient: decoding needs none."""
    return forward(q, keys, values, table, positions, window=window, scale=scale)


@decode_attention.register_fake
def _(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, positions: torch.Tensor,
    window: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    return q.new_empty(q.shape)
