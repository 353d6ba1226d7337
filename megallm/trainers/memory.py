"""A run's memory: predicted from its configuration, refused if the host has too little, measured in one step.

    plan = plan_memory(run, config, world_size=8, device=device, backends=backends)
    report = MemoryReport(engine, plan, announce=print)
    for step in ...:
        with report.step():
            engine.train_step(...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megallm.config.check import data_parallel_size, num_microbatches
from megallm.config.lora import LoraConfig
from megallm.config.model import ModelConfig
from megallm.config.run import JobConfig
from megallm.model.fused import fused_choices
from megallm.monitor.memory import MemoryWatch, largest
from megallm.monitor.memory_table import format_memory_table
from megallm.ops.backends import Backends
from megallm.planner.host import check_host_memory
from megallm.planner.memory import MemoryPlan, predict_memory
from megallm.runtime.host_memory import available_host_memory
from megallm.trainers.engine import DTYPES, Engine


def plan_memory(
    run: JobConfig,
    config: ModelConfig,
    *,
    world_size: int,
    device: torch.device,
    backends: Backends,
    rows_per_sample: int = 1,
    lora: LoraConfig | None = None,
) -> MemoryPlan:
    """What the ranks that need most will need, for a run that passed the checks."""
    dp = data_parallel_size(run.parallel, world_size)
    return predict_memory(
        config,
        run.parallel,
        dp=dp,
        micro_batch_size=run.train.micro_batch_size * rows_per_sample,
        seq_length=run.train.seq_length,
        num_microbatches=num_microbatches(run.train, dp),
        numerics=run.numerics,
        optimizer=run.optim.optimizer,
        recompute=run.train.recompute,
        device_type=device.type,
        fused=_fused(run, config, device, backends, lora),
        lora=lora,
    )


def check_offload(plan: MemoryPlan, *, local_world_size: int) -> None:
    """ValueError if this node's ranks together offload more than its memory still holds."""
    if plan.host.total:
        check_host_memory(plan.host.total, ranks_per_node=local_world_size, available_bytes=available_host_memory())


class MemoryReport:
    """Says once what was predicted and what is held: in the second step, when nothing is made for the first time."""

    def __init__(self, engine: Engine, plan: MemoryPlan, *, announce: Callable[[str], None]) -> None:
        """announce: is given the table, on every rank alike."""
        self._engine, self._plan, self._announce = engine, plan, announce
        self._num_steps = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """To be entered around every training step; a collective after the second."""
        self._num_steps += 1
        if self._num_steps != 2:
            yield
            return
        with watch_memory(self._engine) as watch:
            yield
        measured = largest(watch.result(), self._engine.mesh)
        self._announce(
            format_memory_table(self._plan, measured, capacity=device_capacity(self._engine.mesh.device))
        )


def watch_memory(engine: Engine) -> MemoryWatch:
    """To be entered around a training step; then `result()` is what this rank held."""
    assert engine.flat is not None and engine.gradients is not None and engine.optimizer is not None
    return MemoryWatch(engine.flat, engine.gradients, engine.optimizer)


def device_capacity(device: torch.device) -> int | None:
    """Bytes of the GPU; None for a CPU, whose memory is everybody's."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _fused(
    run: JobConfig, config: ModelConfig, device: torch.device, backends: Backends, lora: LoraConfig | None
) -> set[str]:
    """The operations that run on Triton."""
    choices = fused_choices(
        config, backends, tp=run.parallel.tp, device=device, dtype=DTYPES[run.numerics.precision],
        offload=run.parallel.offload != "none", lora=lora,
    )  # fmt: skip
    return {case.op for case, choice in choices if choice.name == "triton"}
