"""RMSNorm and LayerNorm over the last dimension, forward and backward, alone or after a residual addition.

    s = x + residual                         (the fused form; s is returned as the new residual, in x's dtype)
    rms_norm    y = s r w                    r = 1 / sqrt(mean(s^2) + eps)          (arXiv 1910.07467)
    layer_norm  y = (s - m) r w + b          m = mean(s), r = 1 / sqrt(var(s) + eps)   (arXiv 1607.06450)

    u = (s - m) r,  g = dy w:    ds = r (g - u mean(g u) - mean(g)) + dnew_residual      (no mean(g) term for RMSNorm)
    dw = sum over rows of dy u,  db = sum over rows of dy

Bytes per element in bf16: forward 4 (8 with the addition), backward 6 (8 with it); FLOPs do not matter.
Tiling: a program holds ROWS whole rows in registers, [ROWS, BLOCK], BLOCK the power of two at or above H. Backward is
persistent: a fixed number of programs walk over the rows, each keeps its sums of dw and db and writes one row of a
[programs, H] buffer, which is then summed: no atomics, so the result does not depend on timing. The longest rows leave
no registers for the sums of LayerNorm or of fp32: there a kernel of its own reads x and dy again, by blocks of columns.
Every accumulator and statistic is fp32; a result is rounded once, when it is stored.
int64: row numbers (below 2^31) are divided as int32 and widened before they meet a stride; offsets inside a row stay
int32.

Letters: R rows = R0 * R1 (see rows.py), H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from megallm_kernels.device import check_dtypes, on_its_device, shared_limit_bytes, target_of
from megallm_kernels.rows import as_rows, next_power_of_2

MAX_HIDDEN = 16384
"""Longest row: beyond it one program's registers no longer hold a row (plain Triton has no cluster reduction)."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Settings of one launch."""

    rows: int
    """Rows a program holds at a time (ROWS)."""
    block: int
    """Columns of the tile (BLOCK), a power of two."""
    num_warps: int
    programs_per_sm: int
    """Of the persistent backward."""
    stages: int
    """Tiles of the persistent backward that are on their way from memory at a time (cp.async), the current one too."""
    sums_apart: bool
    """Whether dweight and dbias have a kernel of their own."""


# (largest BLOCK, elements a tile, warps, programs per multiprocessor, stages, sums apart), the last three for backward;
# 16 bytes a thread and access. The longest rows leave no registers for a second tile.
_Row = tuple[int, int, int, int, int, bool]
_FORWARD: tuple[_Row, ...] = (
    (1024, 2048, 4, 0, 1, False), (4096, 4096, 8, 0, 1, False), (8192, 8192, 8, 0, 1, False),
    (16384, 16384, 16, 0, 1, False),
)  # fmt: skip
_BACKWARD: tuple[_Row, ...] = (
    (256, 1024, 4, 8, 3, False), (1024, 2048, 4, 4, 3, False), (4096, 4096, 8, 2, 3, False),
    (8192, 8192, 16, 1, 3, False), (16384, 16384, 32, 1, 1, False),
)  # fmt: skip
_CROWDED_BACKWARD: tuple[_Row, ...] = (*_BACKWARD[:-1], (16384, 16384, 32, 1, 1, True))
"""Of LayerNorm, of fp32, and on GPUs other than sm_80 and sm_90. Past 8192 LayerNorm in fp32 still spills: stacks of 48
bytes (sm_90) and 32 (sm_80) with Triton 3.6, of 8 (sm_90) with 3.9."""
# Rows whose length is not a multiple of 16 are read element by element, with an address and a mask each. Past 8192 they
# spill (Triton 3.9): stacks of up to 120 bytes forward and 40 backward on sm_90, 16 and 16 on sm_80.
_UNALIGNED_FORWARD: tuple[_Row, ...] = (*_FORWARD[:-2], (8192, 8192, 16, 0, 1, False), (16384, 16384, 32, 0, 1, False))
_UNALIGNED_BACKWARD: tuple[_Row, ...] = (
    (256, 1024, 4, 8, 1, False), (1024, 2048, 4, 4, 1, False), (4096, 4096, 16, 2, 1, False),
    (8192, 8192, 32, 1, 1, True), (16384, 16384, 32, 1, 1, True),
)  # fmt: skip

