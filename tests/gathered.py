"""From the slices that ranks hold to whole tensors, by global name: what tests compare across layouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megallm.model.transformer import Transformer


@dataclass(frozen=True)
class Part:
    """One rank's slice of a global tensor."""

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    data: torch.Tensor


def parts_of(model: Transformer, tensors: dict[str, torch.Tensor]) -> list[Part]:
    """The slices in `tensors` (by local name, with the parameters' numbers of elements).

    Raises AssertionError where what is outside all slices (padding) is not zero.
    """
    parts = []
    for name, spec, parameter in model.slices():
        if name not in tensors:
            continue
        tensor = tensors[name].detach().clone().view(parameter.shape)
        for piece in spec.pieces:
            parts.append(Part(piece.name, piece.shape, piece.local_start, piece.local(tensor).clone()))
        for piece in spec.pieces:
            piece.local(tensor).zero_()
        assert not tensor.any(), f"padding of {name} is not zero"
    return parts


def assembled(parts_of_ranks: list[list[Part]]) -> dict[str, torch.Tensor]:
    """The global tensors. Raises AssertionError where two ranks disagree in a bit, or an element is missing."""
    whole: dict[str, torch.Tensor] = {}
    for rank, parts in enumerate(parts_of_ranks):
        for part in parts:
            full = whole.setdefault(part.name, torch.full(part.shape, torch.nan, dtype=part.data.dtype))
            view = full[tuple(slice(o, o + n) for o, n in zip(part.start, part.data.shape, strict=True))]
            known = ~view.isnan()
            assert torch.equal(view[known], part.data[known]), f"rank {rank} holds another {part.name}"
            view.copy_(part.data)
    for name, full in whole.items():
        assert not full.isnan().any(), f"no rank holds part of {name}"
    return whole
