"""The loop of a run: steps, log lines, validation, checkpoints. The same for every trainer.

What a step is, a Program knows: an optimizer step on a batch (`Supervised`), or a rollout with its updates (rl.py).
Where a run stands is (step, consumed samples, tokens); the data of a step follows from the consumed samples, so a run
that stops and resumes trains on exactly what it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from megallm.checkpoint import sharded
from megallm.checkpoint.sharded import TrainState
from megallm.config.hardware import find_gpu
from megallm.config.run import JobConfig
from megallm.model.counts import model_flops_per_token
from megallm.monitor.console import Console
from megallm.monitor.metrics import MetricsWriter
from megallm.monitor.throughput import Throughput, memory_gib
from megallm.optim.clip import GradientNorm
from megallm.optim.lr_schedule import learning_rate_at
from megallm.runtime.failure import RunStopped
from megallm.trainers.bad_steps import BadSteps
from megallm.trainers.engine import Engine
from megallm.trainers.losses import Batch, LossFunction, count_labels
from megallm.trainers.memory import MemoryReport
from megallm.trainers.step import StepResult


class Loader(Protocol):
    """Gives the batch that follows so many consumed samples."""

    def batch(self, consumed_samples: int) -> Batch:
        """This dp rank's part of the batch."""
        ...

    def close(self) -> None:
        """Ends what it runs in the background."""
        ...


class Result(Protocol):
    """What a step leaves behind."""

    @property
    def grad_norm(self) -> GradientNorm:
        """Before clipping; asked where it came from if it is not finite."""
        ...

    def metrics(self) -> dict[str, float]:
        """`loss`, `grad_norm`, `count`, `tokens` (of this step) and the trainer's own. A collective, and waits."""
        ...


Validate = Callable[[], dict[str, float]]
"""The metrics of a validation. A collective."""


class Program(Protocol):
    """What a run does in a step, how it is validated, and what its checkpoints hold beside the model."""

    @property
    def validate(self) -> Validate | None:
        """What the metrics file has as `valid_NAME`; None = there is none."""
        ...

    def step(self, state: TrainState, learning_rate: float) -> tuple[Result, int]:
        """One step from where the run stands: (its numbers, samples it consumed). A collective."""
        ...

    def save(self, directory: Path, state: TrainState, *, keep: int) -> TrainState:
        """Called before the model is saved in `directory`; `state` with what it is to hold. A collective."""
        ...


class Supervised:
    """An optimizer step a step, on batches from a loader."""

    def __init__(
        self,
        engine: Engine,
        loader: Loader,
        loss_fn: LossFunction,
        *,
        samples_per_step: int,
        count_fn: Callable[[Batch], torch.Tensor] = count_labels,
        memory: MemoryReport | None = None,
        validate: Validate | None = None,
    ) -> None:
        self._engine, self._loader, self._loss_fn, self._count_fn = engine, loader, loss_fn, count_fn
        self._samples_per_step, self._memory = samples_per_step, memory
        self.validate = validate
        """See Program."""

    def step(self, state: TrainState, learning_rate: float) -> tuple[StepResult, int]:
        """See Program."""
        batch = self._loader.batch(state.consumed_samples)
        with nullcontext() if self._memory is None else self._memory.step():
            result = self._engine.train_step(
                batch, self._loss_fn, learning_rate=learning_rate, count_fn=self._count_fn
            )
        return result, self._samples_per_step

    def save(self, directory: Path, state: TrainState, *, keep: int) -> TrainState:
        """See Program."""
        return state


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where a run's results go; nothing on ranks other than 0, nothing without a save directory."""

    metrics: Path | None
    checkpoints: Path | None
    settings: dict[str, Any]
    """The resolved run, stored in every checkpoint."""


def train_loop(
    engine: Engine,
    run: JobConfig,
    program: Program,
    *,
    state: TrainState,
    outputs: Outputs,
) -> TrainState:
    """Trains from `state` to `run.train.steps`; returns where it ended. A collective.

    A step that cannot be done (RunStopped, on all ranks alike) leaves a checkpoint of the steps before it.
    """
    loop = _Loop(engine, run, program, state, outputs)
    for step in range(state.step, run.train.steps):
        learning_rate = learning_rate_at(step, config=run.optim, total_steps=run.train.steps)
        try:
            result, consumed = program.step(loop.state, learning_rate)
        except RunStopped:
            loop.keep()
            raise
        loop.after_step(result, learning_rate, consumed)
    loop.close()
    return loop.state