_REDUCTION_BYTES = 1024
"""Shared memory of the backward besides its stages: sums that the warps exchange."""


def plan(hidden_size: int, *, backward: bool, arch: int = 0, element_bytes: int = 2, centered: bool = False) -> Launch:
    """Launch settings for rows of `hidden_size` elements; ValueError if one row is too long or the GPU too old."""
    block = next_power_of_2(hidden_size)
    limit_bytes = shared_limit_bytes(arch) - _REDUCTION_BYTES
    crowded = centered or element_bytes > 2 or arch not in (0, 80, 90)
    if backward:
        table = _UNALIGNED_BACKWARD if hidden_size % 16 else _CROWDED_BACKWARD if crowded else _BACKWARD
    else:
        table = _UNALIGNED_FORWARD if hidden_size % 16 else _FORWARD
    for largest, elements, num_warps, programs_per_sm, stages, sums_apart in table:
        if block <= largest:
            rows = max(elements // block, 1)
            fitting = limit_bytes // (2 * rows * block * element_bytes)  # of x and dy
            return Launch(
                rows=rows, block=block, num_warps=num_warps, programs_per_sm=programs_per_sm,
                stages=max(min(stages, fitting), 1), sums_apart=sums_apart,
            )  # fmt: skip
    raise ValueError(f"hidden size {hidden_size} is over {MAX_HIDDEN}, the longest row of this kernel: use torch's")


@triton.jit
def _at(row, column, inner_rows, outer, inner):
    """Offsets [ROWS, BLOCK] of rows that lie `outer` and `inner` apart; rows.py."""
    return ((row // inner_rows).to(tl.int64) * outer + (row % inner_rows).to(tl.int64) * inner)[:, None] + column


@triton.jit
def forward_kernel(
    x, residual, weight, bias, y, new_residual, mean, rstd,
    num_rows, hidden, x_inner_rows, x_outer, x_inner, res_inner_rows, res_outer, res_inner, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CENTERED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One tile of rows. CENTERED: LayerNorm. ADD: x + residual first."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (column < hidden)[None, :]
    s = tl.load(x + _at(row, column, x_inner_rows, x_outer, x_inner), mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < hidden, other=0.0)
    out = row.to(tl.int64)[:, None] * hidden + column
    if ADD:
        at = _at(row, column, res_inner_rows, res_outer, res_inner)
        s += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = s.to(new_residual.dtype.element_ty)
        tl.store(new_residual + out, rounded, mask=inside)
        s = rounded.to(tl.float32)  # backward sees the stored sum, so forward normalises the same numbers
    if CENTERED:
        m = tl.sum(s, axis=1) / hidden
        tl.store(mean + row, m, mask=row < num_rows)
        s = tl.where(inside, s - m[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(s * s, axis=1) / hidden + tl.cast(eps, tl.float32))
    tl.store(rstd + row, r, mask=row < num_rows)
    result = s * r[:, None] * w.to(tl.float32)[None, :]
    if CENTERED:
        result += tl.load(bias + column, mask=column < hidden, other=0.0).to(tl.float32)[None, :]
    tl.store(y + out, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dy, x, weight, mean, rstd, dnew_residual, dx, dweight, dbias,
    num_rows, hidden, x_inner_rows, x_outer, x_inner, dy_inner_rows, dy_outer, dy_inner, dres_inner_rows, dres_outer,
    dres_inner, ROWS: tl.constexpr, BLOCK: tl.constexpr, CENTERED: tl.constexpr, ADD: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program p walks over tiles p, p + programs, ...; writes row p of dweight and dbias [programs, H] fp32."""
    column = tl.arange(0, BLOCK)
    in_row = column < hidden
    w = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], dtype=tl.float32)
    db = tl.zeros([BLOCK], dtype=tl.float32)
    # disable_licm: addresses computed ahead of the loop would take registers that the longest rows need
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES, disable_licm=True
    ):
        row = tile * ROWS + tl.arange(0, ROWS)
        in_rows = row < num_rows
        inside = in_rows[:, None] & in_row[None, :]
        u = tl.load(x + _at(row, column, x_inner_rows, x_outer, x_inner), mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + _at(row, column, dy_inner_rows, dy_outer, dy_inner), mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=in_rows, other=0.0)
        if CENTERED:
            u -= tl.load(mean + row, mask=in_rows, other=0.0)[:, None]  # past the row's end g is 0: no effect
        u *= r[:, None]
        if NEEDS_DWEIGHT:
            dw += tl.sum(g * u, axis=0)
            if CENTERED:
                db += tl.sum(g, axis=0)
        if BLOCK > 8192:  # the longest rows fill the registers: take the weight from the cache again
            w = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
        g *= w[None, :]
        ds = g - u * (tl.sum(g * u, axis=1) / hidden)[:, None]
        if CENTERED:
            ds -= (tl.sum(g, axis=1) / hidden)[:, None]
        ds *= r[:, None]
        if ADD:  # loaded last: a row of it held from the start would spill
            at = _at(row, column, dres_inner_rows, dres_outer, dres_inner)
            ds += tl.load(dnew_residual + at, mask=inside, other=0.0).to(tl.float32)
        at = (row.to(tl.int64) * hidden)[:, None] + column
        tl.store(dx + at, ds.to(dx.dtype.element_ty), mask=inside)
    if NEEDS_DWEIGHT:
        at = tl.program_id(0) * hidden + column
        tl.store(dweight + at, dw, mask=in_row)
        if CENTERED:
            tl.store(dbias + at, db, mask=in_row)


_APART_ROWS, _APART_COLUMNS = 16, 128
"""Tile of the sums apart: 256-byte pieces of bf16 rows, 16 elements a thread and operand."""
_APART_PARTIAL = 16
"""Most partial sums of a column: with the 65 or more blocks of columns enough programs for any GPU, and few to add."""


@triton.jit
def sums_kernel(
    dy, x, mean, rstd, dweight, dbias,
    num_rows, hidden, x_inner_rows, x_outer, x_inner, dy_inner_rows, dy_outer, dy_inner,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of row p of dweight and dbias [programs, H] fp32, over the tiles p, p + programs, ... of rows."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_row = column < hidden
    dw = tl.zeros([COLUMNS], dtype=tl.float32)
    db = tl.zeros([COLUMNS], dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        in_rows = row < num_rows
        inside = in_rows[:, None] & in_row[None, :]
        u = tl.load(x + _at(row, column, x_inner_rows, x_outer, x_inner), mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + _at(row, column, dy_inner_rows, dy_outer, dy_inner), mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=in_rows, other=0.0)
        if CENTERED:
            u -= tl.load(mean + row, mask=in_rows, other=0.0)[:, None]
            db += tl.sum(g, axis=0)
        dw += tl.sum(g * (u * r[:, None]), axis=0)
    at = tl.program_id(0) * hidden + column
    tl.store(dweight + at, dw, mask=in_row)
    if CENTERED:
        tl.store(dbias + at, db, mask=in_row)


_SUM_ROWS, _SUM_COLUMNS = 64, 32
"""Tile of the second pass: 32 fp32 columns are one 128-byte line of each row."""


@triton.jit
def sum_rows_kernel(partial, out, num_rows, hidden, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Column sums of partial [num_rows, hidden] fp32 into out [hidden], rounded once."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (column < hidden)[None, :]
        total += tl.load(partial + row.to(tl.int64)[:, None] * hidden + column[None, :], mask=inside, other=0.0)
    tl.store(out + column, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=column < hidden)


_Outputs = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`as_rows`, of a copy where long rows could not be read 16 bytes at a time but a copy's can."""
    rows = as_rows(x)
    regular = rows.data_ptr() % 16 == 0 and all(rows.stride(i) % 16 == 0 for i in (0, 1) if rows.size(i) > 1)
    if regular or x.size(-1) <= 1024 or x.size(-1) % 16:
        return rows
    return as_rows(x.clone(memory_format=torch.contiguous_format))


def _strides(rows: torch.Tensor) -> tuple[int, int, int]:
    hidden = rows.size(2)  # a dimension of size 1 may have any stride: give one that is aligned where rows are
    outer, inner = (rows.stride(i) if rows.size(i) > 1 else hidden for i in (0, 1))
    return rows.size(1), outer, inner


def _check(x: torch.Tensor, **others: torch.Tensor | None) -> None:
    """ValueError unless weight and bias are [H], the others shaped as x, all on x's device and of 16 or 32 bits,
    rows below 2^31."""
    check_dtypes(x=x, **others)
    if x.dim() == 0 or x.numel() // max(x.size(-1), 1) >= 2**31:
        raise ValueError(f"x {tuple(x.shape)} is not [..., H] with fewer than 2^31 rows")
    for name, other in others.items():
        wanted = x.shape[-1:] if name in ("weight", "bias") else x.shape
        if other is not None and (other.shape != wanted or other.device != x.device):
            found = f"{tuple(other.shape)} on {other.device}"
            raise ValueError(f"{name} is {found}, for x {tuple(x.shape)} it must be {tuple(wanted)} on {x.device}")


@on_its_device
def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, residual: torch.Tensor | None = None
) -> _Outputs:
    """(y, new residual, mean [R] or [0], rstd [R] fp32) of x [..., H]; LayerNorm where a bias [H] is given."""
    hidden = x.size(-1)
    _check(x, weight=weight, bias=bias, residual=residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new_residual = None if residual is None else torch.empty_like(y)
    num_rows = y.numel() // max(hidden, 1)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    mean = rstd.new_empty(0 if bias is None else num_rows)
    launch = plan(hidden, backward=False, arch=target_of(x).arch, element_bytes=x.element_size())
    if y.numel() == 0:
        return y, new_residual, mean, rstd
    rows = _rows(x)
    added = rows if residual is None else _rows(residual)
    weight, bias = weight.contiguous(), weight if bias is None else bias.contiguous()
    forward_kernel[(triton.cdiv(num_rows, launch.rows),)](
        rows, added, weight, bias, y, y if new_residual is None else new_residual, mean, rstd,
        num_rows, hidden, *_strides(rows), *_strides(added), eps,
        ROWS=launch.rows, BLOCK=launch.block, CENTERED=mean.numel() > 0, ADD=residual is not None,
        num_warps=launch.num_warps,
    )  # fmt: skip
    return y, new_residual, mean, rstd


@on_its_device
def backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, *,
    centered: bool, dnew_residual: torch.Tensor | None, needs_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dx [..., H], dweight, dbias) for the x that was normalised; the last two [0] where not needed."""
    hidden, num_rows = x.size(-1), rstd.numel()
    _check(x, weight=weight, dy=dy, dnew_residual=dnew_residual)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    target = target_of(x)
    element_bytes = max(x.element_size(), dy.element_size())
    launch = plan(hidden, backward=True, arch=target.arch, element_bytes=element_bytes, centered=centered)
    num_programs = min(triton.cdiv(num_rows, launch.rows), target.num_sms * launch.programs_per_sm)
    num_partial = num_programs
    if launch.sums_apart:
        num_partial = min(triton.cdiv(num_rows, _APART_ROWS), _APART_PARTIAL)
    partial = torch.empty((2, num_partial if needs_dweight else 0, hidden), dtype=torch.float32, device=x.device)
    if num_rows:
        rows, drows = _rows(x), _rows(dy)
        dres = drows if dnew_residual is None else _rows(dnew_residual)
        mean, rstd = mean.contiguous(), rstd.contiguous()
        backward_kernel[(num_programs,)](
            drows, rows, weight.contiguous(), mean, rstd, dres, dx, *partial,
            num_rows, hidden, *_strides(rows), *_strides(drows), *_strides(dres),
            ROWS=launch.rows, BLOCK=launch.block, CENTERED=centered, ADD=dnew_residual is not None,
            NEEDS_DWEIGHT=needs_dweight and not launch.sums_apart, STAGES=launch.stages, num_warps=launch.num_warps,
        )  # fmt: skip
        if needs_dweight and launch.sums_apart:
            sums_kernel[(num_partial, triton.cdiv(hidden, _APART_COLUMNS))](
                drows, rows, mean, rstd, *partial, num_rows, hidden, *_strides(rows), *_strides(drows),
                ROWS=_APART_ROWS, COLUMNS=_APART_COLUMNS, CENTERED=centered, num_warps=4,
            )  # fmt: skip
    if not needs_dweight:
        return dx, weight.new_empty(0), weight.new_empty(0)
    sums = [torch.empty(hidden, dtype=weight.dtype, device=x.device) for _ in range(1 + centered)]
    for each, rows_of_sums in zip(sums, partial, strict=False):
        sum_rows_kernel[(triton.cdiv(hidden, _SUM_COLUMNS),)](
            rows_of_sums, each, num_partial, hidden, ROWS=_SUM_ROWS, COLUMNS=_SUM_COLUMNS, num_warps=4
        )
    return dx, sums[0], sums[1] if centered else weight.new_empty(0)


@torch.library.custom_op("megallm_kernels::norm", mutates_args=())
def norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean, rstd): RMSNorm of x [..., H] without a bias, LayerNorm with one. Differentiable in y."""
    y, _, mean, rstd = forward(x, weight, bias, eps)
    return y, mean, rstd


@torch.library.custom_op("megallm_kernels::add_norm", mutates_args=())
def add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, new residual, mean, rstd): the norm of new residual = x + residual. Differentiable in the first two."""
    y, new_residual, mean, rstd = forward(x, weight, bias, eps, residual)
    assert new_residual is not None
    return y, new_residual, mean, rstd


@torch.library.custom_op("megallm_kernels::norm_backward", mutates_args=())
def norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, centered: bool,
    dnew_residual: torch.Tensor | None, needs_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dx, dweight, dbias); see `backward`."""
    return backward(
        dy, x, weight, mean, rstd, centered=centered, dnew_residual=dnew_residual, needs_dweight=needs_dweight
    )


def _fake_stats(x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows = x.numel() // x.size(-1)
    rstd = x.new_empty(num_rows, dtype=torch.float32)
    return x.new_empty(0 if bias is None else num_rows, dtype=torch.float32), rstd


def _fake_like(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


@norm.register_fake
def _norm_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> Any:
    return (_fake_like(x), *_fake_stats(x, bias))


@add_norm.register_fake
def _add_norm_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> Any:
    return (_fake_like(x), _fake_like(x), *_fake_stats(x, bias))


@norm_backward.register_fake
def _norm_backward_fake(dy, x, weight, mean, rstd, centered, dnew_residual, needs_dweight) -> Any:  # type: ignore[no-untyped-def]
    hidden = x.size(-1)
    dweight = weight.new_empty(hidden if needs_dweight else 0)
    return _fake_like(x), dweight, weight.new_empty(hidden if needs_dweight and centered else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    """Of both forms: what was normalised, the weight and the statistics."""
    weight, bias = inputs[-3], inputs[-2]
    normalised = inputs[0] if len(inputs) == 4 else output[1]
    ctx.save_for_backward(normalised, weight, *output[-2:])
    ctx.centered = bias is not None
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: torch.Tensor | None, dnew_residual: torch.Tensor | None) -> tuple[Any, Any, Any]:
    x, weight, mean, rstd = ctx.saved_tensors
    if dy is None:  # only the residual was used
        return dnew_residual, None, None
    needs_dweight = any(ctx.needs_input_grad[-3:-1])
    dx, dw, db = norm_backward(dy, x, weight, mean, rstd, ctx.centered, dnew_residual, needs_dweight)
    return dx, dw if needs_dweight else None, db if needs_dweight and ctx.centered else None


def _norm_grad(ctx: Any, dy: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    return (*_gradients(ctx, dy, None), None)


def _add_norm_grad(ctx: Any, dy: torch.Tensor | None, dnew_residual: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    dx, dw, db = _gradients(ctx, dy, dnew_residual)
    return dx, dx, dw, db, None


norm.register_autograd(_norm_grad, setup_context=_save)
add_norm.register_autograd(_add_norm_grad, setup_context=_save)
