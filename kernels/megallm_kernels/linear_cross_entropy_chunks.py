"""The lm head and its loss in one, without the logits of all tokens in memory.

    logits = hidden weight^T, then the loss of cross_entropy_kernels.py
    dhidden = dlogits weight,  dweight = dlogits^T hidden

Tokens are taken in chunks. A chunk's logits go to one buffer that all chunks share; its statistics are taken, its
gradient overwrites it, and two GEMMs use it up:

    chunk:   mm -> logits [C, V'] -> statistics (-> reductions) -> gradient_ -> mm -> dhidden [C, H]
                                                                            -> mm -> dweight [V', H] += , fp32

Two forms. Where d loss / d token is known beforehand (a mask over a global count), the forward makes the final
gradients and backward scales them, or does nothing where the incoming gradient is 1: three GEMMs, 6 T H V' FLOPs, as
without chunks. Where it is not (DPO, PPO), backward makes the logits once more from hidden, weight and lse: 8 T H V'.

Memory: one logits buffer, at most CHUNK_BYTES (but for a very large V'), and dweight in fp32; no other [.., V'] tensor
on a GPU. Chunks of 1024 to 4096 rows: shorter ones starve the GEMM (Liger-Kernel's 128 rows ran at under half the
unchunked speed on an A100, by its own table). Reading and writing dweight once a chunk is, at 4.3 TB/s and 780 TFLOP/s,
6 % of the chunk's GEMMs at 4096 rows and 24 % at 1024 (derived, not measured): the longest that fits is taken.
dweight accumulates in fp32 over chunks (in bf16 the sum drifts as chunks multiply) and is rounded once, at the end.
fp16 gradients need a loss scale: put it into token_weight, so that dlogits are not too small to be stored.
No kernel here but `scale_`; no sync with the host.

Letters: T tokens, C rows of a chunk, H hidden, V vocabulary, V' columns of this rank (with padding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megallm_kernels import cross_entropy_kernels as kernels
from megallm_kernels.device import on_its_device, target_of

CHUNK_ROWS = (4096, 2048, 1024)
"""Rows a chunk may have, longest first."""
CHUNK_BYTES = 1 << 30
"""The most that a chunk's logits should take; at 1024 rows they may take more (V' over 2^19 in bf16)."""

Reduce = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Head:
    """Which loss, and where this rank's columns lie; the defaults are one rank with all of them."""

    vocab_size: int
    """Ids of all ranks together."""
    first_column: int = 0
    """Id of this rank's first column."""
    valid_columns: int | None = None
    """Columns that are no padding; None = all of the weight's."""
    ignore_index: int = kernels.IGNORE_INDEX
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    reduce_max: Reduce | None = None
    """The elementwise maximum over the ranks of a contiguous fp32 tensor, which it may overwrite; None = one rank."""
    reduce_sum: Reduce | None = None
    """The sum likewise."""
    chunk_rows: int = 0
    """Rows of a chunk; 0 = `rows_per_chunk`."""

    def __post_init__(self) -> None:
        if (self.reduce_max is None) != (self.reduce_sum is None):
            raise ValueError("one of reduce_max and reduce_sum is missing: give both for several ranks, none for one")


def rows_per_chunk(num_tokens: int, columns: int, element_size: int) -> int:
    """Rows of a chunk: the most of CHUNK_ROWS whose logits fit CHUNK_BYTES, then evened out over equal chunks."""
    fitting = (rows for rows in CHUNK_ROWS if rows * columns * element_size <= CHUNK_BYTES)
    num_chunks = max(triton.cdiv(num_tokens, next(fitting, CHUNK_ROWS[-1])), 1)
    return max(triton.cdiv(triton.cdiv(num_tokens, num_chunks), 128) * 128, 128)


# -- chunks -----------------------------------------------------------------------------------------------------------

_Losses = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_Gradients = tuple[torch.Tensor | None, torch.Tensor | None]


def token_losses(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, head: Head, *, with_entropy: bool = False
) -> _Losses:
    """(loss [T], lse [T], entropy [T] or [0]), fp32, of hidden [T, H] and weight [V', H]; one pair of reductions."""
    row_max = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
    sums = row_max.new_empty((4 if with_entropy else 3, len(labels)))
    for rows, logits in _chunks(hidden, weight, labels, head):
        _statistics(logits, labels[rows], head, row_max[rows], sums[:, rows])
    return _reduced_losses(row_max, sums, labels, head)


