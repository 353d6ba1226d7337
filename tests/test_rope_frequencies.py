"""Rotary frequencies against their formulas and against transformers, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megallm.config.model import RopeScaling
from megallm.ops.rope_frequencies import rope_frequencies

SCALINGS = {
    "default": None,
    "linear": RopeScaling(rope_type="linear", factor=3.0),
    "llama3.1": RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192),
    "llama3.2": RopeScaling(rope_type="llama3", factor=32.0, original_max_position_embeddings=8192),
    "llama3-odd": RopeScaling(rope_type="llama3", factor=2.5, low_freq_factor=1.5, high_freq_factor=3.0),
    "yarn": RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768),
    "yarn-not-truncated": RopeScaling(
        rope_type="yarn", factor=8.0, original_max_position_embeddings=4096, truncate=False
    ),
    "yarn-betas": RopeScaling(rope_type="yarn", factor=16.0, beta_fast=20.0, beta_slow=3.0),
    "yarn-attention-factor": RopeScaling(rope_type="yarn", factor=4.0, attention_factor=1.25),
    "yarn-mscale": RopeScaling(rope_type="yarn", factor=40.0, mscale=0.707, mscale_all_dim=1.0),
    "yarn-step": RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=6, beta_fast=1.01),
}
SHAPES = ((128, 500000.0, 131072), (64, 1e6, 32768), (6, 10000.0, 64), (80, 10000.0, 2048), (128, 10000, 4096))


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_those_of_transformers_bit_for_bit(name: str) -> None:
    pytest.importorskip("transformers")
    scaling = SCALINGS[name]
    for head_dim, theta, max_positions in SHAPES:
        expected, expected_factor = _transformers_frequencies(scaling, head_dim, theta, max_positions)
        inv_freq, factor = rope_frequencies(
            head_dim=head_dim, theta=theta, scaling=scaling, max_position_embeddings=max_positions
        )
        assert inv_freq.dtype == torch.float32
        assert torch.equal(inv_freq, expected), (head_dim, theta)
        assert factor == expected_factor


def test_double_precision_agrees_with_single_to_its_rounding() -> None:
    for scaling in SCALINGS.values():
        shape: dict[str, Any] = {
            "head_dim": 128, "theta": 500000.0, "scaling": scaling, "max_position_embeddings": 4096
        }  # fmt: skip
        exact, factor = rope_frequencies(**shape, dtype=torch.float64)
        rounded, same_factor = rope_frequencies(**shape)
        assert exact.dtype == torch.float64 and factor == same_factor
        # pow in fp32 has an error of ln(theta) units from its exponent, the blends of llama3 add a few.
        torch.testing.assert_close(rounded.double(), exact, rtol=40 * 2**-24, atol=0.0)


def test_default_frequencies_are_powers_of_theta() -> None:
    inv_freq, factor = rope_frequencies(
        head_dim=8, theta=10000.0, scaling=None, max_position_embeddings=64, dtype=torch.float64
    )
    assert factor == 1.0
    torch.testing.assert_close(inv_freq, torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64))


def test_llama3_keeps_short_waves_and_divides_long_ones() -> None:
    scaling = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192)
    plain, _ = rope_frequencies(head_dim=128, theta=5e5, scaling=None, max_position_embeddings=131072)
    scaled, _ = rope_frequencies(head_dim=128, theta=5e5, scaling=scaling, max_position_embeddings=131072)
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    assert short.any() and long.any() and not (short | long).all()
    assert torch.equal(scaled[short], plain[short])
    assert torch.equal(scaled[long], plain[long] / 8.0)


def test_yarn_scales_cos_and_sin_as_the_paper_says() -> None:
    scaling = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768)
    _, factor = rope_frequencies(head_dim=64, theta=1e6, scaling=scaling, max_position_embeddings=131072)
    assert factor == 0.1 * math.log(4.0) + 1.0


def test_an_odd_head_dim_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head_dim \(5\) must be even.*use 6"):
        rope_frequencies(head_dim=5, theta=1e4, scaling=None, max_position_embeddings=64)


def _transformers_frequencies(
    scaling: RopeScaling | None, head_dim: int, theta: float, max_positions: int
) -> tuple[torch.Tensor, float]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        parameters |= {key: value for key, value in vars(scaling).items() if value is not None}
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rope_parameters=parameters,
    )
    if scaling is None:
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[scaling.rope_type](config)
