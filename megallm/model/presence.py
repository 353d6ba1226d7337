"""When a layer's parameters must be in memory: the model says so, and whoever shards them acts on it.

A unit is what is needed together: the embedding, one layer, or the final norm with the head. A stage enters its units
in the order of `Stage.units`; backward, which visits them in the reverse order, is marked by `leave`.
"""

from __future__ import annotations

import torch


class Presence:
    """The plain one: all parameters always are in memory."""

    def enter(self, unit: str) -> None:
        """The unit is about to compute; its parameters must be there when this returns."""

    def leave(
        self, unit: str, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The unit's outputs, whose gradient arrives before the unit's backward computes."""
        return x, residual
