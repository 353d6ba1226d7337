"""The global gradient norm, every element counted once, and the divisor that clips by it.

Letters: g gradient, n slices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megallm.parallel.collectives import all_reduce_, broadcast_text
from megallm.parallel.mesh import Mesh
from megallm_kernels.cpu_adamw import squared_norm


@dataclass(frozen=True)
class GradientNorm:
    """The norm of all ranks, and what this rank's part of it was made of."""

    value: torch.Tensor
    """0-d fp64."""
    names: list[str]
    """Of this rank's slices [n]."""
    parts: torch.Tensor | None
    """[n]: norms of the slices; None where all are known to be finite."""
    mesh: Mesh

    def first_bad(self) -> str:
        """The parameter whose gradient was the first in backward not to be finite. A collective with a host sync."""
        own = ""
        if self.parts is not None:
            bad = (~torch.isfinite(self.parts)).nonzero()
            own = self.names[int(bad[0])] if len(bad) else ""
        # Ranks of later stages come later, and backward begins there.
        world = self.mesh.world
        last = torch.tensor(world.rank if own else -1, device=self.mesh.device)
        src = int(all_reduce_(last, world, op="max"))
        return broadcast_text(own, world, self.mesh.device, src=src) if src >= 0 else "a sum of finite gradients"


def global_norm(names: list[str], slices: list[torch.Tensor], mesh: Mesh, *, is_sharded: bool) -> GradientNorm:
    """The 2-norm over all slices of all (tp, pp) ranks, and of all shards where there are any.

    A collective of two or three 1-element all-reduces.
    """
    square, parts = _own_square(slices, mesh)
    if is_sharded:
        square = all_reduce_(square, mesh.shard)
    return GradientNorm(all_reduce_(all_reduce_(square, mesh.tp), mesh.pp).sqrt_(), names, parts, mesh)


def clip_divisor(norm: torch.Tensor, max_grad_norm: float) -> torch.Tensor:
    """What gradients must be divided by to have a norm of at most max_grad_norm; 1 when that is 0. No host sync."""
    if max_grad_norm == 0.0:
        return torch.ones_like(norm)
    return (norm / max_grad_norm).clamp_(min=1.0)


def _own_square(slices: list[torch.Tensor], mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not slices:
        return torch.zeros((), dtype=torch.float64, device=mesh.device), None
    if slices[0].is_cpu and slices[0].dtype != torch.float64:
        square = squared_norm(slices, fallback=True)
        parts = None if math.isfinite(square) else _norms(slices)
        return torch.tensor(square, dtype=torch.float64).to(mesh.device), parts
    parts = _norms(slices)
    return parts.double().square().sum(), parts


def _norms(slices: list[torch.Tensor]) -> torch.Tensor:
    wide = torch.float64 if slices[0].dtype == torch.float64 else torch.float32
    return torch.stack(torch._foreach_norm(slices, 2, dtype=wide))
