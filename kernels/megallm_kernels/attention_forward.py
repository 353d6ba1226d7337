"""Attention, forward: exact, in tiles, without the matrix of scores in memory; also over documents packed together.

    s = scale q k^T;  s <- softcap tanh(s / softcap);  p = exp(s - lse);  out = p v;  lse = log(sum(exp(s)))

FlashAttention-2 (arXiv 2307.08691) with the online softmax of arXiv 1805.02867: a program owns BLOCK_M queries of one
head and walks over the keys, BLOCK_N at a time, with a running maximum and sum; the division by the sum comes last.
FLOPs: 4 D for each visible (query, key) pair, half of it causal; bytes hardly matter from a few hundred tokens on.

Three loops: keys cut by the window's edge, keys that every query of the tile sees (no masks), keys cut by the diagonal
or the end. Tiles that no query sees are never visited: their bounds follow from the mask. Causal programs start with
the longest (the last tile), so that the short ones fill the gaps at the end; heads run in sections whose keys and
values stay in the second-level cache.

sm_90: TMA descriptors and warp_specialize: one warpgroup loads, two compute, each on half of the queries. Triton 3.6
and 3.9 specialise a kernel with one loop only (a second loop, a product outside it or a branch around the mask makes
them fail or give up): there all tiles are masked in one loop, for a third of its instructions at D = 128. They also
split a descriptor made by the host at the wrong place, so that of q is made in the kernel; k and v, which both
consumers read whole, come by host descriptors [heads, T, D].
Others: pointers, cp.async pipelining. Tensors that neither reads 16 bytes at a time are copied first (`readable`).
A descriptor's tile may reach past the end of a sequence: the keys are masked, the values must be finite (0 * NaN).

Scores, maximum, sum and output accumulate in fp32; p is rounded to v's dtype for the second product; fp32 inputs are
multiplied as three tf32 products. int64: token and head numbers are widened before they meet a stride.

Letters: Tq query tokens, Tk key tokens, B sequences, N query heads, K kv heads (head n reads n // (N / K)), D head dim.
"""

from __future__ import annotations

