"""The global gradient norm, every element counted once, and the divisor that clips by it.

Letters: g gradient.
"""

from __future__ import annotations

import torch

from megallm.parallel.collectives import all_reduce_
from megallm.parallel.mesh import Mesh


def global_norm(slices: list[torch.Tensor], mesh: Mesh, *, is_sharded: bool) -> torch.Tensor:
    """0-d fp64: the 2-norm over all slices of all (tp, pp) ranks, and of all shards where there are any.

    A collective of two or three 1-element all-reduces.
    """
    if slices:
        norms = torch.stack([torch.linalg.vector_norm(g) for g in slices])
        square = norms.double().square().sum()
    else:
        square = torch.zeros((), dtype=torch.float64, device=mesh.device)
    if is_sharded:
        square = all_reduce_(square, mesh.shard)
    return all_reduce_(all_reduce_(square, mesh.tp), mesh.pp).sqrt_()


def clip_divisor(norm: torch.Tensor, max_grad_norm: float) -> torch.Tensor:
    """What gradients must be divided by to have a norm of at most max_grad_norm; 1 when that is 0. No host sync."""
    if max_grad_norm == 0.0:
        return torch.ones_like(norm)
    return (norm / max_grad_norm).clamp_(min=1.0)
