"""Attention, backward: dq, dk and dv from the saved output and log-sum-exp, without the matrix of scores in memory.

    p = exp(s - lse)    dv = p^T dout    dp = dout v^T    delta = sum(out dout) - dlse    ds = p (dp - delta) softcap'
    dq = scale ds k     dk = scale ds^T q                 softcap' = 1 - tanh(scale q k^T / softcap)^2, or 1

FlashAttention-2 (arXiv 2307.08691, algorithm 2); dlse, the gradient of lse, enters delta since d lse / d s = p.
FLOPs: 10 D for each visible (query, key) pair; 14 D where dq is computed apart, which is what repeats bit for bit.

    prepare   delta, and lse in base 2                            a pass over out and dout
    keys      a tile of keys stays, the queries of the group's heads pass by: dk, dv (4 products of matrices)
    queries   a tile of queries stays, the keys pass by: dq (3 products); deterministic
    or: keys also adds its part of dq (5 products) to an fp32 buffer, in any order; convert then rounds it

The keys kernel works on s^T = k q^T, so that p^T and ds^T are operands of the next products as they lie in registers.
Only tiles cut by the diagonal, the window's edge or an end pay for masks; tiles that see nothing are never visited.
sm_90: TMA descriptors, and dq is added by TMA reductions to [N, D, pitch], tokens innermost, as the product leaves it.
Others: pointers, and always the two kernels. Tensors that neither reads 16 bytes at a time are copied first.
A tile read by TMA may reach past a sequence: what is there must be finite (0 * NaN).

Scores, dk, dv and dq accumulate in fp32; p and ds are rounded to the inputs' dtype before a product; fp32 inputs are
multiplied as three tf32 products. int64: token and head numbers are widened before they meet a stride.

Letters: Tq query tokens, Tk key tokens, B sequences, N query heads, K kv heads (head n reads n // (N / K)), D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from megallm_kernels.attention_backward_kernels import convert_kernel, keys_kernel, prepare_kernel, queries_kernel
from megallm_kernels.attention_tiles import (
    CACHE_BYTES,
    LOG2_E,
    columns_of,
    descriptor,
    family,
    packed_tiles,
    readable,
    strides,
)
from megallm_kernels.device import on_its_device, target_of

MAX_BLOCK = 256
"""Rows that a descriptor's tile may have."""

MAX_STAGES = 2
"""Most stages of a row of the tables."""

ROWS = 32
"""Queries a program of the prepare and convert passes takes: 4096 elements of D = 128, 16 bytes a thread and access."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Settings of one launch."""

    block_m: int
    """Queries of a tile."""
    block_n: int
    """Keys of a tile."""
    num_warps: int
    num_stages: int
    tma: bool
    """Read through descriptors."""
    warp_specialize: bool
    """Loads in a warpgroup of their own; needs descriptors and num_warps 4."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings of one backward pass."""

    block_d: int
    """Columns of a tile: the power of two at or above D, at least 16."""
    keys: Launch
    queries: Launch | None
    """None: the keys kernel adds to dq, which does not repeat bit for bit."""


_Row = tuple[int, int, int, int, bool, bool]

