"""Tensors seen as rows, so that slices of a packed buffer are read and written in place.

    [T, H]                 ->  T rows                           R0 = T, R1 = 1
    [T, heads, D] a slice  ->  T * heads rows of D elements     R0 = T, R1 = heads, with both strides
"""

from __future__ import annotations

import torch


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., H] as [R0, R1, H] with unit stride along H: a view where strides allow it, else of a copy."""
    if x.dim() == 1:
        x = x.unsqueeze(0)
    if x.stride(-1) != 1 and x.size(-1) > 1:
        x = x.contiguous()
    if x.dim() == 2:
        return x.unsqueeze(1)
    if x.dim() == 3 and x.stride(0) != x.size(1) * x.stride(1):
        return x
    return x.reshape(-1, x.size(-1)).unsqueeze(1)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (1 for n <= 1)."""
    return 1 << max(n - 1, 0).bit_length()