def gradients(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, dloss: torch.Tensor,
    head: Head, *, dlse: torch.Tensor | None = None, entropy: torch.Tensor | None = None,
    dentropy: torch.Tensor | None = None, needs_dhidden: bool = True, dweight: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor | None:  # fmt: skip
    """dhidden [T, H], of this rank's columns alone: the caller adds the ranks' up. The logits are made once more.

    lse, entropy [T] as `token_losses` gave them; dloss, dlse, dentropy [T] fp32. dweight [V', H], best fp32, is a
    buffer that is overwritten, or added to with `accumulate`; None = not needed.
    """
    out = _Products(hidden, weight, needs_dhidden=needs_dhidden, dweight=dweight, accumulate=accumulate)
    for rows, logits in _chunks(hidden, weight, labels, head):
        extra = [None if each is None else each[rows] for each in (dlse, entropy, dentropy)]
        _overwrite(logits, labels[rows], lse[rows], dloss[rows], head, *extra)
        out.add(rows, logits)
    return out.dhidden


def losses_and_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, dloss: torch.Tensor, head: Head, *,
    needs_dhidden: bool = True, dweight: torch.Tensor | None = None, accumulate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(loss [T], lse [T], dhidden [T, H]): `token_losses` and `gradients` at once, for a dloss [T] that is known.

    Each chunk makes its own pair of reductions. Losses are not multiplied by dloss.
    """
    loss = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
    lse = torch.empty_like(loss)
    out = _Products(hidden, weight, needs_dhidden=needs_dhidden, dweight=dweight, accumulate=accumulate)
    for rows, logits in _chunks(hidden, weight, labels, head):
        row_max = torch.empty(len(logits), dtype=torch.float32, device=hidden.device)
        sums = row_max.new_empty((3, len(logits)))
        _statistics(logits, labels[rows], head, row_max, sums)
        loss[rows], lse[rows], _ = _reduced_losses(row_max, sums, labels[rows], head)
        _overwrite(logits, labels[rows], lse[rows], dloss[rows], head)
        out.add(rows, logits)
    return loss, lse, out.dhidden


def _chunks(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, head: Head
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each chunk's tokens and logits; the next step overwrites the logits."""
    _check(hidden, weight, labels)
    num_tokens, columns = len(hidden), len(weight)
    size = head.chunk_rows or rows_per_chunk(num_tokens, columns, hidden.element_size())
    buffer = torch.empty((min(size, num_tokens), columns), dtype=hidden.dtype, device=hidden.device)
    for start in range(0, num_tokens, size):
        rows = slice(start, min(start + size, num_tokens))
        logits = buffer[: rows.stop - start]
        torch.mm(hidden[rows], weight.t(), out=logits)
        yield rows, logits


def _check(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    if hidden.dim() != 2 or weight.shape[1:] != hidden.shape[1:] or labels.shape != hidden.shape[:1]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)}"
        raise ValueError(f"{shapes} do not fit together: they must be [T, H], [V', H] and [T]")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight is {weight.dtype}: cast one of them")


def _statistics(
    logits: torch.Tensor, labels: torch.Tensor, head: Head, row_max: torch.Tensor, sums: torch.Tensor
) -> None:
    kernels.statistics(
        logits, labels, first_column=head.first_column, valid_columns=head.valid_columns,
        ignore_index=head.ignore_index, with_entropy=len(sums) == 4, out=(row_max, sums),
    )  # fmt: skip


def _reduced_losses(row_max: torch.Tensor, sums: torch.Tensor, labels: torch.Tensor, head: Head) -> _Losses:
    if head.reduce_max is not None and head.reduce_sum is not None:
        top = head.reduce_max(row_max.clone())
        sums = head.reduce_sum(kernels.rescale_(sums, row_max, top))
        row_max = top
    return kernels.losses(
        row_max, sums, labels, vocab_size=head.vocab_size, ignore_index=head.ignore_index,
        label_smoothing=head.label_smoothing, z_loss=head.z_loss,
    )  # fmt: skip


def _overwrite(
    logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, dloss: torch.Tensor, head: Head,
    *extra: torch.Tensor | None,
) -> None:  # fmt: skip
    kernels.gradient_(
        logits, labels, lse, dloss, *extra, vocab_size=head.vocab_size, first_column=head.first_column,
        valid_columns=head.valid_columns, ignore_index=head.ignore_index, label_smoothing=head.label_smoothing,
        z_loss=head.z_loss,
    )  # fmt: skip


class _Products:
    """dhidden and dweight, as far as they are needed, from the chunks' dlogits."""

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, *, needs_dhidden: bool, dweight: torch.Tensor | None,
        accumulate: bool,
    ) -> None:  # fmt: skip
        self._hidden, self._weight, self._dweight, self._accumulate = hidden, weight, dweight, accumulate
        self.dhidden: torch.Tensor | None = None
        if needs_dhidden:
            self.dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        if dweight is not None and not accumulate and len(hidden) == 0:
            dweight.zero_()

    def add(self, rows: slice, dlogits: torch.Tensor) -> None:
        """One chunk's dlogits [C, V'], which are in the weight's dtype."""
        if self.dhidden is not None:
            torch.mm(dlogits, self._weight, out=self.dhidden[rows])
        if self._dweight is not None:
            _add_product(self._dweight, dlogits.t(), self._hidden[rows], fresh=not self._accumulate)
            self._accumulate = True


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, fresh: bool) -> None:
    """out = a b, or out += a b, in out's dtype (fp32 from bf16 factors without widened copies on a GPU)."""
    if a.dtype != out.dtype and a.is_cuda:
        if fresh:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return
    torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=0.0 if fresh else 1.0, out=out)


# -- scaling ----------------------------------------------------------------------------------------------------------


@triton.jit
def scale_kernel(x, factor, num_elements, BLOCK: tl.constexpr):
    """x *= factor, a 0-d tensor; where it is 1, every program stops after reading it."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        for tile in range(tl.program_id(0), tl.cdiv(num_elements, BLOCK), tl.num_programs(0)):
            at = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = at < num_elements
            scaled = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * by
            tl.store(x + at, scaled.to(x.dtype.element_ty), mask=inside)


@torch.library.custom_op("megallm_kernels::scale_", mutates_args={"x"})
@on_its_device
def scale_(x: torch.Tensor, factor: torch.Tensor) -> None:
    """x *= factor in place, x contiguous, factor 0-d; nothing is read or written where factor is 1. No sync."""
    if not x.is_contiguous():
        raise ValueError(f"x of strides {tuple(x.stride())} is not contiguous: scale_ takes whole buffers")
    if x.numel():
        block = 4096
        grid = min(triton.cdiv(x.numel(), block), 8 * target_of(x).num_sms)
        scale_kernel[(grid,)](x, factor, x.numel(), BLOCK=block, num_warps=8)
