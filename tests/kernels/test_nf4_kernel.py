"""Weights in 4 bits made dense, in the interpreter: plain torch's numbers to the bit."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, normal
from torch.library import opcheck

from megallm.ops.backends import Backends
from megallm.ops.nf4 import (
    BlockRange,
    Scales,
    all_blocks,
    dequantize,
    dequantize_reference,
    quantize,
    quantize_scales,
)
from megallm_kernels import nf4 as kernel

TRITON = Backends({"nf4": "triton"}, announce=lambda line: None)
SIZES = [1, 2, 63, 64, 65, 4096, 64 * 33 + 6, 64 * 256 * 2 + 64]


def made(size: int, *, double: bool) -> tuple[torch.Tensor, Scales]:
    packed = quantize(normal(size, dtype=torch.float32, seed=size, scale=0.02))
    return packed.codes, quantize_scales(packed.absmax) if double else Scales(packed.absmax)


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_numbers_are_those_of_plain_torch(size: int, dtype: torch.dtype, double: bool) -> None:
    codes, scales = made(size, double=double)
    out, expected = torch.full((size,), torch.nan, dtype=dtype), torch.empty(size, dtype=dtype)
    dequantize(codes, scales, all_blocks(size), out=out, backends=TRITON)
    dequantize_reference(codes, scales, all_blocks(size), out=expected)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "blocks",
    [
        BlockRange(first=700, num_rows=1, per_row=33, stride=33),
        BlockRange(first=3, num_rows=70, per_row=3, stride=12),
        BlockRange(first=9, num_rows=1, per_row=1, stride=1),
    ],
    ids=["rows", "columns", "one"],
)
def test_a_rank_s_blocks_take_the_scales_of_their_places(blocks: BlockRange) -> None:
    codes, scales = made(64 * 1000, double=True)
    own = codes.view(-1, 32)[blocks.numbers(codes.device)].view(-1)
    held = Scales(blocks.of(scales.values).reshape(-1), scales.nested, scales.offset)
    whole = dequantize_reference(codes, scales, all_blocks(64 * 1000), out=torch.empty(1000, 64))
    for backends in (TRITON, Backends(announce=lambda line: None)):
        out = dequantize(own, held, blocks, out=torch.empty(blocks.num_blocks, 64), backends=backends)
        assert torch.equal(out, whole[blocks.numbers(codes.device)])


def test_what_does_not_fit_together_is_refused() -> None:
    codes, scales = made(128, double=True)
    tables = (torch.zeros(16), torch.zeros(256))

    def call(out: torch.Tensor) -> None:
        kernel.dequantize_(
            out, codes, scales.values, scales.nested, scales.offset, *tables, first=0, per_row=2, stride=2
        )

    with pytest.raises(ValueError, match="256 weights have 128 codes and 4 scales, got 64 and 2"):
        call(torch.empty(256))
    with pytest.raises(ValueError, match="contiguous"):
        call(torch.empty(2, 128)[:, ::2].t())
    with pytest.raises(ValueError, match="float64"):
        call(torch.empty(128, dtype=torch.float64))


def test_the_operation_is_one_that_torch_can_trace() -> None:
    codes, scales = made(128, double=True)
    arguments = (torch.empty(128), codes, scales.values, scales.nested, scales.offset, torch.rand(16), torch.rand(256))
    opcheck(kernel.dequantize_, arguments, {"first": 0, "per_row": 2, "stride": 2})
