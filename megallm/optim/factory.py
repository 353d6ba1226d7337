"""The optimizer that a configuration names."""

from __future__ import annotations

from dataclasses import replace

from megallm.config.optim import OptimConfig
from megallm.config.resolve import resolve_momentum
from megallm.ops.backends import DEFAULT, Backends
from megallm.optim.adamw import AdamW
from megallm.optim.gradients import Gradients
from megallm.optim.muon import Muon
from megallm.optim.optimizer import Optimizer
from megallm.optim.residency import Residency
from megallm.optim.sgd import SGD


def make_optimizer(
    gradients: Gradients, residency: Residency, config: OptimConfig, *, backends: Backends = DEFAULT
) -> Optimizer:
    """AdamW, Muon or SGD, after check_optimizer_layout has passed; `momentum` is decided where it is auto."""
    config = replace(config, momentum=resolve_momentum(config))
    if config.optimizer == "muon":
        return Muon(gradients, residency, config, backends=backends)
    if config.optimizer == "sgd":
        return SGD(gradients, residency, config)
    return AdamW(gradients, residency, config, backends=backends)
