"""Memory of a rank in the phases of reinforcement learning, by formula, before anything is built.

    rollout          all models' states, keys and values of the sequences decoded together
    score            all models' states, a forward without gradients
    update X         all models' states, forward and backward of X

States are weights, gradients and optimizer state; frozen models have weights alone, and none while they are away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megallm.config.model import ModelConfig
from megallm.config.parallel import ParallelConfig
from megallm.generate.scheduler import plan_cache
from megallm.planner.memory import MemoryPlan


@dataclass(frozen=True, kw_only=True)
class ModelMemory:
    """One of the models on a rank."""

    plan: MemoryPlan
    trains: bool
    is_away: bool = False
    """In the host's memory but while it scores."""

    @property
    def states(self) -> int:
        """Bytes on the device all the time, if it is not away."""
        device = self.plan.device
        parts = (device.parameters, device.gradients, device.optimizer) if self.trains else (device.parameters,)
        return sum(part or 0 for part in parts)

    @property
    def work(self) -> int:
        """Bytes of a training step on top."""
        return (self.plan.device.activations or 0) + (self.plan.device.buffers or 0)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Bytes of a phase on the device."""

    name: str
    models: dict[str, int]
    """States of each model."""
    work: int
    """What the phase itself needs, at most."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.models.values()) + self.work


def cache_bytes(
    model: ModelConfig, parallel: ParallelConfig, *, num_sequences: int, length: int, element_bytes: int
) -> int:
    """Keys and values of `num_sequences` sequences of `length` tokens on the rank with most layers; of a window's
    positions alone, where there is one."""
    layers = -(-model.num_hidden_layers // parallel.pp)
    heads = max(1, model.num_key_value_heads // parallel.tp)
    plan = plan_cache(
        length, num_sequences, max_batch=num_sequences, kv_cache_tokens=None, sliding_window=model.sliding_window
    )
    return 2 * layers * heads * model.head_dim * plan.num_slots * plan.num_cells * element_bytes


def plan_phases(models: Mapping[str, ModelMemory], *, cache: int, forward: int) -> list[Phase]:
    """The phases of the models by name, of which `policy` answers. cache: bytes of keys and values; forward: of a pass
    without gradients, of the model that needs most."""
    here = {name: 0 if model.is_away else model.states for name, model in models.items()}
    away = {name: model.states for name, model in models.items() if model.is_away}
    most = max(away.values(), default=0)
    phases = [
        Phase(name="rollout", models=here, work=cache),
        Phase(name="score", models=here, work=forward + most),
    ]
    return phases + [
        Phase(name=f"update {name}", models=here, work=model.work) for name, model in models.items() if model.trains
    ]


def largest_phase(phases: Sequence[Phase]) -> Phase:
    """The one that decides whether a run fits."""
    return max(phases, key=lambda phase: phase.total)
