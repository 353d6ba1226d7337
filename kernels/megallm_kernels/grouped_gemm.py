"""Products of groups of rows with a matrix of their own: the linear layers of a mixture of experts.

    y[r]  = x[r] weight[e]^T                     for rows offsets[e] <= r < offsets[e + 1]; rows past the last: zeros
    dx[r] = dy[r] weight[e]                      the same kernel, the strides of weight swapped
    dweight[e] = sum over e's rows of dy[r]^T x[r]      an expert without rows: zeros

FLOPs: 2 In Out a row and product. The offsets stay on the device; nothing waits for them. With M rows a tile, expert e
owns the tile numbers from offsets[e] // M + e on, which suffice since (offset + count) // M - offset // M + 1 >=
ceil(count / M); a program finds its expert by binary search, and at most one tile an expert is idle. The rows past the
last expert are group E, whose product has no terms.

Tiling: a program owns BLOCK_M x BLOCK_N of the result. SECTION row tiles go through all column tiles together, so that
a second-level cache holds what they share. A tile may reach into the rows of the next expert: those are computed and
not stored (dweight sums over rows, so there they are masked).
sm_90: TMA descriptors of x [R, In] and weight [E, Out, In]. Others, and tensors whose address or strides are not
multiples of 16 bytes: pointers, cp.async pipelining.

Accumulators are fp32, rounded once when stored; fp32 inputs are multiplied as three tf32 products. No atomics.
int64: row and expert numbers are widened before they meet a stride.

Letters: R rows, E experts, In, Out features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from megallm_kernels.device import on_its_device, target_of

SECTION = 8
"""Row tiles that pass through the column tiles together: 8 x 16 tiles fill a GPU and span 40 MB of 4096 features."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Settings of one launch; of dweight, M are its rows (Out), N its columns (In), K the summed rows."""

    block_m: int
    block_n: int
    block_k: int
    """Terms of one step of the loop."""
    num_warps: int
    num_stages: int
    tma: bool
    """Read through descriptors."""


_Settings = tuple[int, int, int, int, int, bool]
# arch -> (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, TMA), for two-byte elements: experts of few rows, and of many.
_FEW: dict[int, _Settings] = {
    0: (16, 32, 32, 4, 1, False), 80: (64, 128, 64, 4, 4, False), 90: (64, 256, 64, 4, 4, True),
}  # fmt: skip
_MANY: dict[int, _Settings] = {
    0: (32, 32, 32, 4, 1, False), 80: (128, 128, 64, 8, 3, False), 90: (128, 256, 64, 8, 4, True),
}  # fmt: skip
_DWEIGHT: dict[int, _Settings] = {
    0: (32, 32, 16, 4, 1, False), 80: (128, 128, 64, 8, 3, False), 90: (128, 256, 64, 8, 3, True),
}  # fmt: skip
# fp32 inputs, every arch but 0.
_WIDE: _Settings = (64, 64, 32, 4, 3, False)

FEW_ROWS = 64
"""Up to so many rows an expert, on average, a tile of 128 would be mostly empty."""


def plan(arch: int, rows_per_expert: int, *, dweight: bool, element_bytes: int, aligned: bool) -> Launch:
    """Launch settings; `aligned`: addresses and strides are multiples of 16 bytes."""
    table = _DWEIGHT if dweight else _FEW if rows_per_expert <= FEW_ROWS else _MANY
    settings = table[0] if arch == 0 else table[90 if 90 <= arch < 100 and aligned else 80]
    if element_bytes > 2 and arch:
        settings = _WIDE
    block_m, block_n, block_k, num_warps, num_stages, tma = settings
    return Launch(
        block_m=block_m, block_n=block_n, block_k=block_k, num_warps=num_warps, num_stages=num_stages,
        tma=tma and aligned,
    )  # fmt: skip


@triton.jit
def _tile(program, num_row_tiles, num_column_tiles, SECTION: tl.constexpr):
    """(row tile, column tile): sections of SECTION row tiles; in one, rows first, then columns."""
    first = program // (num_column_tiles * SECTION) * SECTION
    size = tl.minimum(SECTION, num_row_tiles - first)
    inside = program - first * num_column_tiles
    return first + inside % size, inside // size


