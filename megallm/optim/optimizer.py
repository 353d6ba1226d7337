"""What all optimizers share: shards of flat buckets, fp32 master weights, and the way back to the model's parameters.

Without ZeRO the one shard is the whole bucket. Masters, moments and sums of gradients are in the host's memory with
offload; masters are copies then, and else where parameters have low precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from megallm.config.optim import OptimConfig
from megallm.optim.flat import FlatBucket
from megallm.optim.gradients import Gradients
from megallm.optim.loss_scale import LossScale
from megallm.optim.residency import Residency


@dataclass(frozen=True)
class StatePart:
    """A flat part of one parameter's optimizer state."""

    name: str
    """The parameter's."""
    start: int
    """Its first element in the flat parameter."""
    data: torch.Tensor
    """1-d, a view of live memory."""


class Optimizer:
    """Updates this rank's shards of the model's parameters from `Gradients`."""

    name: ClassVar[str]
    """As in OptimConfig.optimizer."""

    def __init__(self, gradients: Gradients, residency: Residency, config: OptimConfig) -> None:
        self._config, self._residency = config, residency
        self._flats: list[FlatBucket] = [b.flat for b in gradients.buckets]
        self._grads = [b.shard for b in gradients.buckets]
        self._host = gradients.host
        self._wide = torch.float64 if any(f.shard.dtype == torch.float64 for f in self._flats) else torch.float32
        self._has_master = self._host is not None or any(f.shard.dtype != self._wide for f in self._flats)
        self.master = [self._zeros(f).copy_(f.shard) if self._has_master else f.shard for f in self._flats]
        """The weights that are updated: fp32 copies, or the parameters themselves."""
        self.loss_scale: LossScale | None = None
        """What gradients were multiplied by; None = 1."""

    @torch.no_grad()
    def step(self, *, learning_rate: float, grad_divisor: torch.Tensor, is_bad: torch.Tensor) -> None:
        """One update; gradients are divided by the 0-d `grad_divisor`; nothing changes where 0-d `is_bad` is 1."""
        raise NotImplementedError

    def state(self) -> dict[str, list[StatePart]]:
        """{`exp_avg` | `master` | ...: what this rank's shards hold of it}; no masters that equal the parameters."""
        is_more_precise = any(f.shard.dtype != self._wide for f in self._flats)
        return {"master": self._state_parts(self.master)} if is_more_precise else {}

    @property
    def num_steps(self) -> torch.Tensor:
        """0-d: updates done so far."""
        raise NotImplementedError

    def set_num_steps(self, steps: float) -> None:
        """Sets the count of updates."""
        raise NotImplementedError

    def publish(self) -> None:
        """Copies the master weights into the model's parameters, and makes all ranks' updates known."""
        for i in reversed(range(len(self._flats))):  # in the order of use
            if self._host is not None:
                self._flats[i].receive(self.master[i])
            elif self._has_master:
                self._flats[i].shard.copy_(self.master[i])
            self._residency.updated(self._flats[i])

    def refresh_master(self) -> None:
        """Takes the model's parameters as the new master weights (after weights were loaded)."""
        if self._has_master:
            for master, flat in zip(self.master, self._flats, strict=True):
                master.copy_(flat.shard)

    def _zeros(self, flat: FlatBucket) -> torch.Tensor:
        """State of a shard."""
        if self._host is not None:
            return self._host.zeros(flat.shard.numel(), self._wide)
        return torch.zeros_like(flat.shard, dtype=self._wide)

    def _state_parts(self, tensors: list[torch.Tensor]) -> list[StatePart]:
        return [
            StatePart(slot.name, start, tensor[at : at + stop - start])
            for tensor, flat in zip(tensors, self._flats, strict=True)
            for slot, start, stop, at in flat.parts()
        ]