class _Loop:
    """What happens between steps."""

    def __init__(
        self,
        engine: Engine,
        run: JobConfig,
        program: Program,
        state: TrainState,
        outputs: Outputs,
    ) -> None:
        self._program = program
        self._engine, self._run, self._validate, self._outputs = engine, run, program.validate, outputs
        self.state = state
        self._saved_step = state.step
        self._pending: list[tuple[int, float, Result]] = []
        is_writer = engine.mesh.world.rank == 0
        self._writer = None
        if is_writer and outputs.metrics is not None:
            self._writer = MetricsWriter(outputs.metrics, resume_step=state.step)
        self._console = None
        if is_writer:
            self._console = Console(total_steps=run.train.steps, log_every=run.train.log_every, min_interval_s=0.5)
        self._throughput = _throughput(engine, run)
        self._bad_steps = BadSteps(most_in_a_row=run.numerics.max_bad_steps)

    def after_step(self, result: Result, learning_rate: float, consumed: int) -> None:
        """Counts the step; logs, validates and saves when due."""
        train = self._run.train
        consumed += self.state.consumed_samples
        self.state = replace(self.state, step=self.state.step + 1, consumed_samples=consumed)
        step = self.state.step
        self._pending.append((step, learning_rate, result))
        is_last = step == train.steps
        is_eval = self._validate is not None and (is_last or (train.eval_every and step % train.eval_every == 0))
        is_save = bool(self._run.checkpoint.save_every) and step % self._run.checkpoint.save_every == 0
        if is_last or is_eval or is_save or step % train.log_every == 0:
            self._flush(with_validation=bool(is_eval))
        if (is_last or is_save) and self._outputs.checkpoints is not None:
            self._save()

    def keep(self) -> None:
        """Writes what is known, and a checkpoint."""
        if self._pending:
            self._flush(with_validation=False)
        if self._outputs.checkpoints is not None:
            self._save()
        self.close()

    def close(self) -> None:
        """Ends the metrics file."""
        if self._writer is not None:
            self._writer.close()

    def _flush(self, *, with_validation: bool) -> None:
        """Reads the pending steps' numbers off the device: the only host sync of the loop."""
        lines: list[dict[str, Any]] = []
        seen = 0
        for step, learning_rate, result in self._pending:
            values = result.metrics()
            seen += int(values.pop("tokens"))
            notice = self._bad_steps.look(step, result.grad_norm, values)
            if notice and self._console is not None:
                self._console.notice(notice)
            lines.append(
                {"step": step, **values, "learning_rate": learning_rate, "tokens": self.state.tokens + seen}
            )
        self.state = replace(self.state, tokens=self.state.tokens + seen)
        lap = self._throughput.lap(tokens=seen, steps=len(lines))
        memory = memory_gib(self._engine.mesh.device)
        eta = self._throughput.eta_s(self._run.train.steps - self.state.step)
        valid = self._validate() if with_validation and self._validate is not None else None
        self._throughput.start()
        self._pending = []
        for line in lines:
            line |= {"step_time_s": lap.step_time_s, "tokens_per_s": lap.tokens_per_s, "mfu": lap.mfu}
            line |= {"memory_gib": memory, "bad_steps": self._bad_steps.total}
            if valid is not None and line["step"] == self.state.step:
                line |= {f"valid_{name}": value for name, value in valid.items()}
            if self._writer is not None:
                self._writer.write(line)
            if self._console is not None:
                self._console.step(line, eta_s=eta)
        self._bad_steps.check(self.state.step)
        if valid is not None and self._console is not None:
            self._console.validation(self.state.step, valid)

    def _save(self) -> None:
        if self.state.step == self._saved_step:
            return
        assert self._outputs.checkpoints is not None
        keep = self._run.checkpoint.keep
        self.state = self._program.save(self._outputs.checkpoints, self.state, keep=keep)
        sharded.save(
            self._outputs.checkpoints,
            self._engine.model,
            self._engine.optimizer,
            self.state,
            flat=self._engine.flat,
            run_config=self._outputs.settings,
            keep=keep,
        )
        self._saved_step = self.state.step
        self._throughput.start()


def _throughput(engine: Engine, run: JobConfig) -> Throughput:
    mesh = engine.mesh
    gpu = find_gpu(torch.cuda.get_device_name(mesh.device)) if mesh.device.type == "cuda" else None
    return Throughput(
        flops_per_token=model_flops_per_token(engine.config, seq_length=run.train.seq_length),
        peak_flops=None if gpu is None else gpu.peak_flops("tf32" if run.numerics.tf32 else run.numerics.precision),
        num_devices=mesh.world.size,
    )
