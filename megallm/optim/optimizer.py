"""AdamW on flat buckets, with fp32 master weights for bf16 models.

Per parameter: bf16 models keep 2 bytes weight + 4 gradient + 4 master + 8 moments; fp32 models 4 + 4 + 8.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megallm.config.optim import OptimConfig
from megallm.ops.adamw import FusedAdamW, adamw_
from megallm.ops.backends import DEFAULT, Backends
from megallm.optim.gradients import Gradients


class AdamW:
    """Updates the model's parameters from `Gradients`."""

    def __init__(self, gradients: Gradients, config: OptimConfig, *, backends: Backends = DEFAULT) -> None:
        self._config, self._backends = config, backends
        self._gradients = gradients
        self.exp_avg = [torch.zeros_like(b.grads) for b in gradients.buckets]
        self.exp_avg_sq = [torch.zeros_like(b.grads) for b in gradients.buckets]
        self._has_master = any(b.params.dtype != b.grads.dtype for b in gradients.buckets)
        self.master = [b.params.to(b.grads.dtype) if self._has_master else b.params for b in gradients.buckets]
        """The weights that are updated: fp32 copies of bf16 parameters, else the parameters themselves."""
        device = self.master[0].device if self.master else None
        self._steps = [torch.zeros((), device=device) for _ in range(2 * len(self.master))]
        self._fused: FusedAdamW | None = None

    @torch.no_grad()
    def step(self, *, learning_rate: float, grad_divisor: torch.Tensor, is_bad: torch.Tensor) -> None:
        """One update; gradients are divided by the 0-d `grad_divisor`; nothing changes where 0-d `is_bad` is 1."""
        if self.master and self._backends.pick("adamw", self.master[0], 0) != "torch":
            self._step_at_once(learning_rate, grad_divisor, is_bad)
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
            params = [b.params for b in self._gradients.buckets] if self._has_master else []
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
        """Copies the master weights into the model's parameters, where they differ."""
        if self._has_master:
            for master, buffers in zip(self.master, self._gradients.buckets, strict=True):
                buffers.params.copy_(master)

    def refresh_master(self) -> None:
        """Takes the model's parameters as the new master weights (after weights were loaded)."""
        if self._has_master:
            for master, buffers in zip(self.master, self._gradients.buckets, strict=True):
                master.copy_(buffers.params)

    @property
    def num_steps(self) -> torch.Tensor:
        """0-d: updates done so far."""
        return self._steps[0]

    def set_num_steps(self, steps: float) -> None:
        """Sets the count that bias correction uses."""
        for tensor in self._steps:
            tensor.fill_(steps)

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """{`exp_avg` | `exp_avg_sq` | `master`: {parameter's name: view with the parameter's number of elements}}."""
        kinds = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if self._has_master:
            kinds["master"] = self.master
        return {kind: self._views(tensors) for kind, tensors in kinds.items()}

    @property
    def _grads(self) -> list[torch.Tensor]:
        return [b.grads for b in self._gradients.buckets]

    def _both_parts(self, tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        for tensor, buffers in zip(tensors, self._gradients.buckets, strict=False):
            yield tensor[: buffers.bucket.decay_numel]
            yield tensor[buffers.bucket.decay_numel :]

    def _part(self, tensors: list[torch.Tensor], decayed: bool) -> list[torch.Tensor]:
        split = [b.bucket.decay_numel for b in self._gradients.buckets]
        return [t[:n] if decayed else t[n:] for t, n in zip(tensors, split, strict=True)]

    def _views(self, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        views = {}
        for tensor, buffers in zip(tensors, self._gradients.buckets, strict=True):
            for slot in buffers.bucket.slots:
                views[slot.name] = tensor[slot.start : slot.start + slot.numel]
        return views