# family -> largest BLOCK_D -> (BLOCK_M, BLOCK_N, warps, stages, TMA, warp_specialize), for two-byte elements.
_KEYS: dict[int, dict[int, _Row]] = {
    0: {256: (32, 32, 4, 1, False, False)},
    80: {64: (64, 128, 8, 2, False, False), 128: (64, 64, 8, 2, False, False), 256: (32, 32, 8, 1, False, False)},
    86: {64: (64, 128, 8, 2, False, False), 128: (64, 64, 8, 2, False, False), 256: (32, 32, 8, 1, False, False)},
    90: {64: (64, 128, 8, 2, True, False), 128: (64, 128, 8, 2, True, False), 256: (32, 64, 8, 2, True, False)},
}
_QUERIES: dict[int, dict[int, _Row]] = {
    0: {256: (32, 32, 4, 1, False, False)},
    80: {64: (128, 64, 8, 2, False, False), 128: (128, 64, 8, 2, False, False), 256: (64, 32, 8, 2, False, False)},
    86: {64: (128, 64, 8, 2, False, False), 128: (128, 64, 8, 2, False, False), 256: (32, 32, 8, 2, False, False)},
    90: {64: (128, 128, 8, 2, True, False), 128: (128, 64, 8, 2, True, False), 256: (64, 64, 8, 2, True, False)},
}
# The keys kernel where it also adds to dq; not on sm_80, where no tile of five products fits the registers.
_ADDING: dict[int, dict[int, _Row]] = {
    0: {256: (32, 32, 4, 1, False, False)},
    90: {64: (64, 128, 8, 2, True, False), 128: (64, 128, 8, 2, True, False), 256: (32, 64, 8, 2, True, False)},
}
# fp32 inputs, every family but 0, always two kernels: correct rather than fast. Above D = 128 registers spill in every
# form and with every tile tried: stacks of about 140 bytes (keys) and 100 (queries) on sm_80.
_WIDE_KEYS: dict[int, _Row] = {128: (16, 16, 4, 1, False, False), 256: (16, 16, 8, 1, False, False)}
_WIDE_QUERIES: dict[int, _Row] = {
    64: (32, 32, 4, 1, False, False), 128: (16, 32, 8, 1, False, False), 256: (16, 16, 8, 1, False, False)
}  # fmt: skip

_CAPPED_BLOCK_M = 32
"""Most queries of a tile of the keys kernel with a softcap, whose derivative takes registers too."""

_CAPPED_BLOCK_N = {0: 32, 80: 32, 86: 32, 90: 64}
"""Most keys of a tile of the queries kernel with a softcap, likewise, by family."""

# With a window, by (family, BLOCK_D): rows that are at the limit without one.
_WINDOWED_BLOCK_M = {(family, block_d): 32 for family in (80, 86) for block_d in (16, 32, 64)}
_WINDOWED_BLOCK_N = {(80, 128): 32, (86, 128): 32}
_CAPPED_WINDOWED_BLOCK_N = {(90, 256): 32}
_CAPPED_WINDOWED_STAGES = {(90, 256): 1}
"""Of the keys kernel that adds to dq."""


def plan(
    arch: int, head_dim: int, *, element_bytes: int, deterministic: bool, capped: bool = False, windowed: bool = False
) -> Plan:
    """Launch settings; ValueError if D is too large or the GPU too old."""
    block_d, key = columns_of(head_dim), family(arch)
    place = (key, block_d)
    wide = element_bytes > 2 and key != 0
    most_queries, most_keys, most_stages = MAX_BLOCK, MAX_BLOCK, MAX_STAGES
    if capped:
        most_queries, most_keys = _CAPPED_BLOCK_M, _CAPPED_BLOCK_N[key]
    if windowed:
        most_queries = min(most_queries, _WINDOWED_BLOCK_M.get(place, MAX_BLOCK))
        most_keys = min(most_keys, _WINDOWED_BLOCK_N.get(place, MAX_BLOCK))
    if capped and windowed:
        most_keys = min(most_keys, _CAPPED_WINDOWED_BLOCK_N.get(place, MAX_BLOCK))
        most_stages = _CAPPED_WINDOWED_STAGES.get(place, MAX_STAGES)
    if not deterministic and not wide and key in _ADDING:
        keys = _launch(_ADDING[key], block_d, block_m=most_queries, num_stages=most_stages)
        return Plan(block_d=block_d, keys=keys, queries=None)
    return Plan(
        block_d=block_d,
        keys=_launch(_WIDE_KEYS if wide else _KEYS[key], block_d, block_m=most_queries),
        queries=_launch(_WIDE_QUERIES if wide else _QUERIES[key], block_d, block_n=most_keys),
    )


def _launch(
    rows: dict[int, _Row], block_d: int, *, block_m: int = MAX_BLOCK, block_n: int = MAX_BLOCK,
    num_stages: int = MAX_STAGES,
) -> Launch:  # fmt: skip
    """The row for `block_d`, its tile cut to block_m queries and block_n keys, its pipeline to num_stages."""
    most_m, most_n, num_warps, most_stages, tma, specialize = next(rows[d] for d in rows if block_d <= d)
    return Launch(
        block_m=min(most_m, block_m), block_n=min(most_n, block_n), num_warps=num_warps,
        num_stages=min(most_stages, num_stages), tma=tma, warp_specialize=specialize,
    )  # fmt: skip


