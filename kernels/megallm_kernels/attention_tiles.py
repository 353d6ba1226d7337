"""What the attention kernels share: which tile a program works on, how a tile is read, and the formula of a score.

Tiles of documents packed one after another are listed on the device, without waiting for their lengths. With c[b] the
first token of document b and M the rows of a tile, document b owns the tile numbers from c[b] // M + b on: since

    (c[b] + length) // M - c[b] // M + 1  >=  ceil(length / M)

they suffice, and T // M + B + 1 tiles cover every case, with at most one idle tile a document. The tokens past the last
document are document B, which has no keys.

Letters: T tokens, B sequences, N query heads, K kv heads, D head dim, M rows of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from megallm_kernels.device import shared_limit_bytes
from megallm_kernels.rows import next_power_of_2

LOG2_E = 1.4426950408889634
"""exp(x) = exp2(x log2(e)): the exponential that the hardware has."""

MAX_HEAD_DIM = 256
"""Largest D: a tile of more does not fit the registers."""

CACHE_BYTES = 32 * 2**20
"""What a section of heads may span of the tensors that pass by: A100 (40 MB) and H100 (50 MB) keep it."""


def columns_of(head_dim: int) -> int:
    """Columns of a tile: the power of two at or above D, at least 16. ValueError if D is too large."""
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head dim {head_dim} is not within 1 to {MAX_HEAD_DIM}, which this kernel takes: use torch's")
    return max(next_power_of_2(head_dim), 16)


def family(arch: int) -> int:
    """The key of the launch tables: 0 = interpreter, 80, 86 = 80 with less shared memory, 90. ValueError below 80."""
    limit = shared_limit_bytes(arch)
    if arch == 0 or 90 <= arch < 100:
        return arch // 10 * 10
    return 80 if limit >= shared_limit_bytes(80) else 86


def strides(x: torch.Tensor, block_d: int) -> tuple[int, int]:
    """Of tokens and heads; of a dimension of size 1, which may have any, one that kernels and descriptors take."""
    return x.stride(0) if x.size(0) > 1 else block_d, x.stride(1) if x.size(1) > 1 else block_d


def readable(x: torch.Tensor, *, tma: bool) -> torch.Tensor:
    """x [T, heads, D] as the kernels read it, with unit stride along D: itself, or a copy with D padded to 16s.

    Pointers: address in multiples of 16 bytes, strides in 16s of elements, which is what Triton tells the compiler of a
    number. Without it, tiles would be read two bytes at a time, and the addresses spill. Descriptors: strides in
    multiples of 16 bytes, none 0.
    """
    taken = [stride for i, stride in enumerate(x.stride()[:2]) if x.size(i) > 1]
    if tma:
        regular = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in taken)
    else:
        regular = all(stride % 16 == 0 for stride in taken)
    if regular and (x.stride(2) == 1 or x.size(2) == 1) and x.data_ptr() % 16 == 0:
        return x
    width = triton.cdiv(x.size(2), 16) * 16
    return x.new_empty((x.size(0), x.size(1), width))[:, :, : x.size(2)].copy_(x)


def descriptor(x: torch.Tensor, rows: int, block_d: int) -> TensorDescriptor:
    """Of x [T, heads, D], as [heads, T, D] in blocks [1, rows, block_d]; outside it reads 0. Made on the host."""
    token, head = strides(x, block_d)
    return TensorDescriptor(x, [x.size(1), x.size(0), x.size(2)], [head, token, 1], [1, rows, block_d])


@triton.jit
def tile_and_head(program, num_tiles, num_heads, section):
    """(tile, head) of a program: sections of heads whose keys fit the cache; in one, heads first, then tiles."""
    first = program // (num_tiles * section) * section
    size = tl.minimum(section, num_heads - first)
    inside = program - first * num_tiles
    return inside // size, first + inside % size


@triton.jit
def document_of(tile, offsets, num_documents, BLOCK: tl.constexpr):
    """(document, first token, its tile number) of a tile number of packed documents; binary search over the offsets."""
    low = 0
    high = num_documents
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(offsets + middle) // BLOCK + middle <= tile:
            low = middle
        else:
            high = middle - 1
    start = tl.load(offsets + low)
    return low, start, tile - (start // BLOCK + low)


@triton.jit(do_not_specialize=["num_documents", "num_queries"])
def _table_kernel(table, query_offsets, key_offsets, num_documents, num_queries, BLOCK: tl.constexpr):
    """One row of `packed_tiles`."""
    number = tl.program_id(0)
    document, start, tile = document_of(number, query_offsets, num_documents, BLOCK)
    real = document < num_documents
    end = tl.load(query_offsets + document + 1, mask=real, other=num_queries)
    key_start = tl.load(key_offsets + document)
    key_end = tl.load(key_offsets + document + 1, mask=real, other=0)
    row = table + number * 5
    tl.store(row, start)
    tl.store(row + 1, end - start)
    tl.store(row + 2, key_start)
    tl.store(row + 3, tl.where(real, key_end - key_start, 0))
    tl.store(row + 4, tl.cdiv(end - start, BLOCK) - 1 - tile)


def packed_tiles(query_offsets: torch.Tensor, key_offsets: torch.Tensor, num_queries: int, block: int) -> torch.Tensor:
    """Table [tiles, 5] int32: first query token, queries, first key token, keys of the document, tile inside it.

    A document's last tile comes first: under a causal mask it takes longest. An idle tile has a negative number.
    """
    num_documents = query_offsets.numel() - 1
    num_tiles = num_queries // block + num_documents + 1
    table = torch.empty((num_tiles, 5), dtype=torch.int32, device=query_offsets.device)
    _table_kernel[(num_tiles,)](table, query_offsets, key_offsets, num_documents, num_queries, BLOCK=block, num_warps=1)
    return table


@triton.jit
def load_tile(source, row, row_stride, head, head_stride, limit, D: tl.constexpr, ROWS: tl.constexpr,
              BLOCK_D: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """[ROWS, BLOCK_D] from token `row` (int64 inside) on; rows from `limit` on are 0 if MASKED; columns past D are 0.

    TMA: `source` is a descriptor over [heads, T, D]; it knows the strides, and rows past T are 0.
    """
    if TMA:
        tile = source.load([head, row, 0]).reshape(ROWS, BLOCK_D)
    else:
        inner = tl.arange(0, ROWS)
        column = tl.arange(0, BLOCK_D)
        base = source + tl.cast(row, tl.int64) * row_stride + tl.cast(head, tl.int64) * head_stride
        at = base + (tl.cast(inner, tl.int64) * row_stride)[:, None] + column[None, :]
        if MASKED:
            if BLOCK_D == D:
                tile = tl.load(at, mask=(inner < limit - row)[:, None], other=0.0)
            else:
                tile = tl.load(at, mask=(inner < limit - row)[:, None] & (column < D)[None, :], other=0.0)
        elif BLOCK_D == D:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(column < D)[None, :], other=0.0)
    return tile


@triton.jit
def tanh(x):
    """1 - 2 / (1 + exp(2x)): no overflow harms it; absolute error about eps."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * 1.4426950408889634)))


@triton.jit
def visible(query, key, num_keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Which keys each query sees; `query` is its number aligned to the last key, i + Sk - Sq."""
    seen = key < num_keys
    if CAUSAL:
        seen = seen & (key <= query)
    if WINDOWED:
        seen = seen & (query - key < window)
    return seen
