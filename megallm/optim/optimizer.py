"""AdamW on flat buckets, with fp32 master weights for bf16 models.

Per parameter: bf16 models keep 2 bytes weight + 4 gradient + 4 master + 8 moments; fp32 models 4 + 4 + 8.
"""

from __future__ import annotations

import torch

from megallm.config.optim import OptimConfig
from megallm.ops.adamw import adamw_
from megallm.optim.gradients import Gradients


class AdamW:
    """Updates the model's parameters from `Gradients`."""

    def __init__(self, gradients: Gradients, config: OptimConfig) -> None:
        self._config = config
        self._gradients = gradients
        self.exp_avg = [torch.zeros_like(b.grads) for b in gradients.buckets]
        self.exp_avg_sq = [torch.zeros_like(b.grads) for b in gradients.buckets]
        self._has_master = any(b.params.dtype != b.grads.dtype for b in gradients.buckets)
        self.master = [b.params.to(b.grads.dtype) if self._has_master else b.params for b in gradients.buckets]
        """The weights that are updated: fp32 copies of bf16 parameters, else the parameters themselves."""
        device = self.master[0].device if self.master else None
        self._steps = [torch.zeros((), device=device) for _ in range(2 * len(self.master))]

    @torch.no_grad()
    def step(self, *, learning_rate: float, grad_divisor: torch.Tensor, is_bad: torch.Tensor) -> None:
        """One update; gradients are divided by the 0-d `grad_divisor`; nothing changes where 0-d `is_bad` is 1."""
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

    def _part(self, tensors: list[torch.Tensor], decayed: bool) -> list[torch.Tensor]:
        split = [b.bucket.decay_numel for b in self._gradients.buckets]
        return [t[:n] if decayed else t[n:] for t, n in zip(tensors, split, strict=True)]

    def _views(self, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        views = {}
        for tensor, buffers in zip(tensors, self._gradients.buckets, strict=True):
            for slot in buffers.bucket.slots:
                views[slot.name] = tensor[slot.start : slot.start + slot.numel]
        return views
