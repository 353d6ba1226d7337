"""Rows sorted by expert and back: what a mixture of experts does before and after its grouped products.

    rows[destination[t, s]] = x[t]                                        permute     (rows of no slot: zeros)
    y[t] = sum over s of weights[t, s] rows[destination[t, s]]            unpermute   (weights None: all one)

    backward:  dx[t] = sum over s of drows[destination[t, s]]             = unpermute without weights
               drows[destination[t, s]] = weights[t, s] dy[t],  dweights[t, s] = sum over h of dy[t] rows[...]

    expert_ids [T, k]  --sort_by_expert-->  source [R]          row -> slot t * k + s, or -1
                                            destination [T, k]  slot -> row, or -1: dropped
                                            offsets [E + 1]     rows offsets[e] to offsets[e + 1] are expert e's

Bytes per element of x in bf16: permute 2 (k + 1), since a token is read once and written k times (a gather by row would
take 4 k); unpermute 2 (k + 1); its backward 2 (2 k + 1). Nothing is computed beyond k products an element.
Tiling: [ROWS, BLOCK] of tokens and columns; the programs after the tokens' write zeros to the rows of no slot. Backward
of unpermute holds whole rows up to MAX_BLOCK columns, for the sums of dweights; longer rows are walked over.
Sums are fp32, over s in order, rounded once when stored; every element is written by one program: no atomics.
int64: row numbers (tokens and rows) are widened before they meet a stride; columns are int32 (H < 2^31).

Letters: T tokens, H hidden, E experts, k experts per token, R rows: T k, more where experts are padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from megallm_kernels.device import on_its_device
from megallm_kernels.rows import next_power_of_2

MAX_BLOCK = 8192
"""Longest row that the backward of unpermute holds in registers."""


class ExpertOrder(NamedTuple):
    """Where every slot (token, choice of expert) goes; int32 on the device of the expert numbers."""

    source: torch.Tensor
    """[R]: the slot t * k + s that a row comes from; -1: a row of padding or one left over by dropped slots."""
    destination: torch.Tensor
    """[T, k]: the row of each slot; -1: dropped."""
    counts: torch.Tensor
    """[E]: slots of each expert, without padding."""
    offsets: torch.Tensor
    """[E + 1]: the first row of each expert, padding included, and the end."""


def sort_by_expert(expert_ids: torch.Tensor, num_experts: int, *, multiple: int = 1) -> ExpertOrder:
    """The order of the slots of expert_ids [T, k] (any integers) by expert, in token order inside an expert.

    Numbers outside 0 to E - 1 drop their slot. `multiple` pads each expert's rows to that multiple; R is then an upper
    bound that follows from T, k and E alone, so nothing waits for the device.
    """
    num_slots = expert_ids.numel()
    if num_experts < 1 or multiple < 1:
        raise ValueError(f"num_experts ({num_experts}) and multiple ({multiple}) must be at least 1")
    num_rows = (num_slots + num_experts * (multiple - 1)) // multiple * multiple
    if num_rows >= 2**31:
        raise ValueError(f"{num_rows} rows do not fit 32-bit row numbers: use fewer tokens per step")
    ids = expert_ids.reshape(-1)
    if torch.iinfo(ids.dtype).max < num_experts:  # num_experts itself stands for dropped slots
        ids = ids.int()
    ids = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)
    ids = ids.to(torch.int16 if num_experts < 2**15 else torch.int32)  # fewer bits: fewer passes of the radix sort
    experts, order = torch.sort(ids, stable=True)
    bounds = torch.arange(num_experts + 1, dtype=ids.dtype, device=ids.device)
    starts = torch.searchsorted(experts, bounds, out_int32=True)  # [E + 1], the last one = slots that are not dropped
    counts = starts.diff()
    experts = experts.long()
    row = torch.arange(num_slots, dtype=torch.int32, device=ids.device)
    if multiple == 1:
        offsets = starts
        source = torch.where(experts < num_experts, order, -1).int()
    else:
        padded = (counts + (multiple - 1)) // multiple * multiple
        offsets = torch.cat([starts.new_zeros(1), padded.cumsum(0, dtype=torch.int32)])
        row = row - starts[experts] + offsets[experts]
        source = _sources(order, starts, offsets, num_rows)
    row = torch.where(experts < num_experts, row, -1)
    destination = torch.empty_like(row).scatter_(0, order, row).view(expert_ids.shape)
    return ExpertOrder(source=source, destination=destination, counts=counts, offsets=offsets)


def _sources(order: torch.Tensor, starts: torch.Tensor, offsets: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[R]: for each row with padding, the slot in it or -1."""
    row = torch.arange(num_rows, dtype=torch.int32, device=order.device)
    expert = torch.searchsorted(offsets, row, right=True) - 1  # E: after the last expert
    at = row - offsets[expert] + starts[expert]
    last = starts[(expert + 1).clamp(max=starts.numel() - 1)]
    padded_order = torch.cat([order, order.new_zeros(1)])
    return torch.where(at < last, padded_order[at.clamp(max=order.numel()).long()], -1).int()


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Settings of one launch."""

    rows: int
    """Tokens a program holds at a time (ROWS)."""
    block: int
    """Columns of the tile (BLOCK), a power of two."""
    num_warps: int


FILL = 64
"""Rows that one program looks through for those without a slot."""

# (largest BLOCK, elements a tile, warps): 16 bytes a thread and access, two accesses a slot.
_COPY = ((2048, 2048, 4),)
_BACKWARD = ((1024, 1024, 4), (4096, 4096, 8), (MAX_BLOCK, MAX_BLOCK, 8))


def plan(hidden_size: int, *, backward: bool) -> Launch:
    """Launch settings for rows of `hidden_size` elements; `backward`: of unpermute with weights."""
    table = _BACKWARD if backward else _COPY
    block = min(next_power_of_2(hidden_size), table[-1][0])
    elements, num_warps = next((e, w) for largest, e, w in table if block <= largest)
    return Launch(rows=max(elements // block, 1), block=block, num_warps=num_warps)


@triton.jit
def _fill_unused(rows, source, program, num_rows, hidden, columns, ROWS: tl.constexpr, FILL: tl.constexpr):
    """Zeros to those of FILL rows that have no slot, in `columns`."""
    first = program * FILL
    looked = first + tl.arange(0, FILL)
    if tl.min(tl.load(source + looked, mask=looked < num_rows, other=0), axis=0) < 0:
        zeros = tl.zeros([ROWS, columns.shape[0]], dtype=rows.dtype.element_ty)
        for start in range(0, FILL, ROWS):
            row = first + start + tl.arange(0, ROWS)
            unused = tl.load(source + row, mask=(row < num_rows) & (row < first + FILL), other=0) < 0
            at = row.to(tl.int64)[:, None] * hidden + columns[None, :]
            tl.store(rows + at, zeros, mask=unused[:, None] & (columns < hidden)[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def permute_kernel(
    x, rows, source, destination, num_tokens, num_rows, hidden, x_row,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles, then tiles of FILL rows; column tiles)."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token_tiles = tl.cdiv(num_tokens, ROWS)
    tile = tl.program_id(0)
    if tile < token_tiles:
        token = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        in_tokens = token < num_tokens
        in_row = (columns < hidden)[None, :]
        numbers = tl.load(x + token[:, None] * x_row + columns[None, :], mask=in_tokens[:, None] & in_row, other=0.0)
        for slot in tl.static_range(K):
            row = tl.load(destination + token * K + slot, mask=in_tokens, other=-1).to(tl.int64)
            tl.store(rows + row[:, None] * hidden + columns[None, :], numbers, mask=(row >= 0)[:, None] & in_row)
    else:
        _fill_unused(rows, source, tile - token_tiles, num_rows, hidden, columns, ROWS, FILL)


@triton.jit(do_not_specialize=["num_tokens"])
def unpermute_kernel(
    rows, destination, weights, y, num_tokens, hidden, rows_row,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles, column tiles): the sum over the K slots of a token, in order, in fp32."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_tokens = token < num_tokens
    in_row = (columns < hidden)[None, :]
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for slot in tl.static_range(K):
        row = tl.load(destination + token * K + slot, mask=in_tokens, other=-1).to(tl.int64)
        at = rows + row[:, None] * rows_row + columns[None, :]
        numbers = tl.load(at, mask=(row >= 0)[:, None] & in_row, other=0.0).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights + token * K + slot, mask=in_tokens & (row >= 0), other=0.0).to(tl.float32)
            numbers *= weight[:, None]
        total += numbers
    at = token[:, None] * hidden + columns[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=in_tokens[:, None] & in_row)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def unpermute_backward_kernel(
    dy, rows, source, destination, weights, drows, dweights, num_tokens, num_rows, hidden, dy_row, rows_row,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FILL: tl.constexpr, BLOCKS: tl.constexpr,
    NEEDS_DWEIGHTS: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles, then tiles of FILL rows). BLOCKS of BLOCK columns hold a row; if one does, dy is read once."""
    token_tiles = tl.cdiv(num_tokens, ROWS)
    tile = tl.program_id(0)
    if tile < token_tiles:
        token = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        in_tokens = token < num_tokens
        columns = tl.arange(0, BLOCK)
        at_dy = dy + token[:, None] * dy_row
        if BLOCKS == 1:
            inside = in_tokens[:, None] & (columns < hidden)[None, :]
            g = tl.load(at_dy + columns[None, :], mask=inside, other=0.0)
        for slot in tl.static_range(K):
            at_slot = token * K + slot
            row = tl.load(destination + at_slot, mask=in_tokens, other=-1).to(tl.int64)
            kept = row >= 0
            weight = tl.load(weights + at_slot, mask=in_tokens & kept, other=0.0).to(tl.float32)
            product = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
            for first in range(0, BLOCKS * BLOCK, BLOCK):
                column = first + columns
                inside = kept[:, None] & (column < hidden)[None, :]
                if BLOCKS > 1:
                    g = tl.load(at_dy + column[None, :], mask=inside, other=0.0)
                wide = g.to(tl.float32)
                if NEEDS_DWEIGHTS:
                    numbers = tl.load(rows + row[:, None] * rows_row + column[None, :], mask=inside, other=0.0)
                    product += tl.where(inside, wide * numbers.to(tl.float32), 0.0)
                out = (wide * weight[:, None]).to(drows.dtype.element_ty)
                tl.store(drows + row[:, None] * hidden + column[None, :], out, mask=inside)
            if NEEDS_DWEIGHTS:
                total = tl.sum(product, axis=1).to(dweights.dtype.element_ty)
                tl.store(dweights + at_slot, total, mask=in_tokens)
    else:
        for first in range(0, BLOCKS * BLOCK, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            _fill_unused(drows, source, tile - token_tiles, num_rows, hidden, columns, ROWS, FILL)


def _unit_columns(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(rows: torch.Tensor, source: torch.Tensor, destination: torch.Tensor) -> None:
    if rows.dim() != 2 or destination.dim() != 2 or source.dim() != 1:
        shapes = f"{tuple(rows.shape)}, {tuple(source.shape)}, {tuple(destination.shape)}"
        raise ValueError(f"shapes {shapes} are not [rows, H], source [R], destination [T, k]: see sort_by_expert")


@on_its_device
def permute_forward(x: torch.Tensor, source: torch.Tensor, destination: torch.Tensor) -> torch.Tensor:
    """Rows [R, H] of x [T, H]; see `permute`."""
    _check(x, source, destination)
    (num_tokens, hidden), num_rows = x.shape, source.numel()
    if num_tokens != destination.size(0):
        raise ValueError(f"x has {num_tokens} tokens, destination {destination.size(0)}: sort the experts of this x")
    rows = torch.empty((num_rows, hidden), dtype=x.dtype, device=x.device)
    if rows.numel():
        x = _unit_columns(x)
        launch = plan(hidden, backward=False)
        tiles = triton.cdiv(num_tokens, launch.rows) + triton.cdiv(num_rows, FILL)
        permute_kernel[(tiles, triton.cdiv(hidden, launch.block))](
            x, rows, source.contiguous(), destination.contiguous(), num_tokens, num_rows, hidden, x.stride(0),
            K=destination.size(1), ROWS=launch.rows, BLOCK=launch.block, FILL=FILL, num_warps=launch.num_warps,
        )  # fmt: skip
    return rows


@on_its_device
def unpermute_forward(rows: torch.Tensor, destination: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """y [T, H] of rows [R, H]; see `unpermute`."""
    (num_tokens, num_slots), hidden = destination.shape, rows.size(1)
    y = torch.empty((num_tokens, hidden), dtype=rows.dtype, device=rows.device)
    if y.numel():
        rows = _unit_columns(rows)
        launch = plan(hidden, backward=False)
        unpermute_kernel[(triton.cdiv(num_tokens, launch.rows), triton.cdiv(hidden, launch.block))](
            rows, destination.contiguous(), rows if weights is None else weights.contiguous(), y,
            num_tokens, hidden, rows.stride(0), K=num_slots, ROWS=launch.rows, BLOCK=launch.block,
            WEIGHTED=weights is not None, num_warps=launch.num_warps,
        )  # fmt: skip
    return y


@torch.library.custom_op("megallm_kernels::permute", mutates_args=())
def permute(x: torch.Tensor, source: torch.Tensor, destination: torch.Tensor) -> torch.Tensor:
    """Rows [R, H]: a copy of x [T, H] for each kept slot, sorted by expert; zeros in rows without a slot."""
    return permute_forward(x, source, destination)


@torch.library.custom_op("megallm_kernels::permute_backward", mutates_args=())
def permute_backward(drows: torch.Tensor, destination: torch.Tensor) -> torch.Tensor:
    """dx [T, H]: the sum of the gradients of a token's copies."""
    return unpermute_forward(drows, destination, None)


@torch.library.custom_op("megallm_kernels::unpermute", mutates_args=())
def unpermute(
    rows: torch.Tensor, source: torch.Tensor, destination: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """y [T, H]: the sum of a token's rows, each times its weight [T, k] (None: one); zeros where all were dropped."""
    _check(rows, source, destination)
    if rows.size(0) != source.numel() or (weights is not None and weights.shape != destination.shape):
        shapes = f"rows {tuple(rows.shape)}, weights {None if weights is None else tuple(weights.shape)}"
        expected = f"source {tuple(source.shape)} and destination {tuple(destination.shape)}"
        raise ValueError(f"{shapes} do not fit {expected}: rows are [R, H], weights [T, k]")
    return unpermute_forward(rows, destination, weights)


@torch.library.custom_op("megallm_kernels::unpermute_backward", mutates_args=())
@on_its_device
def unpermute_backward(
    dy: torch.Tensor, rows: torch.Tensor, source: torch.Tensor, destination: torch.Tensor, weights: torch.Tensor,
    needs_dweights: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(drows [R, H], dweights [T, k], or [0] where not needed)."""
    (num_tokens, num_slots), (num_rows, hidden) = destination.shape, rows.shape
    drows = torch.empty((num_rows, hidden), dtype=rows.dtype, device=rows.device)
    dweights = torch.empty(weights.shape if needs_dweights else 0, dtype=weights.dtype, device=weights.device)
    if drows.numel() == 0:
        return drows, dweights.zero_()
    dy, rows = _unit_columns(dy), _unit_columns(rows)
    launch = plan(hidden, backward=True)
    unpermute_backward_kernel[(triton.cdiv(num_tokens, launch.rows) + triton.cdiv(num_rows, FILL),)](
        dy, rows, source.contiguous(), destination.contiguous(), weights.contiguous(), drows, dweights,
        num_tokens, num_rows, hidden, dy.stride(0), rows.stride(0), K=num_slots, ROWS=launch.rows,
        BLOCK=launch.block, FILL=FILL, BLOCKS=triton.cdiv(hidden, launch.block), NEEDS_DWEIGHTS=needs_dweights,
        num_warps=launch.num_warps,
    )  # fmt: skip
    return drows, dweights


@permute.register_fake
def _permute_fake(x: torch.Tensor, source: torch.Tensor, destination: torch.Tensor) -> torch.Tensor:
    return x.new_empty((source.size(0), x.size(1)))


@permute_backward.register_fake
def _permute_backward_fake(drows: torch.Tensor, destination: torch.Tensor) -> torch.Tensor:
    return drows.new_empty((destination.size(0), drows.size(1)))


@unpermute.register_fake
def _unpermute_fake(
    rows: torch.Tensor, source: torch.Tensor, destination: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    return rows.new_empty((destination.size(0), rows.size(1)))


@unpermute_backward.register_fake
def _unpermute_backward_fake(dy, rows, source, destination, weights, needs_dweights) -> Any:  # type: ignore[no-untyped-def]
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape if needs_dweights else (0,))


def _save_permute(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _permute_grad(ctx: Any, drows: torch.Tensor) -> tuple[Any, ...]:
    return permute_backward(drows, ctx.saved_tensors[0]), None, None


def _save_unpermute(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    rows, source, destination, weights = inputs
    ctx.weighted = weights is not None
    ctx.save_for_backward(source, destination, *((rows, weights) if ctx.weighted else ()))


def _unpermute_grad(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    source, destination, *weighted = ctx.saved_tensors
    if not ctx.weighted:
        return permute(dy, source, destination), None, None, None
    rows, weights = weighted
    needs_dweights = ctx.needs_input_grad[3]
    drows, dweights = unpermute_backward(dy, rows, source, destination, weights, needs_dweights)
    return drows, None, None, dweights if needs_dweights else None


permute.register_autograd(_permute_grad, setup_context=_save_permute)
unpermute.register_autograd(_unpermute_grad, setup_context=_save_unpermute)
