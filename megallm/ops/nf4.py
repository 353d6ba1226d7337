"""4-bit NormalFloat (QLoRA, arXiv 2305.14314): weights as the nearest of 16 numbers, times a scale for every 64.

    w  ~  CODE[c] s        c 4 bits, two to a byte, the first in the high half        s = max |w| of the block of 64
    s  ~  CODE8[q] t + m   q 8 bits       t = max |s - m| of 256 scales, fp32         m = mean s, fp32

The second line is double quantisation. Bytes a weight: 1/2 + 1/64 + 4 / (64 256) = 0.516, and 0.5625 without it. Bytes,
scales and numbers are those of bitsandbytes 0.50.2 on a CPU to the bit (tests/test_nf4.py): products and sums are in
fp32, each rounded, and the result is rounded once to the dtype asked for.

A `BlockRange` is what one rank holds of a matrix's blocks: a run of them, or as long a run of every row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from megallm.ops.backends import DEFAULT, Backends

BLOCK, SCALE_BLOCK = 64, 256
"""Weights that share a scale, scales that share theirs."""
_TINY = 1e-38
"""Taken for the largest of blocks below it."""
_STEPS = 65535
"""Numbers in [-1, 1] are rounded to so many equal steps before the nearest of CODE8 is looked up, as bitsandbytes does
on a CPU: 2 in 1000 scales, which lie near the middle of two, get the farther one. (On a GPU it looks for the nearest.)
"""
_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution, scaled to [-1, 1], with an exact 0 (appendix E of the paper)."""


class Packed(NamedTuple):
    """Weights in 4 bits."""

    codes: torch.Tensor
    """uint8, half as many as weights, rounded up."""
    absmax: torch.Tensor
    """fp32, of every block."""


class Scales(NamedTuple):
    """The scales of blocks, as they are kept."""

    values: torch.Tensor
    """Of every block: q in uint8, or s itself in fp32."""
    nested: torch.Tensor | None = None
    """t, fp32, of every 256 blocks; None = no double quantisation."""
    offset: torch.Tensor | None = None
    """m, fp32 []."""


@dataclass(frozen=True, kw_only=True)
class BlockRange:
    """Which blocks of a whole matrix, in their order."""

    first: int
    """The first one's number in the matrix."""
    num_rows: int
    per_row: int
    """Blocks of this range that follow each other."""
    stride: int
    """From the first of one row to the first of the next; of a single row anything."""

    @property
    def num_blocks(self) -> int:
        """How many."""
        return self.num_rows * self.per_row

    def of(self, table: torch.Tensor) -> torch.Tensor:
        """[num_rows, per_row], a view: the entries of these blocks in a table [blocks of the matrix]."""
        return table.as_strided((self.num_rows, self.per_row), (self.stride, 1), table.storage_offset() + self.first)

    def numbers(self, device: torch.device) -> torch.Tensor:
        """[num_blocks] int64: their numbers in the matrix."""
        rows = torch.arange(self.num_rows, device=device) * self.stride + self.first
        return (rows[:, None] + torch.arange(self.per_row, device=device)).view(-1)


def all_blocks(num_weights: int) -> BlockRange:
    """Of a matrix of so many weights."""
    blocks = -(-num_weights // BLOCK)
    return BlockRange(first=0, num_rows=1, per_row=blocks, stride=blocks)


@torch.no_grad()
def quantize(weight: torch.Tensor) -> Packed:
    """The weights in the order they lie in; blocks run over the ends of rows, the last one may be short."""
    flat = weight.reshape(-1).float()
    whole = flat.numel() // BLOCK * BLOCK
    blocks = flat[:whole].view(-1, BLOCK)
    absmax = blocks.abs().amax(1) if whole else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(1)).clamp_(-1, 1).view(-1)
    if whole < flat.numel():
        last = flat[whole:].abs().max().clamp(min=_TINY)
        absmax = torch.cat([absmax, last.view(1)])
        scaled = torch.cat([scaled, (flat[whole:] / last).clamp_(-1, 1)])
    if scaled.numel() % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    codes = torch.bucketize(scaled, _middles(weight.device), out_int32=True).to(torch.uint8)
    return Packed((codes[::2] << 4) | codes[1::2], absmax)


