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

_STAGE, _NOWHERE = 1 << 32, 1 << 62


@dataclass(frozen=True)
class GradientSlice:
    """A part of one global gradient that counts in the norm."""

    name: str
    """The parameter's global name."""
    place: int
    """Its place among the rank's parameters, in the order of backward, more or less."""
    data: torch.Tensor
    """Flat."""


@dataclass(frozen=True)
class GradientNorm:
    """The norm of all ranks, and what this rank's part of it was made of."""

    value: torch.Tensor
    """0-d fp64."""
    slices: list[GradientSlice]
    """This rank's [n], by name."""
    parts: torch.Tensor | None
    """[n]: norms of the slices; None where all are known to be finite."""
    mesh: Mesh

    def first_bad(self) -> str:
        """The parameter whose gradient was the first in backward not to be finite. A collective with a host sync."""
        own, key, world = "", _NOWHERE, self.mesh.world
        bad = () if self.parts is None else (~torch.isfinite(self.parts)).nonzero().flatten().tolist()
        if bad:
            first = min((self.slices[i] for i in bad), key=lambda each: each.place)
            own, key = first.name, first.place - _STAGE * self.mesh.pp.rank  # backward begins on the last stage
        least = int(all_reduce_(torch.tensor(key, device=self.mesh.device), world, op="min"))
        if least == _NOWHERE:
            return "only a sum of finite gradients"
        holder = torch.tensor(world.rank if key == least else world.size, device=self.mesh.device)
        return broadcast_text(own, world, self.mesh.device, src=int(all_reduce_(holder, world, op="min")))


def global_norm(slices: list[GradientSlice], mesh: Mesh, *, is_sharded: bool) -> GradientNorm:
    """The 2-norm over all slices of all (tp, pp) ranks, and of all shards where there are any.

    Slices are added by name, so that the norm's last bit does not depend on where they are kept.
    A collective of two or three 1-element all-reduces.
    """
    slices = sorted(slices, key=lambda each: each.name)
    square, parts = _own_square([each.data for each in slices], mesh)
    if is_sharded:
        square = all_reduce_(square, mesh.shard)
    return GradientNorm(all_reduce_(all_reduce_(square, mesh.tp), mesh.pp).sqrt_(), slices, parts, mesh)


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
    return parts.double().square().sum().to(mesh.device), parts


def _norms(slices: list[torch.Tensor]) -> torch.Tensor:
    wide = torch.float64 if slices[0].dtype == torch.float64 else torch.float32
    return torch.stack(torch._foreach_norm(slices, 2, dtype=wide))
