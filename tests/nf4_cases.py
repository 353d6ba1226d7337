"""Matrices that bitsandbytes and this library are both asked to put in 4 bits; every number follows from a name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from megallm.parallel import random

FIXTURE = Path(__file__).parent / "fixtures" / "nf4.json"
SHAPES = ((4, 16), (64, 64), (10, 30), (7, 9), (50, 2), (128, 128), (300, 130), (1000, 64))
"""Multiples of 64 weights, or of 64 times 256, and not; odd rows."""
KINDS = ("normal", "zeros", "zero blocks", "outliers", "small", "integers")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases() -> dict[str, torch.Tensor]:
    """Matrices by name."""
    return {
        f"{kind} {rows}x{columns} {dtype}": _matrix(kind, (rows, columns)).to(DTYPES[dtype])
        for kind in KINDS
        for rows, columns in SHAPES
        for dtype in DTYPES
    }


def _matrix(kind: str, shape: tuple[int, int]) -> torch.Tensor:
    x = torch.empty(shape)
    random.normal_(x, key=random.key(5, kind), start=(0, 0), shape=shape, std=0.02)
    flat = x.view(-1)
    if kind == "zeros":
        x.zero_()
    elif kind == "zero blocks":
        flat[: 200 if flat.numel() > 256 else 64] = 0
    elif kind == "outliers":
        flat[::97] *= 1e4
    elif kind == "small":
        x *= 1e-30
    elif kind == "integers":
        x.copy_((x * 100).round())
    return x


def digest(tensor: torch.Tensor) -> str:
    """Of the bits, in the order of the elements."""
    flat = tensor.detach().reshape(-1).contiguous()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()[:24]
