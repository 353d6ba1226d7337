"""The list of correctness checks: every op, with sizes that reach each row of each launch table.

A check draws fresh inputs, runs the kernel twice on poisoned memory and returns findings. The units are data, so that
several processes can share them out: compiling takes most of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpu_parts.compare import Finding
from gpu_parts.place import Place

Check = Callable[[Place, torch.Generator], list[Finding]]


@dataclass(frozen=True, kw_only=True)
class CheckUnit:
    """One check."""

    op: str
    """As in the tables of back ends; `permute` besides."""
    name: str
    """Unique within the op."""
    run: Check
    backend: str = "triton"
    """`cuda`: the compiled part."""

    @property
    def key(self) -> str:
        """Unique in a run."""
        return f"check/{self.op}/{self.name}"


def check_units(place: Place) -> list[CheckUnit]:
    """All checks for this place, heavy ones spread out; kernel files must be imported."""
    from gpu_parts import checks_attention, checks_decode, checks_losses, checks_moe, checks_pointwise, checks_update

    groups = [
        module.units(place)
        for module in (checks_attention, checks_decode, checks_pointwise, checks_losses, checks_update, checks_moe)
    ]
    longest = max(map(len, groups))
    return [group[i] for i in range(longest) for group in groups if i < len(group)]