@triton.jit
def _expert_of(tile, offsets, num_experts, BLOCK: tl.constexpr):
    """(expert, its first row, the tile's first row) of a row tile; expert E: the rows past the last."""
    low = 0
    high = num_experts
    while low < high:
        middle = (low + high + 1) // 2
        reached = tl.load(offsets + middle) // BLOCK + middle <= tile
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    start = tl.load(offsets + low)
    return low, start + (tile - start // BLOCK - low) * BLOCK


@triton.jit(do_not_specialize=["num_rows", "num_experts"])
def rows_kernel(
    x, weight, y, offsets, num_rows, num_experts, n, k, x_row, w_expert, w_n, w_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SECTION: tl.constexpr, EVEN: tl.constexpr,
    K_MAJOR: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of y [R, n] = x [R, k] times weight [E, n, k]. EVEN: n and k are multiples of their blocks.

    TMA: x is a descriptor, weight one of [E, n, k] if K_MAJOR, else of [E, k, n].
    """
    num_row_tiles = num_rows // BLOCK_M + num_experts + 1
    tile, column_tile = _tile(tl.program_id(0), num_row_tiles, tl.cdiv(n, BLOCK_N), SECTION)
    expert, first = _expert_of(tile, offsets, num_experts, BLOCK_M)
    end = tl.load(offsets + expert + 1, mask=expert < num_experts, other=num_rows)
    if first >= end:
        return
    length = tl.where(expert < num_experts, k, 0)
    row = first + tl.arange(0, BLOCK_M)
    first_column = column_tile * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if TMA:
        for at in range(0, length, BLOCK_K):
            a = x.load([first, at])
            if K_MAJOR:
                b = weight.load([expert, first_column, at]).reshape(BLOCK_N, BLOCK_K).T
            else:
                b = weight.load([expert, at, first_column]).reshape(BLOCK_K, BLOCK_N)
            acc = tl.dot(a, b, acc)
    else:
        precision: tl.constexpr = "tf32x3" if x.dtype.element_ty == tl.float32 else "tf32"
        term = tl.arange(0, BLOCK_K)
        wide = tl.minimum(row, num_rows - 1).to(tl.int64)
        at_a = x + wide[:, None] * x_row + term[None, :]
        at_b = weight + expert.to(tl.int64) * w_expert
        at_b += term.to(tl.int64)[:, None] * w_k + column.to(tl.int64)[None, :] * w_n
        for at in range(0, length, BLOCK_K):
            if EVEN:
                a = tl.load(at_a)
                b = tl.load(at_b)
            else:
                a = tl.load(at_a, mask=(term < k - at)[None, :], other=0.0)
                b = tl.load(at_b, mask=(term < k - at)[:, None] & (column < n)[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=precision)
            at_a += BLOCK_K
            at_b += tl.cast(w_k, tl.int64) * BLOCK_K
    at_y = y + row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(at_y, acc.to(y.dtype.element_ty), mask=(row < end)[:, None] & (column < n)[None, :])


@triton.jit
def dweight_kernel(
    dy_tiles, x_tiles, dy, x, dweight, offsets, m, n, dy_row, x_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SECTION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of one expert of dweight [E, m, n] = dy [R, m]^T x [R, n]. TMA: dy_tiles and x_tiles are descriptors."""
    num_m_tiles = tl.cdiv(m, BLOCK_M)
    num_n_tiles = tl.cdiv(n, BLOCK_N)
    tiles_per_expert = num_m_tiles * num_n_tiles
    expert = tl.program_id(0) // tiles_per_expert
    m_tile, n_tile = _tile(tl.program_id(0) % tiles_per_expert, num_m_tiles, num_n_tiles, SECTION)
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    out_row = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    term = tl.arange(0, BLOCK_K)
    precision: tl.constexpr = "tf32x3" if dweight.dtype.element_ty == tl.float32 else "tf32"
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    masked_from = start
    if TMA:  # whole steps; the rest must not reach into the next expert
        masked_from += (end - start) // BLOCK_K * BLOCK_K
        for first in range(start, masked_from, BLOCK_K):
            a = dy_tiles.load([first, m_tile * BLOCK_M])
            b = x_tiles.load([first, n_tile * BLOCK_N])
            acc = tl.dot(a.T, b, acc)
    for first in range(masked_from, end, BLOCK_K):
        row = first + term
        wide = row.to(tl.int64)
        at_a = dy + wide[None, :] * dy_row + out_row[:, None]  # transposed here: cp.async then pipelines it on sm_80
        a = tl.load(at_a, mask=(row < end)[None, :] & (out_row < m)[:, None], other=0.0)
        at_b = x + wide[:, None] * x_row + column[None, :]
        b = tl.load(at_b, mask=(row < end)[:, None] & (column < n)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=precision)
    at = dweight + (expert.to(tl.int64) * m + out_row)[:, None] * n + column[None, :]
    tl.store(at, acc.to(dweight.dtype.element_ty), mask=(out_row < m)[:, None] & (column < n)[None, :])


def _unit_columns(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _aligned(x: torch.Tensor) -> bool:
    """TMA can read x: address and strides are multiples of 16 bytes, and rows do not overlap."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and all(s > 0 and s % 16 == 0 for s in steps)


def _check(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 3 or x.size(1) != weight.size(2):
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} are not [R, In] and [E, Out, In] of the same In"
        )
    if offsets.shape != (weight.size(0) + 1,) or offsets.dtype != torch.int32:
        found = f"{tuple(offsets.shape)} {offsets.dtype}"
        raise ValueError(f"offsets {found} are not [E + 1] int32 for E = {weight.size(0)}: use sort_by_expert's")
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype}: cast one of them")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x is {x.dtype}: this kernel takes float32, float16 and bfloat16, grouped_gemm_reference any")


@on_its_device
def product(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """y [R, N] of x [R, K], weight [E, N, K] of any strides, offsets [E + 1] int32; see `grouped_gemm`."""
    (num_rows, k), (num_experts, n) = x.shape, weight.shape[:2]
    y = torch.empty((num_rows, n), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if k == 0 or num_experts == 0:
        return y.zero_()
    x = _unit_columns(x)
    if 1 not in weight.stride()[1:]:
        weight = weight.contiguous()
    k_major = weight.stride(2) == 1
    stored = weight if k_major else weight.transpose(1, 2)
    launch = plan(
        target_of(x).arch, num_rows // num_experts, dweight=False, element_bytes=x.element_size(),
        aligned=_aligned(x) and _aligned(stored),
    )  # fmt: skip
    sources: tuple[Any, Any] = (x, weight)
    if launch.tma:
        box = [1, launch.block_n, launch.block_k] if k_major else [1, launch.block_k, launch.block_n]
        x_tiles = TensorDescriptor.from_tensor(x, [launch.block_m, launch.block_k])
        sources = (x_tiles, TensorDescriptor.from_tensor(stored, box))
    row_tiles = num_rows // launch.block_m + num_experts + 1
    rows_kernel[(row_tiles * triton.cdiv(n, launch.block_n),)](
        *sources, y, offsets, num_rows, num_experts, n, k, x.stride(0), *weight.stride(),
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, SECTION=SECTION,
        EVEN=n % launch.block_n == 0 and k % launch.block_k == 0, K_MAJOR=k_major, TMA=launch.tma,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return y


@on_its_device
def weight_gradient(dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """dweight [E, Out, In] in x's dtype of dy [R, Out] and x [R, In]."""
    num_experts, m, n = offsets.numel() - 1, dy.size(1), x.size(1)
    dweight = torch.empty((num_experts, m, n), dtype=x.dtype, device=x.device)
    if dweight.numel() == 0:
        return dweight
    if x.size(0) == 0:
        return dweight.zero_()
    dy, x = _unit_columns(dy), _unit_columns(x)
    launch = plan(
        target_of(x).arch, 0, dweight=True, element_bytes=x.element_size(), aligned=_aligned(dy) and _aligned(x)
    )
    tiles: tuple[Any, Any] = (dy, x)
    if launch.tma:
        dy_tiles = TensorDescriptor.from_tensor(dy, [launch.block_k, launch.block_m])
        tiles = (dy_tiles, TensorDescriptor.from_tensor(x, [launch.block_k, launch.block_n]))
    dweight_kernel[(num_experts * triton.cdiv(m, launch.block_m) * triton.cdiv(n, launch.block_n),)](
        *tiles, dy, x, dweight, offsets, m, n, dy.stride(0), x.stride(0),
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, SECTION=SECTION, TMA=launch.tma,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return dweight


@torch.library.custom_op("megallm_kernels::grouped_gemm", mutates_args=())
def grouped_gemm(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """y [R, Out]: rows offsets[e] to offsets[e + 1] of x [R, In] times weight[e]^T of [E, Out, In]; the rest zeros.

    offsets [E + 1] int32 on the device, ascending from 0 to at most R; it is not checked, as that would wait for it.
    """
    _check(x, weight, offsets)
    return product(x, weight, offsets.contiguous())


@torch.library.custom_op("megallm_kernels::grouped_gemm_backward", mutates_args=())
def grouped_gemm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, needs_dx: bool, needs_dweight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx [R, In], dweight [E, Out, In]); [0] where not needed."""
    offsets = offsets.contiguous()
    dx = product(dy, weight.transpose(1, 2), offsets) if needs_dx else x.new_empty(0)
    return dx, weight_gradient(dy, x, offsets) if needs_dweight else weight.new_empty(0)


@grouped_gemm.register_fake
def _grouped_gemm_fake(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.size(0), weight.size(1)))


@grouped_gemm_backward.register_fake
def _grouped_gemm_backward_fake(dy, x, weight, offsets, needs_dx, needs_dweight) -> Any:  # type: ignore[no-untyped-def]
    dx = x.new_empty(x.shape if needs_dx else (0,))
    return dx, weight.new_empty(weight.shape if needs_dweight else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grad(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    needs_dx, needs_dweight, _ = ctx.needs_input_grad
    dx, dweight = grouped_gemm_backward(dy, *ctx.saved_tensors, needs_dx, needs_dweight)
    return dx if needs_dx else None, dweight if needs_dweight else None, None


grouped_gemm.register_autograd(_grad, setup_context=_save)


def grouped_gemm_reference(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """What `grouped_gemm` computes, by a loop over the experts that waits for the offsets; differentiable."""
    bounds = offsets.tolist()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = [x[a:b].to(wide) @ w.to(wide).T for a, b, w in zip(bounds, bounds[1:], weight, strict=False)]
    parts.append(x.new_zeros((x.size(0) - bounds[-1], weight.size(1)), dtype=wide))
    return torch.cat(parts).to(x.dtype)


def torch_refusal(x: torch.Tensor, weight: torch.Tensor) -> str:
    """Why `torch_grouped_mm` should not take these, in words, or "" (as of torch 2.11 to 2.13)."""
    if not all(_aligned(t) for t in (x, weight if weight.stride(-1) == 1 else weight.transpose(1, 2))):
        return "torch's grouped product needs addresses and strides that are multiples of 16 bytes"
    if weight.size(1) * weight.element_size() % 16:
        return "torch's grouped product needs output rows that are multiples of 16 bytes"
    arch = target_of(x).arch
    if x.is_cuda and not (x.dtype == torch.bfloat16 and arch == 90):
        # elsewhere a loop that waits for the offsets; on sm_100 no zeros for an empty expert (pytorch #172439)
        return f"torch's grouped product is only as wanted in bf16 on sm_90, not {x.dtype} on sm_{arch}"
    return ""


def torch_grouped_mm(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`grouped_gemm` by torch's own kernel, ValueError where that cannot run.

    Rows past offsets[E], of y and of dx, are not written and may hold NaN (pytorch #154557): nothing may read them, not
    even times zero. torch 2.11 to 2.13 have it as torch.nn.functional.grouped_mm, over torch._grouped_mm; it takes the
    ends of the groups, and under torch.compile bf16 alone.
    """
    refusal = torch_refusal(x, weight)
    if refusal:
        raise ValueError(f"{refusal}: use grouped_gemm for x {tuple(x.shape)}, weight {tuple(weight.shape)}")
    return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets[1:])
