"""Random numbers as a pure function of (key, index): the same on every layout, with no state to save or restore.

A counter-based generator: a 64-bit key (made from the seed and a name) and the element's global index go through two
rounds of the SplitMix64 finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014). A rank that owns a slice of a tensor draws just that slice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch

_MASK = (1 << 64) - 1
_CHUNK = 1 << 22  # elements drawn at once: bounds the temporary int64 and fp64 tensors to about 200 MB


def key(seed: int, *words: object) -> int:
    """A 64-bit key from the seed and any words (names, steps, layers), well mixed."""
    text = "/".join([str(seed), *(str(w) for w in words)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniform(index: torch.Tensor, key: int | torch.Tensor) -> torch.Tensor:
    """fp64 numbers in (0, 1), one for each int64 index, any shape. A tensor: `signed` keys, one for each index."""
    if isinstance(key, torch.Tensor):
        first, second = key, key * _signed(0x9E3779B97F4A7C15)
        bits = _mix(_mix(index + first) ^ second)
    else:
        bits = _mix(_mix(index + _signed(key)) ^ _signed(key * 0x9E3779B97F4A7C15))
    return ((bits >> 11) & ((1 << 53) - 1)).double().add_(0.5).mul_(2.0**-53)


def normal_(out: torch.Tensor, *, key: int, start: tuple[int, ...], shape: tuple[int, ...], std: float) -> None:
    """Fills `out` with its slice of the normal tensor of global `shape` that begins at `start`.

    Computed in fp64 by Box and Muller (1958) and rounded through fp32, so that neither the slicing nor the
    precision that trains changes a weight.
    """
    for rows, index in _in_parts(out, start, shape):
        radius = uniform(index * 2, key).log_().mul_(-2.0).sqrt_()
        angle = uniform(index * 2 + 1, key).mul_(2.0 * math.pi)
        rows.copy_(angle.cos_().mul_(radius).mul_(std).float())


def uniform_(out: torch.Tensor, *, key: int, start: tuple[int, ...], shape: tuple[int, ...], std: float) -> None:
    """`normal_` for numbers uniform in (-b, b), where b = sqrt(3) std."""
    for rows, index in _in_parts(out, start, shape):
        rows.copy_(uniform(index, key).mul_(2.0).sub_(1.0).mul_(math.sqrt(3.0) * std).float())


def keep_mask(index: torch.Tensor, *, key: int, drop: float) -> torch.Tensor:
    """Boolean mask, true with probability 1 - drop, one for each int64 index."""
    return uniform(index, key) >= drop


def _in_parts(
    out: torch.Tensor, start: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(rows of `out`, their elements' global index), few rows at a time."""
    rows_at_once = max(1, _CHUNK // max(1, out[:1].numel()))
    for first in range(0, out.size(0), rows_at_once):
        rows = out[first : first + rows_at_once]
        yield rows, _global_index(rows.shape, (start[0] + first, *start[1:]), shape, out.device)


def _global_index(
    size: torch.Size, start: tuple[int, ...], shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Row-major global index of every element of a slice, int64."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for dim, (length, offset, full) in enumerate(zip(size, start, shape, strict=True)):
        along = torch.arange(offset, offset + length, device=device)
        index = index.unsqueeze(-1) * full + along.view((1,) * dim + (-1,))
    return index


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed(key: int) -> int:
    """The key as an element of an int64 tensor."""
    return _signed(key)


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value
