"""What a rank's parameter is: which slices of which global tensors it holds, and who else holds them.

Global tensors carry Hugging Face's unfused names (`...self_attn.q_proj.weight`); a rank stores fused ones. A
`ParamSpec` is the one record that says how the two meet; initial weights, gradient reduction, the gradient norm,
checkpoints and Hugging Face files all read it, and nothing is hidden in attributes of tensors.

    qkv_proj.weight of tp rank 1 of 2 (N=4 query heads, K=2):      rows    global tensor   start  length
        [ q head 2 ]  <- piece 0                                   0-2D    q_proj.weight   2D     2D
        [ q head 3 ]
        [ k head 1 ]  <- piece 1                                   2D-3D   k_proj.weight   D      D
        [ v head 1 ]  <- piece 2                                   3D-4D   v_proj.weight   D      D
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from megallm.parallel.mesh import Axis


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One slice of a global tensor, and where it lies in the local parameter."""

    name: str
    """Global (unfused) name."""
    shape: tuple[int, ...]
    """Global shape."""
    dim: int = 0
    """The sharded dimension."""
    start: int = 0
    """First index of the slice along `dim`, in the global tensor."""
    length: int
    """Extent of the slice along `dim`; 0 when this rank holds padding only."""
    offset: int = 0
    """First index along `dim` in the local parameter."""
    replicas: int = 1
    """Consecutive tp ranks that hold this very slice (KV heads when there are fewer than tp)."""

    def local(self, parameter: torch.Tensor) -> torch.Tensor:
        """The view of this piece in the local parameter (or in anything of its shape)."""
        return parameter.narrow(self.dim, self.offset, self.length)

    @property
    def local_start(self) -> tuple[int, ...]:
        """Index of the slice's first element in the global tensor."""
        return tuple(self.start if d == self.dim else 0 for d in range(len(self.shape)))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the slice."""
        return tuple(self.length if d == self.dim else n for d, n in enumerate(self.shape))


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One local parameter."""

    pieces: tuple[Piece, ...]
    init: Literal["normal", "uniform", "zeros", "ones"] = "normal"
    std: float = 0.02
    """Standard deviation of a normal initialisation, or of a uniform one around 0."""
    weight_decay: bool = True
    """Whether decoupled weight decay applies: matrices yes, norms, biases and positions no."""
    tp_replicated: bool = False
    """Whether every tp rank holds the whole tensor."""
    tp_partial: bool = False
    """Whether each tp rank's gradient is a partial sum, to be summed over tp (sequence parallel)."""
    is_adapter: bool = False
    """Whether it is part of an adapter, which a model has beside the parameters of its shape."""
    tied: bool = False
    """Whether the first and the last pipeline rank both hold it, so that its gradients are summed over both."""


def shard_range(total: int, axis: Axis, *, multiple: int = 1) -> tuple[int, int, int]:
    """(padded local size, start, length) of this rank's part of `total` rows, padded to size * multiple."""
    local = math.ceil(total / (axis.size * multiple)) * multiple
    start = min(axis.rank * local, total)
    return local, start, min(local, total - start)


def whole(name: str, shape: tuple[int, ...]) -> Piece:
    """The piece of a parameter that is not sharded."""
    return Piece(name=name, shape=shape, length=shape[0])


def is_counted(spec: ParamSpec, piece: Piece, *, tp: Axis, is_second_copy: bool) -> bool:
    """Whether this rank is the one that counts the piece in a global norm (or writes it to a checkpoint).

    `is_second_copy`: this rank holds the tied embedding's copy of the last pipeline stage.
    """
    if piece.length == 0 or (spec.tied and is_second_copy):
        return False
    return tp.rank == 0 if spec.tp_replicated else tp.rank % piece.replicas == 0
