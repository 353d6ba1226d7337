"""Weights in 4 bits: bitsandbytes' bytes, scales and numbers, to the bit.

tests/fixtures/nf4.json holds what bitsandbytes makes of tests/nf4_cases.py (tests/make_nf4.py).
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch
from nf4_cases import DTYPES, FIXTURE, cases, digest
from training_cases import once

from megallm.ops.nf4 import (
    BlockRange,
    Packed,
    Scales,
    all_blocks,
    dequantize,
    dequantize_scales,
    quantize,
    quantize_scales,
)


def kept(weight: torch.Tensor, *, double: bool) -> tuple[Packed, Scales]:
    packed = quantize(weight)
    return packed, quantize_scales(packed.absmax) if double else Scales(packed.absmax)


def dense(codes: torch.Tensor, scales: Scales, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return dequantize(codes, scales, all_blocks(shape.numel()), out=torch.empty(shape, dtype=dtype))


@once
def expected() -> dict[str, Any]:
    return json.loads(FIXTURE.read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("kind", ["double", "single"])
@pytest.mark.parametrize("name", cases())
def test_everything_is_bitsandbytes_to_the_bit(name: str, kind: str) -> None:
    weight, own = cases_once()[name], expected()[name][kind]
    packed, scales = kept(weight, double=kind == "double")
    found = {"codes": digest(packed.codes), "absmax": digest(scales.values)}
    if scales.nested is not None and scales.offset is not None:
        found |= {"nested": digest(scales.nested), "offset": digest(scales.offset)}
    found |= {k: digest(dense(packed.codes, scales, weight.shape, dtype)) for k, dtype in DTYPES.items()}
    assert found == own


@once
def cases_once() -> dict[str, torch.Tensor]:
    return cases()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("size", [(2, 32), (513, 66), (1024, 320)], ids=str)
def test_bitsandbytes_itself_agrees(size: tuple[int, int]) -> None:
    from bitsandbytes import functional

    weight = torch.randn(size, generator=torch.Generator().manual_seed(1))
    codes, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    packed, scales = kept(weight, double=True)
    assert torch.equal(packed.codes, codes.view(-1)) and torch.equal(scales.values, state.absmax)
    own = dense(packed.codes, scales, weight.shape, torch.float32)
    assert torch.equal(own, functional.dequantize_4bit(codes, state))


def test_fp64_holds_the_fp32_numbers() -> None:
    weight = cases_once()["normal 300x130 fp32"]
    packed, scales = kept(weight.double(), double=True)
    wide, narrow = (dense(packed.codes, scales, weight.shape, dtype) for dtype in (torch.float64, torch.float32))
    assert torch.equal(wide, narrow.double())
    assert torch.equal(packed.codes, quantize(weight).codes)


def test_the_error_of_normal_numbers_is_a_tenth_and_hardly_more_with_rounded_scales() -> None:
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(3)) * 0.02
    errors = []
    for double in (False, True):
        packed, scales = kept(weight, double=double)
        error = dense(packed.codes, scales, weight.shape, torch.float32) - weight
        errors.append(float(error.double().norm() / weight.double().norm()))
    assert errors[0] == pytest.approx(0.092, abs=5e-4)
    assert 0 < errors[1] - errors[0] < 1e-4


def test_blocks_of_a_part_know_their_place_in_the_whole() -> None:
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(4))
    _, scales = kept(weight, double=True)
    whole = dequantize_scales(scales, all_blocks(weight.numel())).view(96, 4)
    for blocks, part in (
        (BlockRange(first=4 * 70, num_rows=1, per_row=4 * 26, stride=0), whole[70:]),
        (BlockRange(first=1, num_rows=96, per_row=2, stride=4), whole[:, 1:3]),
    ):
        own = Scales(blocks.of(scales.values).reshape(-1), scales.nested, scales.offset)
        assert torch.equal(dequantize_scales(own, blocks), part.reshape(-1))


def test_dequantised_weights_quantised_again_are_others() -> None:
    """Why checkpoints hold codes and scales: the mean of rounded scales is another one."""
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(5))
    packed, scales = kept(weight, double=True)
    once_more = dense(packed.codes, scales, weight.shape, torch.float32)
    again, new = kept(once_more, double=True)
    assert not torch.equal(dense(again.codes, new, weight.shape, torch.float32), once_more)
    single = Scales(packed.absmax)  # without double quantisation they are the same
    exact = dense(packed.codes, single, weight.shape, torch.float32)
    repeated, absmax = quantize(exact)
    assert torch.equal(repeated, packed.codes) and torch.equal(absmax, packed.absmax)
