"""Whether a result is right: error against fp64, bounds from the arithmetic, memory poisoned beforehand.

The error is ||out - ref|| / ||ref||. One rounding to a dtype with unit roundoff u makes at most u of it (0.4 u on
average); r of them in a row, independent, about u sqrt(r). A sum of n terms in fp32 adds about 2^-24 sqrt(n). The bound
is twice the sum of both; NaN and missing elements (poison) never pass.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-9}
TF32X3 = 2.0**-20
"""Of an fp32 product made of three tf32 products, with room: the dropped term is 2^-22 of the result."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One comparison."""

    what: str
    error: float
    bound: float

    @property
    def is_good(self) -> bool:
        """False for NaN."""
        return self.error <= self.bound


def bound(dtype: torch.dtype, *, roundings: float = 1.0, terms: int = 1, wide: float = 2.0**-24) -> float:
    """2 (u sqrt(roundings) + wide sqrt(terms))."""
    return 2.0 * (UNIT[dtype] * math.sqrt(roundings) + wide * math.sqrt(max(terms, 1)))


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - ref|| / ||ref|| in fp64; ||out|| if the reference is zero; NaN if the shapes differ."""
    if out.shape != reference.shape:
        return math.nan
    wide = reference.double()
    difference = torch.linalg.vector_norm(out.double() - wide)
    norm = torch.linalg.vector_norm(wide)
    return float(difference / norm) if float(norm) > 0 else float(difference)


def compare(
    what: str, out: torch.Tensor, reference: torch.Tensor, *, roundings: float = 1.0, terms: int = 1,
    wide: float = 2.0**-24, dtype: torch.dtype | None = None,
) -> Finding:  # fmt: skip
    """A finding; `dtype`: of the arithmetic, where the output's own is wider."""
    limit = bound(out.dtype if dtype is None else dtype, roundings=roundings, terms=terms, wide=wide)
    return Finding(what=what, error=relative_error(out, reference), bound=limit)


def identical(what: str, first: torch.Tensor, second: torch.Tensor) -> Finding:
    """That two runs agree to the bit."""
    return Finding(what=f"{what} twice", error=0.0 if torch.equal(first, second) else math.inf, bound=0.0)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN (the largest integer for integers) inside: what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
