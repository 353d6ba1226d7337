"""Everything that talks between ranks, and the front door for downstream trainers.

    from megallm.parallel import Engine, Mesh, get_preset, language_model_loss, start_process_group

The names below live where they belong; they are looked up when first used, so that importing a low layer through this
package does not import the layers above it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megallm.config.lora import LoraConfig
    from megallm.config.model import ModelConfig
    from megallm.config.optim import OptimConfig
    from megallm.config.parallel import ParallelConfig
    from megallm.config.presets import get_preset
    from megallm.generate.rollout import Limits, Rollout
    from megallm.generate.sampling import Sampling
    from megallm.ops.backends import Backends
    from megallm.parallel.logprobs import IGNORE_INDEX, VocabLogits
    from megallm.parallel.mesh import Axis, Mesh, start_process_group, stop_process_group
    from megallm.parallel.recorder import Recorder
    from megallm.trainers.engine import Engine
    from megallm.trainers.losses import count_labels, language_model_loss
    from megallm.trainers.source import open_model
    from megallm.trainers.step import StepResult

_HOME = {
    "Axis": "megallm.parallel.mesh",
    "Backends": "megallm.ops.backends",
    "Engine": "megallm.trainers.engine",
    "IGNORE_INDEX": "megallm.parallel.logprobs",
    "LoraConfig": "megallm.config.lora",
    "Limits": "megallm.generate.rollout",
    "Mesh": "megallm.parallel.mesh",
    "ModelConfig": "megallm.config.model",
    "OptimConfig": "megallm.config.optim",
    "ParallelConfig": "megallm.config.parallel",
    "Recorder": "megallm.parallel.recorder",
    "Rollout": "megallm.generate.rollout",
    "Sampling": "megallm.generate.sampling",
    "StepResult": "megallm.trainers.step",
    "VocabLogits": "megallm.parallel.logprobs",
    "count_labels": "megallm.trainers.losses",
    "get_preset": "megallm.config.presets",
    "language_model_loss": "megallm.trainers.losses",
    "open_model": "megallm.trainers.source",
    "start_process_group": "megallm.parallel.mesh",
    "stop_process_group": "megallm.parallel.mesh",
}

__all__ = [
    "IGNORE_INDEX",
    "Axis",
    "Backends",
    "Engine",
    "Limits",
    "LoraConfig",
    "Mesh",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "Recorder",
    "Rollout",
    "Sampling",
    "StepResult",
    "VocabLogits",
    "count_labels",
    "get_preset",
    "language_model_loss",
    "open_model",
    "start_process_group",
    "stop_process_group",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