import contextvars
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from megallm_kernels.attention_tiles import (
    CACHE_BYTES,
    LOG2_E,
    columns_of,
    descriptor,
    family,
    load_tile,
    packed_tiles,
    readable,
    strides,
    tanh,
    tile_and_head,
)
from megallm_kernels.device import check_dtypes, on_its_device, target_of


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Settings of one launch."""

    block_m: int
    """Queries of a tile."""
    block_n: int
    """Keys of a tile."""
    block_d: int
    """Columns of a tile: the power of two at or above D, at least 16."""
    num_warps: int
    num_stages: int
    tma: bool
    """Read through descriptors."""
    warp_specialize: bool
    """Loads in a warpgroup of their own; needs descriptors and num_warps 4."""


# family -> largest BLOCK_D -> (BLOCK_M, BLOCK_N, warps, stages, TMA, warp_specialize), for two-byte elements.
_TABLE: dict[int, dict[int, tuple[int, int, int, int, bool, bool]]] = {
    0: {256: (32, 32, 4, 1, False, False)},
    80: {64: (128, 64, 8, 3, False, False), 128: (128, 64, 8, 2, False, False), 256: (64, 64, 8, 2, False, False)},
    86: {64: (128, 64, 8, 3, False, False), 128: (128, 64, 8, 2, False, False), 256: (64, 32, 8, 2, False, False)},
    90: {64: (128, 128, 4, 3, True, True), 128: (128, 128, 4, 2, True, True), 256: (128, 64, 4, 2, True, True)},
}
# fp32 inputs, every family but 0. Above D = 128, softcap and window spill on sm_90 (Triton 3.9): a stack of 32 bytes.
_WIDE = {
    32: (64, 32, 4, 2, False, False), 64: (64, 32, 8, 2, False, False), 128: (32, 32, 8, 2, False, False),
    256: (16, 16, 8, 2, False, False),
}  # fmt: skip


def plan(arch: int, head_dim: int, *, element_bytes: int) -> Launch:
    """Launch settings; ValueError if D is too large or the GPU too old."""
    block_d, key = columns_of(head_dim), family(arch)
    row = _WIDE if element_bytes > 2 and key else _TABLE[key]
    block_m, block_n, num_warps, num_stages, tma, specialize = next(row[d] for d in row if block_d <= d)
    return Launch(
        block_m=block_m, block_n=block_n, block_d=block_d, num_warps=num_warps, num_stages=num_stages,
        tma=tma, warp_specialize=specialize,
    )  # fmt: skip


@triton.jit
def _place(
    table, num_queries, num_keys, num_sequences, num_tiles, section, HEADS: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """(head, first query token, queries, first key token, keys of the sequence, tile inside it, Tq) of a program."""
    if PACKED:
        number, head = tile_and_head(tl.program_id(0), num_tiles, HEADS, section)
        entry = table + number * 5
        q_start = tl.load(entry)
        length = tl.load(entry + 1)
        k_start = tl.load(entry + 2)
        num_keys = tl.load(entry + 3)
        tile = tl.load(entry + 4)
        num_rows = num_queries
    else:
        number, head = tile_and_head(tl.program_id(0), num_tiles, HEADS * num_sequences, section)
        q_start = head // HEADS * num_queries
        k_start = head // HEADS * num_keys
        length = num_queries
        tile = num_tiles - 1 - number  # the last tile sees most keys: first
        num_rows = num_queries * num_sequences
        head = head % HEADS
    return head, q_start, length, k_start, num_keys, tile, num_rows


@triton.jit
def _bounds(first, shift, num_keys, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
            WINDOWED: tl.constexpr):  # fmt: skip
    """(low, low_full, high_full, high): some query of the tile sees a key of low..high, every one low_full..high_full.

    All but high are multiples of BLOCK_N; low <= low_full <= high_full, and high_full < high + BLOCK_N.
    """
    low = 0
    low_full = 0
    high = num_keys
    high_full = num_keys // BLOCK_N * BLOCK_N
    if CAUSAL:
        high = tl.maximum(tl.minimum(num_keys, first + BLOCK_M + shift), 0)
        high_full = tl.maximum(tl.minimum(num_keys, first + shift + 1), 0) // BLOCK_N * BLOCK_N
    if WINDOWED:
        low = tl.maximum(first + shift - window + 1, 0) // BLOCK_N * BLOCK_N
        low_full = tl.cdiv(tl.maximum(first + BLOCK_M + shift - window, 0), BLOCK_N) * BLOCK_N
        low_full = tl.minimum(low_full, tl.cdiv(high, BLOCK_N) * BLOCK_N)
        high_full = tl.maximum(high_full, low_full)
    return low, low_full, high_full, high


@triton.jit
def _visible(query, key, num_keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """`visible` for queries of the sequence; those past its end see more, and are not stored. One comparison less."""
    if CAUSAL:
        seen = key <= query
        if WINDOWED:
            seen = seen & (query - key < window)
    else:
        seen = key < num_keys
    return seen


@triton.jit
def _attend(
    acc, total, largest, queries, k, v, query, start, low, high, num_keys, kv_head,
    k_token, k_head, v_token, v_head, scale, softcap, window,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr, TMA: tl.constexpr, WARP_SPECIALIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys low to high of a sequence that begins at token `start`; largest and total are in base 2."""
    column = tl.arange(0, BLOCK_N)
    precision: tl.constexpr = "tf32x3" if queries.dtype == tl.float32 else "tf32"
    for first in tl.range(low, high, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        end = start + num_keys
        keys = load_tile(k, start + first, k_token, kv_head, k_head, end, D, BLOCK_N, BLOCK_D, TMA, MASKED)
        s = tl.dot(queries, keys.T, input_precision=precision)
        if CAPPED:
            s = tanh(s * softcap)
        if MASKED:
            if WARP_SPECIALIZE and not WINDOWED:  # the columns stay constants of the loop: less work, more registers
                seen = _visible((query - first)[:, None], column[None, :], num_keys - first, window, CAUSAL, WINDOWED)
            else:
                seen = _visible(query[:, None], (first + column)[None, :], num_keys, window, CAUSAL, WINDOWED)
            s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(largest, tl.max(s, axis=1) * scale)
        below = new
        if MASKED:  # a row that has seen no key yet: exp2(-inf - 0) = 0 instead of exp2(-inf + inf)
            below = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s * scale - below[:, None])
        shrink = tl.exp2(largest - below)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None]
        values = load_tile(v, start + first, v_token, kv_head, v_head, end, D, BLOCK_N, BLOCK_D, TMA, MASKED)
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=precision)
        largest = new
    return acc, total, largest


