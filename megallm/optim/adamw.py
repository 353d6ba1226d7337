"""AdamW on the shards of flat buckets.

Per element of a shard: 4 bytes master (where there is one) + 8 moments. Where these are decides who updates:

    on a GPU                every bucket in one launch, which writes low-precision parameters too; or torch's fused form
    in the host's memory    bucket after bucket in C++, which writes low-precision parameters too, so that a bucket's
                            parameters travel while the next one is updated; or torch's fused form
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megallm.config.optim import OptimConfig
from megallm.ops.adamw import FusedAdamW
from megallm.ops.backends import DEFAULT, Backends
from megallm.optim.gradients import Gradients
from megallm.optim.optimizer import Optimizer, StatePart
from megallm.optim.residency import Residency
from megallm_kernels.cpu_adamw import cpu_adamw_


class AdamW(Optimizer):
    """Decoupled weight decay (arXiv 1711.05101)."""

    name = "adamw"

    def __init__(
        self, gradients: Gradients, residency: Residency, config: OptimConfig, *, backends: Backends = DEFAULT
    ) -> None:
        super().__init__(gradients, residency, config)
        self.exp_avg = [self._zeros(f) for f in self._flats]
        self.exp_avg_sq = [self._zeros(f) for f in self._flats]
        device = self.master[0].device if self.master else None
        self._step = torch.zeros((), device=device)
        self._backend = backends.pick("adamw", self.master[0], 0) if self.master else "torch"
        self._fused: FusedAdamW | None = None
        self._copies = self._low_precision_copies() if self._backend == "cpu" else []
        """Where the CPU's update writes parameters, a tensor for each bucket; none where they are the masters."""

    @torch.no_grad()
    def step(self, *, learning_rate: float, grad_divisor: torch.Tensor, is_bad: torch.Tensor) -> None:
        """See Optimizer."""
        self._residency.start_update()
        if self._backend == "cpu":
            self._step_on_host(learning_rate, float(grad_divisor), bool(is_bad))
        else:
            self._step_at_once(learning_rate, grad_divisor, is_bad)

    def _step_at_once(self, learning_rate: float, grad_divisor: torch.Tensor, is_bad: torch.Tensor) -> None:
        c = self._config
        writes_params = self._has_master and self._backend != "torch"
        if self._fused is None:
            params = [f.shard for f in self._flats] if writes_params else []
            lists = (self.master, self._grads, self.exp_avg, self.exp_avg_sq, params)
            self._fused = FusedAdamW(
                *([*self._both_parts(tensors)] for tensors in lists),
                decayed=[True, False] * len(self.master),
                step=self._step,
                backend=self._backend,
            )
        self._fused.update_(
            learning_rate=learning_rate, grad_divisor=grad_divisor, is_bad=is_bad, beta1=c.beta1, beta2=c.beta2,
            eps=c.eps, weight_decay=c.weight_decay,
        )  # fmt: skip
        if not writes_params:
            self.publish()
            return
        for flat in reversed(self._flats):
            self._residency.updated(flat)

    def _step_on_host(self, learning_rate: float, grad_divisor: float, is_bad: bool) -> None:
        if is_bad:
            return
        c = self._config
        self._step.add_(1)
        for i in reversed(range(len(self._flats))):  # in the order of use
            n = self._flats[i].decay_numel
            tensors = (self.master[i], self._grads[i], self.exp_avg[i], self.exp_avg_sq[i], *self._copies[i : i + 1])
            cpu_adamw_(
                *([t[:n], t[n:]] for t in tensors), decayed=[True, False], step=int(self._step),
                learning_rate=learning_rate, grad_scale=1.0 / grad_divisor, beta1=c.beta1, beta2=c.beta2, eps=c.eps,
                weight_decay=c.weight_decay,
            )  # fmt: skip
            if self._host is not None:
                self._flats[i].receive(self._copies[i] if self._copies else self.master[i])
            self._residency.updated(self._flats[i])

    @property
    def num_steps(self) -> torch.Tensor:
        """0-d: updates done so far."""
        return self._step

    def set_num_steps(self, steps: float) -> None:
        """Sets the count that bias correction uses."""
        self._step.fill_(steps)

    def state(self) -> dict[str, list[StatePart]]:
        """exp_avg, exp_avg_sq, and masters where there are some."""
        kinds = {"exp_avg": self._state_parts(self.exp_avg), "exp_avg_sq": self._state_parts(self.exp_avg_sq)}
        return kinds | super().state()

    def _low_precision_copies(self) -> list[torch.Tensor]:
        if not self._flats or self._flats[0].shard.dtype == self._wide:
            return []
        if self._host is None or self._host.holds_params:
            return [f.shard for f in self._flats]
        return [self._host.zeros(f.shard.numel(), f.shard.dtype) for f in self._flats]

    def _both_parts(self, tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        for tensor, flat in zip(tensors, self._flats, strict=False):
            yield tensor[: flat.decay_numel]
            yield tensor[flat.decay_numel :]
