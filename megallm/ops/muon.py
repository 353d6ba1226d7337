"""Muon's step for a matrix: about the orthogonal one nearest to it (Jordan et al., kellerjordan.github.io/posts/muon).

    X <- M / |M|_F,  five times  X <- a X + b (X X^T) X + c (X X^T)^2 X        a, b, c = 3.4445, -4.7750, 2.0315

M = U S V^T becomes U S' V^T: five times an odd polynomial of the singular values, which takes all of them above
|M|_F / 500 to between 0.68 and 1.21. The coefficients are for speed: they give up ones for steep growth near 0. FLOPs
of a time, r the smaller of rows and columns, q the larger: 4 r^2 q + 2 r^3.
"""

from __future__ import annotations

import math

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_SMALLEST_NORM = 1e-7


def orthogonalize_reference(matrix: torch.Tensor, *, steps: int = 5) -> torch.Tensor:
    """The specification, for one matrix in its own dtype."""
    a, b, c = COEFFICIENTS
    x = matrix / matrix.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def orthogonalize(matrices: torch.Tensor, *, steps: int = 5) -> torch.Tensor:
    """U S' V^T of each U S V^T, [..., rows, cols] as `matrices`; a matrix of zeros stays one.

    Computes, and returns, in `working_dtype`.
    """
    a, b, c = COEFFICIENTS
    rows, cols = matrices.shape[-2:]
    wide = matrices.reshape(-1, rows, cols).to(working_dtype(matrices))
    wide = wide.mT if rows > cols else wide
    norm_dtype = torch.promote_types(wide.dtype, torch.float32)
    norms = torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True, dtype=norm_dtype).clamp_(min=_SMALLEST_NORM)
    x = wide / norms.to(wide.dtype)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if rows > cols else x).reshape(matrices.shape)


def working_dtype(x: torch.Tensor) -> torch.dtype:
    """bf16 on a GPU, where the products are, as published; elsewhere, and for proofs in fp64, x's own."""
    return torch.bfloat16 if x.is_cuda and x.dtype != torch.float64 else x.dtype


def step_scale(rows: int, cols: int) -> float:
    """What an orthogonal matrix is multiplied by, so that its elements' root mean square is 0.2, about that of AdamW's.

    0.2 sqrt(max(rows, cols)): AdamW's learning rate and weight decay carry over (arXiv 2502.16982, section 2.2).
    """
    return 0.2 * math.sqrt(max(rows, cols))
