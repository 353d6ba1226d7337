"""Cross-entropy, log-probabilities and entropy over a vocabulary whose columns may lie on several ranks.

For one token with logits x over V columns, label y, smoothing e (arXiv 1512.00567, section 7), z-loss weight z
(arXiv 2204.02311, section 5):

    lse      = log sum_j exp(x_j)                    p_j = exp(x_j - lse)
    loss     = (1 - e) (lse - x_y) + e (lse - sum_j x_j / V) + z lse^2
    entropy  = lse - sum_j p_j x_j
    dx_j     = dloss (p_j (1 + 2 z lse) - (1 - e) [j = y] - e / V) + dlse p_j - dentropy p_j (log p_j + entropy)

A rank holds ids first_column .. first_column + valid_columns - 1; columns from valid_columns on are padding: never part
of a sum, gradient 0. The steps, with the two reductions that the caller makes between them (one rank: none):

    row_max, sums = statistics(logits, labels)       one pass; sums = [sum_exp, label_logit, sum_logits(, weighted)]
    top = all-reduce MAX of row_max [T]              4 T bytes
    rescale_(sums, row_max, top); all-reduce SUM of sums       12 T bytes in one call (16 T with the entropy)
    loss, lse, entropy = losses(top, sums, labels)
    gradient_(logits, labels, lse, ...)              overwrites the logits

Tokens labelled ignore_index are not read: loss, lse, entropy and gradient are 0. Sums and means over the others are the
caller's: nothing here divides by a number of tokens. A label outside the vocabulary is the caller's mistake, and not
noticed: its logit counts as 0.

Bytes per logit in bf16: statistics 2, gradient 4; FLOPs do not matter, exponentials come near: one per logit and pass.
Statistics: a program walks over whole rows, a tile [ROWS, LANES, VECTOR] at a time. A thread keeps the max and the sums
of the lanes it owns (VECTOR = 16 bytes), so the walk has no barrier and one extra exponential per VECTOR; lanes meet
after the last tile. Gradient: one program per tile [ROWS, BLOCK]. The label's own gradient is one fp32 expression,
never read back from the stored rounding.
Every statistic and accumulator is fp32. int64: row numbers are widened before they meet a stride; a row's own offsets
stay int32 (V' < 2^31). No atomics: two runs agree to the bit.

Letters: T tokens, V vocabulary, V' columns of this rank (with padding).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megallm_kernels.device import check_arch, check_dtypes, on_its_device, target_of
from megallm_kernels.rows import next_power_of_2

IGNORE_INDEX = -100
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
"""Row maximum before anything was seen: finite, so that differences of maxima are never NaN."""
NEGLIGIBLE = tl.constexpr(-128.0)
"""A difference of maxima whose exponential is 0 in fp32: farther ones, such as those to the lowest number of a dtype,
which masks an id, are cut off here, or their product with a sum would be infinite, and 0 times that NaN."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Settings of one launch."""

    rows: int
    """Tokens of a tile (ROWS)."""
    block: int
    """Columns of a tile (BLOCK), a power of two; longer rows are walked over."""
    num_warps: int


# (largest V', ROWS, most BLOCK, warps). Statistics: 16 elements a thread take 40
# registers in bf16, so 48 warps of a multiprocessor have 32 bytes a thread under way; 32 elements take 105.
_SMALL = ((256, 8, 256, 4), (512, 4, 512, 4), (1024, 2, 1024, 4))
_STATISTICS = (*_SMALL, (16384, 1, 2048, 4), (1 << 31, 1, 4096, 8))
_GRADIENT = (*_SMALL, (1 << 31, 1, 4096, 4))
_INTERPRETER = ((1 << 31, 16, 256, 4),)


def plan(columns: int, *, arch: int, gradient: bool) -> Launch:
    """Launch settings for rows of `columns` logits; arch 0 is the interpreter. ValueError if the GPU is too old."""
    check_arch(arch)
    table = _INTERPRETER if arch == 0 else _GRADIENT if gradient else _STATISTICS
    for largest, rows, block, num_warps in table:
        if columns <= largest:
            return Launch(rows=rows, block=min(block, max(next_power_of_2(columns), 16)), num_warps=num_warps)
    raise ValueError(f"{columns} columns are over 2^31 - 1, the most that a row may have: shard the vocabulary")