@torch.no_grad()
def quantize_scales(absmax: torch.Tensor) -> Scales:
    """The double quantisation of a whole matrix's scales [blocks] fp32."""
    offset = absmax.mean()
    centred = absmax - offset
    padded = torch.nn.functional.pad(centred, (0, -centred.numel() % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    nested = padded.abs().amax(1)
    scaled = (padded * nested.reciprocal().unsqueeze(1)).view(-1)[: centred.numel()]
    step = ((scaled + 1.0) * (_STEPS / 2) + 0.5).nan_to_num_(0.0).clamp_(0, _STEPS)
    return Scales(_nearest8(absmax.device)[step.int()], nested, offset)


def dequantize_scales(scales: Scales, blocks: BlockRange) -> torch.Tensor:
    """s [blocks] fp32, for values of `blocks` and the nested scales of their whole matrix."""
    if scales.nested is None:
        return scales.values
    assert scales.offset is not None
    nested = scales.nested[blocks.numbers(scales.values.device) // SCALE_BLOCK]
    return _code8(scales.values.device)[scales.values.int()].mul_(nested).add_(scales.offset)


def dequantize(
    codes: torch.Tensor,
    scales: Scales,
    blocks: BlockRange,
    *,
    out: torch.Tensor,
    backends: Backends = DEFAULT,
) -> torch.Tensor:
    """The weights that codes [ceil(n / 2)] and scales [blocks] stand for, written into out, n contiguous; returns it.

    Only the last block may be short.
    """
    assert out.is_contiguous() and codes.numel() == -(-out.numel() // 2)
    if out.numel() and backends.pick("nf4", out, 0) == "triton":
        from megallm_kernels.nf4 import dequantize_

        tables = (_code(out.device), _code8(out.device))
        dequantize_(
            out, codes, scales.values, scales.nested, scales.offset, *tables,
            first=blocks.first, per_row=blocks.per_row, stride=blocks.stride,
        )  # fmt: skip
        return out
    return dequantize_reference(codes, scales, blocks, out=out)


@torch.no_grad()
def dequantize_reference(
    codes: torch.Tensor, scales: Scales, blocks: BlockRange, *, out: torch.Tensor
) -> torch.Tensor:
    """The specification of `dequantize`."""
    absmax, size = dequantize_scales(scales, blocks), out.numel()
    pairs = _pairs(out.device).index_select(0, codes.view(-1).int())  # two fp32 numbers in each
    values, whole = pairs.view(torch.float32)[:size], size // BLOCK * BLOCK
    values[:whole].view(-1, BLOCK).mul_(absmax[: whole // BLOCK].unsqueeze(1))
    if whole < size:
        values[whole:].mul_(absmax[whole // BLOCK])
    out.view(-1).copy_(values)
    return out


@cache
def _code(device: torch.device) -> torch.Tensor:
    """[16] fp32."""
    return torch.tensor(_CODE, dtype=torch.float32, device=device)


@cache
def _middles(device: torch.device) -> torch.Tensor:
    code = _code(device)
    return (code[:-1] + code[1:]) / 2


@cache
def _pairs(device: torch.device) -> torch.Tensor:
    """[256]: the two numbers of each byte, as the bits of one int64."""
    code, byte = _code(device), torch.arange(256, device=device)
    return torch.stack([code[byte >> 4], code[byte & 15]], dim=1).view(torch.int64).view(-1)


@cache
def _nearest8(device: torch.device) -> torch.Tensor:
    """[65536] uint8: the nearest of _code8 to each step from -1 to 1."""
    steps = torch.arange(_STEPS + 1, dtype=torch.float32) * (2.0 / _STEPS) - 1.0
    code = _code8(torch.device("cpu"))
    left = torch.bucketize(steps, code, right=True).sub_(1).clamp_(0, 254)  # the number below, and the one above it
    is_right = (code[left + 1] - steps).abs() < (steps - code[left]).abs()
    return (left + is_right).to(torch.uint8).to(device)


@cache
def _code8(device: torch.device) -> torch.Tensor:
    """[256] fp32, ascending: the dynamic 8-bit numbers of arXiv 1511.04561, with signs.

    A number has a power of ten from 1 to 1e-6 and, the larger it is, the more places: the middles of 2^i equal parts of
    [0.1, 1] for i = 0 .. 6; and 0, and 1.
    """
    found = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        found += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)
