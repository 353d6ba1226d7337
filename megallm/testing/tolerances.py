"""Tolerances that follow from the arithmetic, so that none is ever widened until a test passes.

A result of n roundings of relative size eps, on numbers of a given magnitude, is off by about
eps * magnitude * sqrt(n): the errors add up like a random walk (Higham, Accuracy and Stability of Numerical Algorithms,
section 2.8). The largest error of many elements lies a few standard deviations out, hence the factor `SIGMAS`.
"""

from __future__ import annotations

import torch

SIGMAS = 4.0
"""One in 16,000 normal errors lies beyond; rounding errors are bounded, so theirs are rarer."""


def tolerance(dtype: torch.dtype, *, magnitude: float = 1.0, terms: int = 1) -> float:
    """Absolute tolerance SIGMAS * eps(dtype) * magnitude * sqrt(terms).

    `magnitude`: of the largest intermediate value. `terms`: how many numbers are rounded into one result: the length
    of the longest sum, times the number of such sums in a row.
    """
    return SIGMAS * torch.finfo(dtype).eps * magnitude * max(terms, 1) ** 0.5


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, *, terms: int = 1, magnitude: float | None = None, label: str = ""
) -> None:
    """Raises AssertionError unless shapes agree and every element lies within `tolerance`.

    eps is that of the less precise of the two dtypes. `magnitude`: None = the largest of `expected`, absolute.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{label} shape {tuple(actual.shape)}, expected {tuple(expected.shape)}".strip())
    if expected.numel() == 0:
        return
    dtype = max(actual.dtype, expected.dtype, key=lambda each: torch.finfo(each).eps)
    wide = expected.detach().double()
    error = (actual.detach().double() - wide).abs().max().item()
    largest = wide.abs().max().item() if magnitude is None else magnitude
    allowed = tolerance(dtype, magnitude=largest, terms=terms)
    if not error <= allowed:  # so that NaN fails
        why = f"{dtype}, magnitude {largest:.3e}, {terms} terms"
        raise AssertionError(f"{label} off by {error:.3e}, allowed {allowed:.3e} ({why})".strip())
