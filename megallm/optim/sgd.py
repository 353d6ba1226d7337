"""SGD with momentum on the shards of flat buckets, as torch.optim.SGD (dampening 0, no Nesterov).

    g <- g + wd p                   weight decay is part of the gradient: unlike AdamW's, momentum carries it on
    b <- mu b + g                   p <- p - lr b

Bytes of state per element, beside the master's 4 (where there is one): 4; none where the momentum mu is 0.
"""

from __future__ import annotations

import torch

from megallm.config.optim import OptimConfig
from megallm.optim.gradients import Gradients
from megallm.optim.optimizer import Optimizer, StatePart
from megallm.optim.residency import Residency


class SGD(Optimizer):
    """Stochastic gradient descent."""

    name = "sgd"

    def __init__(self, gradients: Gradients, residency: Residency, config: OptimConfig) -> None:
        """config.momentum is decided."""
        super().__init__(gradients, residency, config)
        assert config.momentum is not None and self._host is None
        self._momentum = config.momentum
        self.momentum = [self._zeros(f) for f in self._flats] if config.momentum else []
        self._step = torch.zeros((), device=gradients.flat.model.mesh.device)

    @torch.no_grad()
    def step(self, *, learning_rate: float, grad_divisor: torch.Tensor, is_bad: torch.Tensor) -> None:
        """See Optimizer."""
        self._residency.start_update()
        bad = is_bad > 0
        for i, (flat, master) in enumerate(zip(self._flats, self.master, strict=True)):
            grad = self._grads[i].to(master.dtype) / grad_divisor
            decayed = slice(0, flat.decay_numel)
            grad[decayed].add_(master[decayed], alpha=self._config.weight_decay)
            if self.momentum:
                grad.add_(self.momentum[i], alpha=self._momentum)
                self.momentum[i].copy_(torch.where(bad, self.momentum[i], grad))
            master.sub_(grad.masked_fill_(bad, 0.0), alpha=learning_rate)
        self._step.add_(1 - is_bad)
        self.publish()

    @property
    def num_steps(self) -> torch.Tensor:
        """0-d: updates done so far."""
        return self._step

    def set_num_steps(self, steps: float) -> None:
        """Sets the count of updates."""
        self._step.fill_(steps)

    def state(self) -> dict[str, list[StatePart]]:
        """momentum, and masters, where there are some."""
        return ({"momentum": self._state_parts(self.momentum)} if self.momentum else {}) | super().state()