@triton.jit(do_not_specialize=[
    "num_queries", "num_keys", "num_sequences", "num_tiles", "section", "window"
])  # fmt: skip
def forward_kernel(
    q, k, v, out, lse, table,
    q_token, q_head, k_token, k_head, v_token, v_head, scale, softcap,
    num_queries, num_keys, num_sequences, num_tiles, section, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PACKED: tl.constexpr,
    TMA: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. A score in base 2 is scale * s or, CAPPED, scale * tanh(softcap * s).

    num_queries: Tq if PACKED, else Sq; num_keys: Sk (unless PACKED); table: `packed_tiles`.
    """
    head, q_start, length, k_start, num_keys, tile, num_rows = _place(
        table, num_queries, num_keys, num_sequences, num_tiles, section, HEADS, PACKED
    )
    if PACKED and not WARP_SPECIALIZE:  # which takes no early return: there an idle program has no row and no key
        if tile < 0:
            return
    length = tl.where(tile < 0, 0, length)
    first = tl.maximum(tile, 0) * BLOCK_M
    shift = num_keys - length
    low, low_full, high_full, high = _bounds(first, shift, num_keys, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED)
    high = tl.where(tile < 0, low, high)
    row = first + tl.arange(0, BLOCK_M)
    kv_head = head // GROUP
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    if WARP_SPECIALIZE:  # each consumer reads half of the rows, which takes a descriptor made here (see `forward`)
        end = tl.maximum(q_start + length, 1)
        rows = tl.make_tensor_descriptor(
            q + tl.cast(head, tl.int64) * q_head, [end, D], [tl.cast(q_token, tl.int64), 1], [BLOCK_M, BLOCK_D]
        )  # fmt: skip
        queries = rows.load([q_start + first, 0])
    else:
        queries = load_tile(
            q, q_start + first, q_token, head, q_head, q_start + length, D, BLOCK_M, BLOCK_D, False, True
        )  # fmt: skip
    for part in tl.static_range(3):
        # 0: the window's edge, masked; 1: no mask; 2: diagonal and end, masked. One loop if it is to be specialised.
        if part == 2 or (not WARP_SPECIALIZE and (part == 1 or WINDOWED)):
            acc, total, largest = _attend(
                acc, total, largest, queries, k, v, row + shift, k_start,
                low if part == 0 or WARP_SPECIALIZE else (low_full if part == 1 else high_full),
                low_full if part == 0 else (high_full if part == 1 else high),
                num_keys, kv_head, k_token, k_head, v_token, v_head, scale, softcap, window,
                D, BLOCK_N, BLOCK_D, CAUSAL, WINDOWED, CAPPED, TMA, WARP_SPECIALIZE, part != 1,
            )  # fmt: skip
    seen = total > 0.0
    acc = acc * (1.0 / tl.where(seen, total, 1.0))[:, None]  # a division each would be five instructions
    logarithm = (largest + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453
    token = tl.cast(q_start + row, tl.int64)
    inside = row < length
    column = tl.arange(0, BLOCK_D)
    at = (token * (HEADS * D) + head * D)[:, None] + column[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])
    tl.store(lse + tl.cast(head, tl.int64) * num_rows + token, tl.where(seen, logarithm, float("-inf")), mask=inside)


@on_its_device
def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None, *,
    batch_size: int, max_seqlen_q: int, max_seqlen_k: int, causal: bool, window: int, softcap: float, scale: float,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out [Tq, N, D], lse [N, Tq] fp32) of q [Tq, N, D], k and v [Tk, K, D].

    `cu_seqlens_*` [B+1] int32: documents packed one after another (empty ones too); None: `batch_size` sequences of one
    length. A row that sees no key, or past the last document: out 0, lse -inf. causal: query i sees keys
    j <= i + (Sk - Sq); window > 0: and i + (Sk - Sq) - j < window. softcap 0: none. `max_seqlen_k` only orders the
    work. `launch` replaces the settings of the table: for measurements and tests.
    """
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, batch_size=batch_size, causal=causal, window=window,
          softcap=softcap, scale=scale)  # fmt: skip
    num_queries, num_heads, head_dim = q.shape
    out = torch.empty((num_queries, num_heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, num_queries), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    if launch is None:
        launch = plan(target_of(q).arch, head_dim, element_bytes=q.element_size())
    q, k, v = (readable(x, tma=launch.tma) for x in (q, k, v))
    group = num_heads // k.size(1)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        table = packed_tiles(cu_seqlens_q, cu_seqlens_k, num_queries, launch.block_m)
        num_tiles, heads, longest = table.size(0), num_heads, max_seqlen_k
        sizes = (num_queries, k.size(0), cu_seqlens_q.numel() - 1)
    else:
        sizes = (num_queries // batch_size, k.size(0) // batch_size, batch_size)
        table, num_tiles = lse, triton.cdiv(sizes[0], launch.block_m)
        heads, longest = num_heads * batch_size, sizes[1]
    section = group * max(CACHE_BYTES // (2 * max(longest, 1) * head_dim * k.element_size()), 1)
    scales = (softcap * LOG2_E, scale / softcap) if softcap else (scale * LOG2_E, 0.0)
    read: Any = (k, v)
    if launch.tma:
        read = [descriptor(x, launch.block_n, launch.block_d) for x in (k, v)]
    # A kernel that makes a descriptor needs scratch memory from Triton's allocator, a setting of the whole process:
    # made in a copy of the context, ours ends with the launch.
    contextvars.copy_context().run(
        _launch, forward_kernel[(num_tiles * heads,)],
        q, *read, out, lse, table, *(stride for x in (q, k, v) for stride in strides(x, launch.block_d)), *scales,
        *sizes, num_tiles, min(section, heads), window,
        HEADS=num_heads, GROUP=group, D=head_dim, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n,
        BLOCK_D=launch.block_d, CAUSAL=causal, WINDOWED=window > 0, CAPPED=softcap > 0,
        PACKED=cu_seqlens_q is not None, TMA=launch.tma, WARP_SPECIALIZE=launch.warp_specialize,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return out, lse


def _launch(kernel: Any, *arguments: Any, **settings: Any) -> None:
    triton.set_allocator(_scratch)
    kernel(*arguments, **settings)


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Bytes that the caching allocator hands out for the current stream, and takes back in its order."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None, *,
    batch_size: int, causal: bool, window: int, softcap: float, scale: float,
) -> None:  # fmt: skip
    """ValueError, in words, for arguments that do not fit together."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.size(2) != k.size(2):
        raise ValueError(f"{shapes}: expected q [Tq, N, D], k and v [Tk, K, D]")
    check_dtypes(q=q, k=k, v=v)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v of {q.dtype}, {k.dtype}, {v.dtype}: cast them to one dtype")
    if k.size(1) == 0 or q.size(1) % k.size(1):
        raise ValueError(f"{q.size(1)} query heads do not divide among {k.size(1)} kv heads ({shapes})")
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k come together: give both or none")
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if offsets is not None and (offsets.dtype != torch.int32 or offsets.dim() != 1 or not offsets.is_contiguous()):
            raise ValueError(f"{name} is {offsets.dtype} {list(offsets.shape)}: expected contiguous int32 [B + 1]")
    if cu_seqlens_q is not None and cu_seqlens_k is not None and not 0 < cu_seqlens_q.numel() == cu_seqlens_k.numel():
        raise ValueError(
            f"cu_seqlens_q has {cu_seqlens_q.numel()} offsets, cu_seqlens_k {cu_seqlens_k.numel()}: give both B + 1 "
            "offsets, the same one twice where a sequence has no queries or no keys"
        )
    if cu_seqlens_q is None and (batch_size < 1 or q.size(0) % batch_size or k.size(0) % batch_size):
        raise ValueError(f"{q.size(0)} queries, {k.size(0)} keys are not {batch_size} sequences: give cu_seqlens")
    if window < 0 or (window and not causal):
        raise ValueError(f"window {window} with causal={causal}: a window is positive and needs causal=True; 0 = none")
    if softcap < 0 or scale <= 0:
        raise ValueError(f"softcap {softcap}, scale {scale}: softcap is at least 0 (none), scale above 0")
