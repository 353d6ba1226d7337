"""What every `auto` means, as pure functions: the resolved config is what is printed and stored.

An `auto` that depends on files (which tokenizer, which checkpoint) is decided by whoever opens them; it is not here.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TypeVar

from megallm.config.optim import OptimConfig
from megallm.config.parallel import ParallelConfig
from megallm.config.run import JobConfig

Run = TypeVar("Run", bound=JobConfig)


def resolve_parallel(parallel: ParallelConfig) -> ParallelConfig:
    """`parallel` with `sequence_parallel` and `schedule` decided.

    `pipeline_partition` stays auto: balancing it needs the model.
    """
    sequence_parallel, schedule = parallel.sequence_parallel, parallel.schedule
    if sequence_parallel is None:
        sequence_parallel = parallel.tp > 1
    if schedule is None:
        schedule = "interleaved" if parallel.virtual_stages > 1 else "1f1b"
    return dataclasses.replace(parallel, sequence_parallel=sequence_parallel, schedule=schedule)


def resolve_optim(optim: OptimConfig, *, total_steps: int) -> OptimConfig:
    """`optim` with `min_learning_rate`, `decay_steps` and `momentum` decided for `total_steps` optimizer steps.

    The constant schedule has no decay_steps, and AdamW no momentum.
    """
    min_learning_rate, decay_steps = optim.min_learning_rate, optim.decay_steps
    if min_learning_rate is None:
        min_learning_rate = optim.learning_rate / 10.0
    if decay_steps is None and optim.lr_schedule != "constant":
        after_warmup = max(1, total_steps - optim.warmup_steps)
        decay_steps = min(max(1, total_steps // 10), after_warmup) if optim.lr_schedule == "wsd" else after_warmup
    return dataclasses.replace(
        optim, min_learning_rate=min_learning_rate, decay_steps=decay_steps, momentum=resolve_momentum(optim)
    )


def resolve_momentum(optim: OptimConfig) -> float | None:
    """`momentum`, decided; None where there is none."""
    if optim.momentum is not None:
        return optim.momentum
    return {"sgd": 0.9, "muon": 0.95}.get(optim.optimizer)


def resolve_run(run: Run) -> Run:
    """`run` with every `auto` decided that needs neither the model nor the file system."""
    checkpoint, train = run.checkpoint, run.train
    if train.metrics_file is None and checkpoint.save is not None:
        train = dataclasses.replace(train, metrics_file=os.path.join(checkpoint.save, "metrics.jsonl"))
    optim = resolve_optim(run.optim, total_steps=train.steps)
    return dataclasses.replace(run, parallel=resolve_parallel(run.parallel), optim=optim, train=train)
