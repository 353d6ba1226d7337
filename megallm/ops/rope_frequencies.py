"""Rotary frequencies: how far each pair of dimensions of a head turns from one position to the next.

    default   f_i = theta^(-2i/D)                       RoFormer, arXiv 2104.09864, section 3.2.2
    linear    f_i / s                                   position interpolation, arXiv 2306.15595, section 3.1
    llama3    long waves divided by s, short ones kept, a blend between them           Llama 3.1 release
    yarn      the same idea, blended by dimension; cos and sin are scaled too          YaRN, arXiv 2309.00071, section 3

The operations and their order in fp32 are those of Hugging Face's models, so that the values agree bit for bit: at
position 100,000 one unit in the last place of a frequency is already an angle of 0.006.

Letters: D head dim, i = 0 .. D/2 - 1, s = factor, L = original_max_position_embeddings.
"""

from __future__ import annotations

import math

import torch

from megallm.config.model import RopeScaling


def rope_frequencies(
    *,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None,
    max_position_embeddings: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, float]:
    """(radians per position [D/2] in `dtype` on the CPU, the factor that multiplies cos and sin).

    `dtype` is the precision of the computation too: float32 gives Hugging Face's values, float64 the exact ones.
    ValueError for an odd head_dim.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim ({head_dim}) must be even for rotary positions: use {head_dim + 1}")
    exponent = torch.arange(0, head_dim, 2).to(dtype) / head_dim
    wavelength = theta**exponent  # [D/2], in units of 2 pi positions
    if scaling is None:
        return 1.0 / wavelength, 1.0
    trained_length = scaling.original_max_position_embeddings or max_position_embeddings
    if scaling.rope_type == "linear":
        return 1.0 / wavelength / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(1.0 / wavelength, scaling, trained_length), 1.0
    return _yarn(wavelength, scaling, trained_length, theta=theta), _yarn_attention_factor(scaling)


def _llama3(inv_freq: torch.Tensor, scaling: RopeScaling, trained_length: int) -> torch.Tensor:
    """Llama 3.1's code: with the wavelength w = 2 pi / f and low, high = low_freq_factor, high_freq_factor,

    f' = f                        w < L / high
         f / s                    w > L / low
         (1 - b) f / s + b f      otherwise, b = (L / w - low) / (high - low)
    """
    low, high, factor = scaling.low_freq_factor, scaling.high_freq_factor, scaling.factor
    wavelength = 2 * math.pi / inv_freq
    blend = (trained_length / wavelength - low) / (high - low)
    blended = (1 - blend) * inv_freq / factor + blend * inv_freq
    stretched = torch.where(wavelength > trained_length / low, inv_freq / factor, blended)
    return torch.where(wavelength < trained_length / high, inv_freq, stretched)


def _yarn(wavelength: torch.Tensor, scaling: RopeScaling, trained_length: int, *, theta: float) -> torch.Tensor:
    """Section 3.2, equations 17 to 20, with the ramp over dimensions of the paper's code:

    f' = (1 - k) f / s + k f,      k = 1 - clamp((i - first) / (last - first), 0, 1)

    where `first` and `last` are the dimensions that turn beta_fast and beta_slow times within L positions.
    """
    num_pairs = wavelength.numel()
    first = _dimension_that_turns(scaling.beta_fast, trained_length, 2 * num_pairs, theta)
    last = _dimension_that_turns(scaling.beta_slow, trained_length, 2 * num_pairs, theta)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * num_pairs - 1)
    width = last - first if last != first else 0.001  # a step, without dividing by zero
    ramp = torch.clamp((torch.arange(num_pairs, dtype=wavelength.dtype) - first) / width, 0, 1)
    keep = 1 - ramp
    return 1.0 / (scaling.factor * wavelength) * (1 - keep) + 1.0 / wavelength * keep


def _dimension_that_turns(num_turns: float, trained_length: int, head_dim: int, theta: float) -> float:
    """i with num_turns = L f_i / (2 pi), so i = D ln(L / (2 pi num_turns)) / (2 ln theta); not rounded."""
    return head_dim * math.log(trained_length / (num_turns * 2 * math.pi)) / (2 * math.log(theta))


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    """Section 3.4: 0.1 ln(s) + 1, unless given; DeepSeek's variant is a quotient of two such terms."""

    def scale(weight: float) -> float:
        return 1.0 if scaling.factor <= 1.0 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    return scale(1.0)