@on_its_device
def backward(
    dout: torch.Tensor,  # [Tq, N, D], any strides
    q: torch.Tensor,  # [Tq, N, D]
    k: torch.Tensor,  # [Tk, K, D]
    v: torch.Tensor,  # [Tk, K, D]
    out: torch.Tensor,  # [Tq, N, D] contiguous
    lse: torch.Tensor,  # [N, Tq] fp32
    dlse: torch.Tensor | None,  # [N, Tq]
    cu_seqlens_q: torch.Tensor | None,  # [B + 1] int32
    cu_seqlens_k: torch.Tensor | None,
    *,
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
    deterministic: bool,
    dq: torch.Tensor,  # [Tq, N, D], any strides with unit stride along D
    dk: torch.Tensor,  # [Tk, K, D]
    dv: torch.Tensor,  # [Tk, K, D]
    settings: Plan | None = None,
) -> None:
    """Writes the gradients of q, k and v into dq, dk and dv, every element; `deterministic`: bit for bit repeatable.

    The other arguments are those of the forward pass. max_seqlen_q and max_seqlen_k only order the work. `settings`
    replaces those of the tables: for measurements and tests.
    """
    if q.numel() == 0 or k.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    num_queries, num_heads, head_dim = q.shape
    if settings is None:
        settings = plan(
            target_of(q).arch, head_dim, element_bytes=q.element_size(), deterministic=deterministic,
            capped=softcap > 0, windowed=window > 0,
        )  # fmt: skip
    tma = settings.keys.tma
    q, k, v, dout = (readable(x, tma=tma) for x in (q, k, v, dout.to(q.dtype)))
    num_sequences = batch_size if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    pitch = (num_queries // 4 + num_sequences + 1) * 4
    stats = torch.empty((2, num_heads, pitch), dtype=torch.float32, device=q.device)
    if cu_seqlens_q is None:
        length = num_queries // batch_size
        grid = (triton.cdiv(length, ROWS) * batch_size, num_heads)
    else:
        length, grid = num_queries, (num_queries // ROWS + num_sequences + 1, num_heads)
    offsets = stats if cu_seqlens_q is None else cu_seqlens_q
    tile: dict[str, Any] = {"HEADS": num_heads, "D": head_dim, "BLOCK_D": settings.block_d}
    tile["PACKED"] = cu_seqlens_q is not None
    prepare_kernel[grid](
        out.contiguous(), dout, lse.contiguous(), lse if dlse is None else dlse.contiguous(), stats, offsets,
        dout.stride(0), dout.stride(1), length, num_sequences, pitch, ROWS=ROWS, HAS_DLSE=dlse is not None,
        num_warps=4, **tile,
    )  # fmt: skip
    call = _Call(
        tensors=(q, k, v, dout), stats=stats, offsets=(cu_seqlens_q, cu_seqlens_k), batch_size=batch_size,
        longest=(max_seqlen_q, max_seqlen_k), window=window,
        scales=(softcap * LOG2_E, scale / softcap, scale) if softcap else (scale * LOG2_E, 0.0, scale),
        constants={
            **tile, "GROUP": num_heads // k.size(1), "CAUSAL": causal, "WINDOWED": window > 0, "CAPPED": softcap > 0
        },
    )  # fmt: skip
    if settings.queries is not None:
        _launch_keys(call, settings.keys, None, dk, dv)
        _launch_queries(call, settings.queries, dq)
        return
    accumulator = torch.zeros((num_heads, head_dim, pitch), dtype=torch.float32, device=q.device)
    _launch_keys(call, settings.keys, accumulator, dk, dv)
    convert_kernel[grid](
        accumulator, dq, offsets, dq.stride(0), dq.stride(1), length, num_sequences, pitch, scale, ROWS=ROWS,
        num_warps=4, **tile,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What both launches of one backward pass share."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    """q, k, v and dout."""
    stats: torch.Tensor
    """[2, N, pitch] fp32: lse in base 2, delta."""
    offsets: tuple[torch.Tensor | None, torch.Tensor | None]
    """cu_seqlens_q and cu_seqlens_k."""
    batch_size: int
    longest: tuple[int, int]
    """max_seqlen_q and max_seqlen_k."""
    window: int
    scales: tuple[float, float, float]
    """Two of the score in base 2, see the kernels; and the factor of dq and dk."""
    constants: dict[str, Any]

    def grid(self, block: int, *, over_keys: bool) -> tuple[int, list[Any], torch.Tensor]:
        """(programs, the integers from num_queries to pitch, tile table) with tiles of `block` keys or queries."""
        q, k = self.tensors[:2]
        tiled = k if over_keys else q
        own, other = reversed(self.offsets) if over_keys else self.offsets
        if own is not None and other is not None:
            table = packed_tiles(own, other, tiled.size(0), block)
            num_tiles, units = table.size(0), tiled.size(1)
            lengths = [q.size(0), k.size(0)]
        else:
            table = self.stats
            lengths = [q.size(0) // self.batch_size, k.size(0) // self.batch_size]
            num_tiles, units = triton.cdiv(lengths[over_keys], block), tiled.size(1) * self.batch_size
        passing = 2 * max(self.longest[not over_keys], 1) * q.size(2) * q.element_size()  # bytes of a kv or query head
        group = self.constants["GROUP"]
        heads = max(CACHE_BYTES // (passing * group), 1) if over_keys else max(CACHE_BYTES // passing, 1) * group
        integers = [*lengths, self.batch_size, num_tiles, min(heads, units), self.window, self.stats.size(2)]
        return num_tiles * units, integers, table

    def strides(self, *gradients: torch.Tensor) -> list[int]:
        """Of tokens and heads: q, k, v, dout, then `gradients`."""
        return [each for x in (*self.tensors, *gradients) for each in strides(x, self.constants["BLOCK_D"])]

    def sources(self, launch: Launch) -> tuple[Any, ...]:
        """q, k, v, dout and stats as the kernels take them: descriptors (of tiles [1, rows, D]) or tensors."""
        if not launch.tma:
            return *self.tensors, self.stats
        blocks = (launch.block_m, launch.block_n, launch.block_n, launch.block_m)
        tiles = [descriptor(x, n, self.constants["BLOCK_D"]) for x, n in zip(self.tensors, blocks, strict=True)]
        return *tiles, TensorDescriptor.from_tensor(self.stats.flatten(0, 1), [1, launch.block_m])


def _launch_keys(
    call: _Call, launch: Launch, accumulator: torch.Tensor | None, dk: torch.Tensor, dv: torch.Tensor
) -> None:
    """dk and dv; adds dq / scale to `accumulator` [N, D, pitch] fp32 where one is given."""
    programs, integers, table = call.grid(launch.block_n, over_keys=True)
    target: Any = call.stats if accumulator is None else accumulator
    if accumulator is not None and launch.tma:
        target = TensorDescriptor.from_tensor(accumulator, [1, call.constants["BLOCK_D"], launch.block_m])
    keys_kernel[(programs,)](
        *call.sources(launch), target, dk, dv, table, *call.strides(dk, dv), *call.scales,
        *integers, **_settings(launch), **call.constants, ADD_DQ=accumulator is not None,
    )  # fmt: skip


def _launch_queries(call: _Call, launch: Launch, dq: torch.Tensor) -> None:
    """dq alone."""
    programs, integers, table = call.grid(launch.block_m, over_keys=False)
    queries_kernel[(programs,)](
        *call.sources(launch), dq, table, *call.strides(dq), *call.scales, *integers,
        **_settings(launch), **call.constants,
    )  # fmt: skip


def _settings(launch: Launch) -> dict[str, Any]:
    return {
        "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "TMA": launch.tma, "STAGES": launch.num_stages,
        "WARP_SPECIALIZE": launch.warp_specialize, "num_warps": launch.num_warps, "num_stages": launch.num_stages,
    }  # fmt: skip
