"""AdamW on the shards of flat buckets, with fp32 master weights for bf16 models.

Per element of a shard: 4 bytes master (bf16 models only) + 8 moments. Without ZeRO the one shard is the whole bucket.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megallm.config.optim import OptimConfig
from megallm.ops.adamw import FusedAdamW, adamw_
from megallm.ops.backends import DEFAULT, Backends
from megallm.optim.flat import FlatBucket
from megallm.optim.gradients import Gradients
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


class AdamW:
    """Updates this rank's shards of the model's parameters from `Gradients`."""

    def __init__(
        self, gradients: Gradients, residency: Residency, config: OptimConfig, *, backends: Backends = DEFAULT
    ) -> None:
        self._config, self._backends = config, backends
        self._residency = residency
        self._flats: list[FlatBucket] = [b.flat for b in gradients.buckets]
        self._grads = [b.shard for b in gradients.buckets]
        wide = torch.float64 if any(f.shard.dtype == torch.float64 for f in self._flats) else torch.float32
        self.exp_avg = [torch.zeros_like(f.shard, dtype=wide) for f in self._flats]
        self.exp_avg_sq = [torch.zeros_like(f.shard, dtype=wide) for f in self._flats]
        self._has_master = any(f.shard.dtype != wide for f in self._flats)
        self.master = [f.shard.to(wide) if self._has_master else f.shard for f in self._flats]
        """The weights that are updated: fp32 copies of bf16 parameters, else the parameters themselves."""
        device = self.master[0].device if self.master else None
        self._steps = [torch.zeros((), device=device) for _ in range(2 * len(self.master))]
        self._fused: FusedAdamW | None = None

    @torch.no_grad()
    def step(self, *, learning_rate: float, grad_divisor: torch.Tensor, is_bad: torch.Tensor) -> None:
        """One update; gradients are divided by the 0-d `grad_divisor`; nothing changes where 0-d `is_bad` is 1."""
        self._residency.start_update()
        if self.master and self._backends.pick("adamw", self.master[0], 0) != "torch":
            self._step_at_once(learning_rate, grad_divisor, is_bad)
            self._residency.finish_update()
            return
        c = self._config
        for decayed in (True, False):
            parts = [
                self._part(tensors, decayed) for tensors in (self.master, self._grads, self.exp_avg, self.exp_avg_sq)
            ]
            steps = self._steps[: len(self.master)] if decayed else self._steps[len(self.master) :]
            live = [i for i, part in enumerate(parts[0]) if part.numel()]
            params, grads, exp_avgs, exp_avg_sqs = ([part[i] for i in live] for part in parts)
            adamw_(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                steps=[steps[i] for i in live],
                lr=learning_rate,
                beta1=c.beta1,
                beta2=c.beta2,
                eps=c.eps,
                weight_decay=c.weight_decay if decayed else 0.0,
                grad_divisor=grad_divisor,
                is_bad=is_bad,
            )
        self.publish()

    def _step_at_once(self, learning_rate: float, grad_divisor: torch.Tensor, is_bad: torch.Tensor) -> None:
        """All buckets in one launch, which also writes the bf16 parameters."""
        c = self._config
        if self._fused is None:
            params = [f.shard for f in self._flats] if self._has_master else []
            lists = (self.master, self._grads, self.exp_avg, self.exp_avg_sq, params)
            self._fused = FusedAdamW(
                *([*self._both_parts(tensors)] for tensors in lists),
                decayed=[True, False] * len(self.master),
                step=self._steps[0],
                backend=self._backends.pick("adamw", self.master[0], 0),
            )
        self._fused.update_(
            learning_rate=learning_rate, grad_divisor=grad_divisor, is_bad=is_bad, beta1=c.beta1, beta2=c.beta2,
            eps=c.eps, weight_decay=c.weight_decay,
        )  # fmt: skip

    def publish(self) -> None:
        """Copies the master weights into the model's parameters, and makes all ranks' updates known."""
        if self._has_master:
            for master, flat in zip(self.master, self._flats, strict=True):
                flat.shard.copy_(master)
        self._residency.finish_update()

    def refresh_master(self) -> None:
        """Takes the model's parameters as the new master weights (after weights were loaded)."""
        if self._has_master:
            for master, flat in zip(self.master, self._flats, strict=True):
                master.copy_(flat.shard)

    @property
    def num_steps(self) -> torch.Tensor:
        """0-d: updates done so far."""
        return torch.stack(self._steps).max()  # parts without elements are not counted up

    def set_num_steps(self, steps: float) -> None:
        """Sets the count that bias correction uses."""
        for tensor in self._steps:
            tensor.fill_(steps)

    def state(self) -> dict[str, list[StatePart]]:
        """{`exp_avg` | `exp_avg_sq` | `master`: what this rank's shards hold of it}."""
        kinds = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if self._has_master:
            kinds["master"] = self.master
        return {kind: self._state_parts(tensors) for kind, tensors in kinds.items()}

    def _both_parts(self, tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        for tensor, flat in zip(tensors, self._flats, strict=False):
            yield tensor[: flat.decay_numel]
            yield tensor[flat.decay_numel :]

    def _part(self, tensors: list[torch.Tensor], decayed: bool) -> list[torch.Tensor]:
        split = [f.decay_numel for f in self._flats]
        return [t[:n] if decayed else t[n:] for t, n in zip(tensors, split, strict=True)]

    def _state_parts(self, tensors: list[torch.Tensor]) -> list[StatePart]:
        return [
            StatePart(slot.name, start, tensor[at : at + stop - start])
            for tensor, flat in zip(tensors, self._flats, strict=True)
            for slot, start, stop, at in flat.parts()
        ]