@triton.jit
def _add_tile(x, shown, top, total, plain, weighted, MASKED: tl.constexpr, ENTROPY: tl.constexpr):
    """The lanes' max, sum of exp, sum of x and sum of exp (x - max), after another tile x [ROWS, LANES, VECTOR]."""
    seen = tl.where(shown, x, float("-inf")) if MASKED else x
    new_top = tl.maximum(top, tl.max(seen, axis=2))
    distance = seen - new_top[:, :, None]
    e = tl.exp(distance)
    shrink = tl.exp(top - new_top)
    if ENTROPY:
        weighted = shrink * (weighted + total * tl.maximum(top - new_top, NEGLIGIBLE))
        weighted += tl.sum(e * tl.where(e == 0, 0.0, distance), axis=2)  # e = 0: x may be -inf
    total = total * shrink + tl.sum(e, axis=2)
    plain += tl.sum(tl.where(shown, x, 0.0) if MASKED else x, axis=2)
    return new_top, total, plain, weighted


@triton.jit(do_not_specialize=["num_rows", "first_column", "valid_columns", "ignore_index", "sums_stride"])
def statistics_kernel(
    logits, labels, row_max, sums,
    num_rows, columns, row_stride, label_stride, sums_stride, first_column, valid_columns, ignore_index,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """A few whole rows; row_max [T] and sums [3 or 4, T], relative to row_max."""
    LANES: tl.constexpr = BLOCK // VECTOR
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    row = tl.minimum(row, num_rows - 1)  # reads need no mask then
    label = tl.load(labels + row * label_stride).to(tl.int64)
    active = label != ignore_index
    valid = tl.where(tl.max(active.to(tl.int32), axis=0) > 0, valid_columns, 0).to(tl.int32)
    in_tile = tl.arange(0, LANES)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    tile = logits + (row * row_stride)[:, None, None] + in_tile
    top = tl.full([ROWS, LANES], LOWEST, dtype=tl.float32)
    total = tl.zeros([ROWS, LANES], dtype=tl.float32)
    plain = tl.zeros([ROWS, LANES], dtype=tl.float32)
    weighted = tl.zeros([ROWS, LANES], dtype=tl.float32)
    last = tl.maximum(valid - 1, 0) // BLOCK * BLOCK
    for start in range(0, last, BLOCK):
        x = tl.load(tile + start).to(tl.float32)
        top, total, plain, weighted = _add_tile(x, True, top, total, plain, weighted, False, ENTROPY)
    # The last tile always runs (behind an `if`, Triton 3.6 fails to compile the loop). Its padding is loaded too: a
    # mask at V' keeps wide loads whatever the vocabulary is.
    column = last + in_tile
    x = tl.load(tile + last, mask=column < tl.where(valid > 0, columns, 0), other=0.0).to(tl.float32)
    top, total, plain, weighted = _add_tile(x, column < valid, top, total, plain, weighted, True, ENTROPY)

    highest = tl.max(top, axis=1)
    below = top - highest[:, None]
    shrink = tl.exp(below)
    out = sums + row
    tl.store(row_max + row, tl.where(active, highest, LOWEST), mask=in_rows)
    tl.store(out, tl.where(active, tl.sum(total * shrink, axis=1), 0.0), mask=in_rows)
    sums_stride = tl.cast(sums_stride, tl.int64)
    local = label - first_column
    mine = active & (local >= 0) & (local < valid_columns)
    at_label = tl.load(logits + row * row_stride + local, mask=mine, other=0.0).to(tl.float32)
    tl.store(out + sums_stride, at_label, mask=in_rows)
    tl.store(out + 2 * sums_stride, tl.where(active, tl.sum(plain, axis=1), 0.0), mask=in_rows)
    if ENTROPY:
        mean = tl.sum(shrink * (weighted + total * tl.maximum(below, NEGLIGIBLE)), axis=1)
        tl.store(out + 3 * sums_stride, tl.where(active, mean, 0.0), mask=in_rows)


@triton.jit(do_not_specialize=["num_rows", "ignore_index", "sums_stride"])
def losses_kernel(
    row_max, sums, labels, loss, lse, entropy,
    num_rows, label_stride, sums_stride, ignore_index, label_smoothing, vocab_size, z_loss,
    BLOCK: tl.constexpr, SMOOTH: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """loss, lse and entropy [T] of reduced statistics."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_rows
    active = inside & (tl.load(labels + token * label_stride, mask=inside, other=0).to(tl.int64) != ignore_index)
    sums_stride = tl.cast(sums_stride, tl.int64)
    top = tl.load(row_max + token, mask=active, other=0.0)
    total = tl.load(sums + token, mask=active, other=1.0)
    log_total = tl.log(total)
    norm = top + log_total
    # (top - label's logit) first: both are large where the loss is small
    result = top - tl.load(sums + sums_stride + token, mask=active, other=0.0) + log_total
    if SMOOTH:  # otherwise a logit of -inf, whose sum is -inf, stays harmless
        e = tl.cast(label_smoothing, tl.float32)
        mean = tl.load(sums + 2 * sums_stride + token, mask=active, other=0.0) / tl.cast(vocab_size, tl.float32)
        result = (1.0 - e) * result + e * (norm - mean)
    result += tl.cast(z_loss, tl.float32) * norm * norm
    tl.store(loss + token, tl.where(active, result, 0.0), mask=inside)
    tl.store(lse + token, tl.where(active, norm, 0.0), mask=inside)
    if ENTROPY:
        mean = tl.load(sums + 3 * sums_stride + token, mask=active, other=0.0) / total
        tl.store(entropy + token, tl.where(active, log_total - mean, 0.0), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "first_column", "valid_columns", "ignore_index"])
def gradient_kernel(
    logits, dlogits, labels, lse, entropy, dloss, dlse, dentropy,
    num_rows, columns, row_stride, drow_stride, label_stride, dloss_stride, dlse_stride, dentropy_stride,
    first_column, valid_columns, ignore_index, label_smoothing, vocab_size, z_loss,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DLSE: tl.constexpr, DENTROPY: tl.constexpr,
):  # fmt: skip
    """One tile; dlogits may be the logits' own memory."""
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    in_rows = row < num_rows
    label = tl.load(labels + row * label_stride, mask=in_rows, other=0).to(tl.int64)
    active = in_rows & (label != ignore_index)
    norm = tl.load(lse + row, mask=active, other=0.0)
    scale = tl.load(dloss + row * dloss_stride, mask=active, other=0.0).to(tl.float32)
    e = tl.cast(label_smoothing, tl.float32)
    of_p = scale * (1.0 + 2.0 * tl.cast(z_loss, tl.float32) * norm)
    if DLSE:
        of_p += tl.load(dlse + row * dlse_stride, mask=active, other=0.0).to(tl.float32)
    needed = active & ((of_p != 0.0) | (scale != 0.0))
    if DENTROPY:
        of_entropy = tl.load(dentropy + row * dentropy_stride, mask=active, other=0.0).to(tl.float32)
        needed = needed | (active & (of_entropy != 0.0))
    in_row = (column < columns)[None, :]
    x = tl.load(logits + (row * row_stride)[:, None] + column, mask=needed[:, None] & in_row, other=0.0)
    log_p = x.to(tl.float32) - norm[:, None]
    p = tl.exp(log_p)
    constant = scale * (e / tl.cast(vocab_size, tl.float32))
    is_label = column[None, :] == (label - first_column).to(tl.int32)[:, None]
    g = p * of_p[:, None] - constant[:, None] - tl.where(is_label, (scale * (1.0 - e))[:, None], 0.0)
    if DENTROPY:
        spread = log_p + tl.load(entropy + row, mask=active, other=0.0)[:, None]
        g -= of_entropy[:, None] * p * tl.where(p == 0, 0.0, spread)  # p = 0: log p may be -inf
    g = tl.where(needed[:, None] & (column < valid_columns)[None, :], g, 0.0)
    at = dlogits + (row * drow_stride)[:, None] + column
    tl.store(at, g.to(dlogits.dtype.element_ty), mask=in_rows[:, None] & in_row)


@on_its_device
def statistics(
    logits: torch.Tensor, labels: torch.Tensor, *, first_column: int = 0, valid_columns: int | None = None,
    ignore_index: int = IGNORE_INDEX, with_entropy: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(row_max [T], sums) of this rank's logits [T, V'], fp32; sums [3, T] (4 with the entropy) unpacks to

    sum_exp (of exp(x - row_max)), label_logit (0 where the label is on another rank), sum_logits and, with the entropy,
    weighted (of exp(x - row_max) (x - row_max)). labels [T] are ids of the whole vocabulary. A rank without valid
    columns, and any ignored token, has row_max = the lowest fp32 and sums 0. `out`: buffers to fill, slices too.
    """
    valid = _check(logits, labels, valid_columns)
    num_rows, columns = logits.shape
    row_max, sums = out or (
        torch.empty(num_rows, dtype=torch.float32, device=logits.device),
        torch.empty((4 if with_entropy else 3, num_rows), dtype=torch.float32, device=logits.device),
    )
    if num_rows == 0:
        return row_max, sums
    logits = _unit_columns(logits)
    launch = plan(columns, arch=target_of(logits).arch, gradient=False)
    statistics_kernel[(triton.cdiv(num_rows, launch.rows),)](
        logits, labels, row_max, sums,
        num_rows, columns, logits.stride(0), labels.stride(0), sums.stride(0), first_column, valid, ignore_index,
        ROWS=launch.rows, BLOCK=launch.block, VECTOR=16 // logits.element_size(), ENTROPY=with_entropy,
        num_warps=launch.num_warps,
    )  # fmt: skip
    return row_max, sums


def rescale_(sums: torch.Tensor, row_max: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """`sums` made relative to `top`, the maximum of all ranks' row_max, so that they may be added up; in place."""
    below = row_max - top
    shrink = torch.exp(below)
    if sums.size(0) == 4:
        sums[3].addcmul_(sums[0], below.clamp(min=NEGLIGIBLE.value)).mul_(shrink)
    sums[0].mul_(shrink)
    return sums


@on_its_device
def losses(
    row_max: torch.Tensor, sums: torch.Tensor, labels: torch.Tensor, *, vocab_size: int,
    ignore_index: int = IGNORE_INDEX, label_smoothing: float = 0.0, z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(loss [T], lse [T], entropy [T], or [0] where sums has none), fp32, of statistics over the whole vocabulary."""
    if vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}: give the number of ids of all ranks together")
    check_smoothing(label_smoothing)
    num_rows, with_entropy = row_max.numel(), sums.size(0) == 4
    row_max, sums = row_max.contiguous(), _unit_columns(sums)
    loss, lse = torch.empty_like(row_max), torch.empty_like(row_max)
    entropy = row_max.new_empty(num_rows if with_entropy else 0)
    if num_rows:
        block = 256
        losses_kernel[(triton.cdiv(num_rows, block),)](
            row_max, sums, labels, loss, lse, entropy if with_entropy else lse,
            num_rows, labels.stride(0), sums.stride(0), ignore_index, label_smoothing, float(vocab_size), z_loss,
            BLOCK=block, SMOOTH=label_smoothing != 0.0, ENTROPY=with_entropy, num_warps=4,
        )  # fmt: skip
    return loss, lse, entropy


@on_its_device
def gradient_(
    logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, dloss: torch.Tensor,
    dlse: torch.Tensor | None = None, entropy: torch.Tensor | None = None, dentropy: torch.Tensor | None = None, *,
    vocab_size: int, first_column: int = 0, valid_columns: int | None = None, ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0, z_loss: float = 0.0, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The gradient of the logits [T, V'], written over them (or into `out`): see the module's formula for dx.

    lse and entropy [T] are those of `losses`; dloss, dlse, dentropy [T], any stride. Padding columns and ignored tokens
    get exact zeros, and so do tokens whose incoming gradients are all 0: their logits are not read.
    """
    out = logits if out is None else out
    valid = _check(logits, labels, valid_columns)
    check_smoothing(label_smoothing)
    if dentropy is not None and entropy is None:
        raise ValueError("dentropy without entropy: hand in the entropy [T] that `losses` gave")
    num_rows, columns = logits.shape
    if (columns > 1 and out.stride(1) != 1) or (num_rows > 1 and out.stride(0) < columns):
        raise ValueError(f"logits of strides {tuple(out.stride())} cannot be overwritten: rows must not overlap")
    if logits.numel() == 0:
        return out
    logits = _unit_columns(logits)
    lse, entropy = lse.contiguous(), None if entropy is None else entropy.contiguous()
    launch = plan(columns, arch=target_of(logits).arch, gradient=True)
    grid = (triton.cdiv(num_rows, launch.rows) * triton.cdiv(columns, launch.block),)
    others = (lse if dlse is None else dlse, lse if dentropy is None else dentropy)
    gradient_kernel[grid](
        logits, out, labels, lse, lse if entropy is None else entropy, dloss, *others,
        num_rows, columns, logits.stride(0), out.stride(0), labels.stride(0), dloss.stride(0),
        *(other.stride(0) for other in others),
        first_column, valid, ignore_index, label_smoothing, float(vocab_size), z_loss,
        ROWS=launch.rows, BLOCK=launch.block, DLSE=dlse is not None, DENTROPY=dentropy is not None,
        num_warps=launch.num_warps,
    )  # fmt: skip
    return out


def check_smoothing(label_smoothing: float) -> None:
    """ValueError unless within [0, 1)."""
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}: give at least 0 (none) and less than 1")


def _check(logits: torch.Tensor, labels: torch.Tensor, valid_columns: int | None) -> int:
    """The number of columns that count; ValueError for what the kernels cannot take."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: they must be [T, V'] and [T]")
    check_dtypes(logits=logits)
    if labels.is_floating_point():
        raise ValueError(f"labels are {labels.dtype}: ids must be integers")
    columns = logits.size(1)
    valid = columns if valid_columns is None else valid_columns
    if not 0 <= valid <= columns:
        raise ValueError(f"valid_columns ({valid}) is not between 0 and the {columns} columns of the logits")
    return valid


def _unit_columns(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(1) == 1 or logits.size(1) == 1 else logits.contiguous()
