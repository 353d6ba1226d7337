"""One run: the sections that the flags of an example fill. What trainers have in common, and pretraining's."""

from __future__ import annotations

from dataclasses import dataclass, field

from megallm.config.checkpoint import CheckpointConfig
from megallm.config.data import DataConfig
from megallm.config.numerics import NumericsConfig
from megallm.config.optim import OptimConfig
from megallm.config.parallel import ParallelConfig
from megallm.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What the command line of every trainer can say; each adds sections of its own."""

    model: str | None = None
    """A preset's name, or a Hugging Face model directory, whose weights are then loaded. auto = the embedded
    default."""
    from_scratch: bool = False
    """Take only the shape of the directory given as `model`, with new weights."""
    backend: tuple[str, ...] = ()
    """`operation=back end` items that force one, such as attention=triton rms_norm=torch; the others take the fastest
    measured on the GPU at hand. `megallm doctor` lists them."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model is laid over ranks."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    numerics: NumericsConfig = field(default_factory=NumericsConfig)
    """Precision."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Where the run is saved."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(JobConfig):
    """Pretraining."""

    data: DataConfig = field(default_factory=DataConfig)
    """What is trained on."""
