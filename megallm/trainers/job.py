"""What the programs that train have in common: a checked plan, ranks, an engine, the loop, and what is left behind.

A trainer brings its data, its loss and what it validates:

    plan = plan_job(run, source=..., config=..., tokenizer=..., ...)      everything a user can get wrong, no ranks yet
    engine = run_job(plan, info, device, loader=..., loss_fn=..., validate=...)

A trainer whose steps are more than a batch and a loss brings a program (loop.py): `run_program`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megallm.checkpoint import sharded
from megallm.checkpoint.adapters import check_adapters
from megallm.checkpoint.sharded import TrainState
from megallm.config.backends import parse_backends
from megallm.config.check import check_run
from megallm.config.check_lora import check_lora
from megallm.config.flags import format_config
from megallm.config.lora import LoraConfig
from megallm.config.model import ModelConfig
from megallm.config.resolve import resolve_run
from megallm.config.run import JobConfig
from megallm.config.serialize import to_plain
from megallm.data.tokenizer import Tokenizer
from megallm.model.counts import parameter_counts
from megallm.model.fp8 import check_fp8
from megallm.model.fused import check_backends, check_names
from megallm.monitor.memory_table import format_memory_table
from megallm.monitor.plots import drawing, plot_loss
from megallm.monitor.preference_plots import plot_preferences
from megallm.ops.backends import Backends
from megallm.ops.fp8 import fp8_recipe
from megallm.parallel.mesh import Mesh, start_process_group
from megallm.pipeline.partition import partition_layers
from megallm.planner.memory import MemoryPlan
from megallm.runtime.environment import LaunchInfo, launch_info
from megallm.runtime.lock import sole_writer
from megallm.runtime.logging import Log
from megallm.runtime.outputs import check_output_directory, check_output_file
from megallm.trainers.engine import DTYPES, Engine
from megallm.trainers.loop import Loader, Outputs, Program, Supervised, Validate, train_loop
from megallm.trainers.losses import Batch, LossFunction, count_labels
from megallm.trainers.memory import MemoryReport, check_offload, device_capacity, plan_memory
from megallm.trainers.source import ModelSource

_KEPT = (
    ("model",), ("data", "data"), ("train", "seed"), ("rewards", "reward"), ("ppo", "critic"),
    ("rollout", "rollout_batch_size"), ("rollout", "samples_per_prompt"), ("rollout", "temperature"),
)  # fmt: skip
"""Settings that a resumed run is expected to have as before; another one is told."""


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """A run that has been checked."""

    run: JobConfig
    """Resolved: no `auto` left."""
    source: ModelSource
    config: ModelConfig
    tokenizer: Tokenizer | None
    warnings: tuple[str, ...]
    memory: MemoryPlan
    """Of the ranks that need most."""
    resume_from: Path | None
    rows_per_sample: int = 1
    """Sequences of a sample: more than 1 where responses are compared."""
    notes: tuple[str, ...] = ()
    """Lines on the data, said at the start."""
    lora: LoraConfig | None = None
    """Adapters that train instead of the weights; None or rank 0 = none."""
    neftune_alpha: float = 0.0
    """Of the noise on the embeddings of training steps."""
    step_words: str = ""
    """What a step is, said at the start; empty = a batch."""


def check_outputs(run: JobConfig) -> None:
    """ValueError unless what the run leaves behind can be written: called before anything is trained or read."""
    if run.checkpoint.save is not None:
        check_output_directory(run.checkpoint.save)
    if run.train.metrics_file is not None and launch_info().rank == 0:  # which alone writes it
        check_output_file(run.train.metrics_file)


def check_shape(run: JobConfig, config: ModelConfig, *, world_size: int, device: torch.device) -> None:
    """ValueError for what is wrong whatever the data: called before minutes are spent on them."""
    check_outputs(run)
    check_run(run, config, world_size)
    partition_layers(config.num_hidden_layers, run.parallel.pp * run.parallel.virtual_stages)
    check_fp8(fp8_recipe(run.numerics), config, tp=run.parallel.tp, device=device)


def plan_job(
    run: JobConfig,
    *,
    source: ModelSource,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    world_size: int,
    local_world_size: int,
    device: torch.device,
    rows_per_sample: int = 1,
    notes: tuple[str, ...] = (),
    lora: LoraConfig | None = None,
) -> JobPlan:
    """The checked run of `config`, source's shape as the data made it. ValueError or FileNotFoundError, one message.

    local_world_size: ranks that share this node's memory. rows_per_sample, notes, lora: see JobPlan.
    """
    run = resolve_run(run)
    warnings, backends = check_job(run, config, lora=lora, world_size=world_size, device=device)
    memory = plan_memory(
        run, config, world_size=world_size, device=device, backends=backends, rows_per_sample=rows_per_sample, lora=lora
    )
    check_offload(memory, local_world_size=local_world_size)
    resume_from = _resume_from(run)
    if resume_from is not None and sharded.read_model_config(resume_from) != config:
        raise ValueError(
            f"{resume_from} holds a checkpoint of another model or tokenizer: give another --save, or the --model and "
            "--data it was made with"
        )
    if resume_from is not None:
        own = lora if lora is not None and lora.lora_rank else None
        check_adapters(resume_from, own, config, weights_only=False)
        warnings += _changed_since(resume_from, run)
    return JobPlan(
        run=run, source=source, config=config, tokenizer=tokenizer, warnings=tuple(warnings), memory=memory,
        resume_from=resume_from, rows_per_sample=rows_per_sample, notes=notes, lora=lora,
    )  # fmt: skip


def check_job(
    run: JobConfig, config: ModelConfig, *, lora: LoraConfig | None, world_size: int, device: torch.device
) -> tuple[list[str], Backends]:
    """Warnings, and the back ends that were chosen; ValueError for what is wrong whatever the data and the weights."""
    warnings = check_run(run, config, world_size)
    warnings += check_fp8(fp8_recipe(run.numerics), config, tp=run.parallel.tp, device=device)
    if lora is not None:
        check_lora(lora, config, run.optim, tp=run.parallel.tp, precision=run.numerics.precision)
    backends = Backends(parse_backends(run.backend), announce=lambda line: None)
    check_names(backends, config, lora=lora)
    check_backends(
        backends, config, tp=run.parallel.tp, device=device, dtype=DTYPES[run.numerics.precision],
        offload=run.parallel.offload != "none", lora=lora,
    )  # fmt: skip
    return warnings, backends


def run_job(
    plan: JobPlan,
    info: LaunchInfo,
    device: torch.device,
    *,
    loader: Callable[[Engine], Loader],
    loss_fn: LossFunction,
    validate: Callable[[Engine], Validate | None],
    count_fn: Callable[[Batch], torch.Tensor] = count_labels,
) -> Engine:
    """Trains as planned; leaves checkpoints, metrics and a plot in the save directory. A collective of the job.

    loader, validate: what gives batches, and the validation's metrics (None = there is none), on this rank's engine.
    """

    @contextmanager
    def program(engine: Engine, state: TrainState) -> Iterator[Supervised]:
        announce = Log(info.rank).info
        with closing(loader(engine)) as batches:
            yield Supervised(
                engine, batches, loss_fn, count_fn=count_fn, samples_per_step=plan.run.train.global_batch_size,
                memory=MemoryReport(engine, plan.memory, announce=announce), validate=validate(engine),
            )  # fmt: skip

    return run_program(plan, info, device, program=program)


def run_program(
    plan: JobPlan,
    info: LaunchInfo,
    device: torch.device,
    *,
    program: Callable[[Engine, TrainState], AbstractContextManager[Program]],
    draw: Callable[[Path, Log], None] | None = None,
) -> Engine:
    """Trains as planned by steps of `program`, which is made for the engine and where it resumes. A collective.

    draw: the pictures of the metrics in a file; None = those of losses and preferences.
    """
    run, log = plan.run, Log(info.rank)
    with sole_writer(run.checkpoint.save if info.rank == 0 else None):
        start_process_group(rank=info.rank, world_size=info.world_size, device=device)
        engine = _build(plan, device, log)
        _announce(plan, engine.mesh, log)
        state = _start(plan, engine, log)
        outputs = _outputs(run)
        with program(engine, state) as steps:
            train_loop(engine, run, steps, state=state, outputs=outputs)
        _conclude(plan, engine, log, outputs, draw or (lambda metrics, log: _plot(plan, metrics, log)))
    return engine


def _build(plan: JobPlan, device: torch.device, log: Log) -> Engine:
    run, parallel, train = plan.run, plan.run.parallel, plan.run.train
    mesh = Mesh.build(
        tp=parallel.tp, pp=parallel.pp, cp=parallel.cp, shard_size=parallel.zero_shard_size, device=device
    )
    return Engine(
        plan.config,
        mesh,
        parallel=parallel,
        optim=run.optim,
        micro_batch_size=train.micro_batch_size * plan.rows_per_sample,
        precision=run.numerics,
        recompute=train.recompute,
        seed=train.seed,
        neftune_alpha=plan.neftune_alpha,
        lora=plan.lora,
        backends=Backends(parse_backends(run.backend), announce=lambda line: log.info(f"kernel {line}")),
    )


def _start(plan: JobPlan, engine: Engine, log: Log) -> TrainState:
    state = TrainState(step=0, consumed_samples=0, tokens=0)
    if plan.resume_from is not None:
        state = engine.load(str(plan.resume_from))
        log.info(f"resumed from {plan.resume_from}: step {state.step}, {state.tokens:,} tokens")
    else:
        plan.source.load_weights(engine)
    steps = plan.run.train.steps
    if state.step >= steps:
        log.info(f"nothing left to train: {state.step} of {steps} steps are done (raise --steps to go on)")
    return state


def _resume_from(run: JobConfig) -> Path | None:
    if run.checkpoint.load is not None:
        found = sharded.latest(run.checkpoint.load)
        if found is None:
            raise FileNotFoundError(f"{run.checkpoint.load} holds no complete checkpoint to load")
        return found
    return None if run.checkpoint.save is None else sharded.latest(run.checkpoint.save)


def _changed_since(checkpoint: Path, run: JobConfig) -> list[str]:
    """Warnings, where a run goes on with another model to start from, other data, other rewards and the like."""
    before, now = sharded.read_run(checkpoint), to_plain(run)
    found = []
    for path in _KEPT if before else ():  # what a run began with
        was, value = (_at(settings, path) for settings in (before, now))
        if value != was:
            flag = "--" + path[-1].replace("_", "-")
            found.append(f"{checkpoint} was made with {flag} {_words(was)}, and goes on with {_words(value)}")
    return found


def _at(settings: Any, path: Sequence[str]) -> Any:
    """None where it is not set."""
    for name in path:
        settings = (settings or {}).get(name)
    return settings or None


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _outputs(run: JobConfig) -> Outputs:
    save, metrics = run.checkpoint.save, run.train.metrics_file
    root = None if save is None else Path(save)
    if metrics is not None:
        metrics_path: Path | None = Path(metrics)
    else:
        metrics_path = None if root is None else root / "metrics.jsonl"
    return Outputs(metrics=metrics_path, checkpoints=root, settings=to_plain(run))


def _announce(plan: JobPlan, mesh: Mesh, log: Log) -> None:
    run, config = plan.run, plan.config
    log.info(format_config(run))
    for warning in plan.warnings:
        log.warning(warning)
    count = parameter_counts(config).total
    log.info(
        f"{config.family} model, {count / 1e6:.1f}M parameters, {config.num_hidden_layers} layers, hidden "
        f"{config.hidden_size}, vocabulary {config.vocab_size}"
    )
    log.info(
        f"{mesh.world.size} ranks = tp {mesh.tp.size} x pp {mesh.pp.size} x dp {mesh.dp.size} on {mesh.device.type}; "
        f"one step = {plan.step_words or _step_words(plan)}"
    )
    for note in plan.notes:
        log.info(note)
    log.info(format_memory_table(plan.memory, capacity=device_capacity(mesh.device)))


def _step_words(plan: JobPlan) -> str:
    train, rows = plan.run.train, plan.rows_per_sample
    sample = "sequences of" if rows == 1 else f"groups of {rows} responses of up to"
    return f"{train.global_batch_size} {sample} {train.seq_length} tokens"


def _conclude(
    plan: JobPlan, engine: Engine, log: Log, outputs: Outputs, draw: Callable[[Path, Log], None]
) -> None:
    if engine.mesh.world.rank != 0 or outputs.metrics is None or not outputs.metrics.is_file():
        return
    if outputs.checkpoints is not None and plan.tokenizer is not None:
        plan.tokenizer.save(outputs.checkpoints)
    draw(outputs.metrics, log)
    log.info(f"metrics     {outputs.metrics}")
    if outputs.checkpoints is not None:
        log.info(f"checkpoint  {sharded.latest(outputs.checkpoints)}")


def _plot(plan: JobPlan, metrics: Path, log: Log) -> None:
    plot, preferences = metrics.with_name("loss.png"), metrics.with_name("preferences.png")
    title = f"{plan.config.family}, {plan.run.train.steps} steps"
    compares = plan.rows_per_sample > 1
    loss_name = "loss, mean over prompts" if compares else "loss (nats per token)"
    with drawing(log.warning):
        plot_loss(metrics, plot, title=title, loss_name=loss_name)
        log.info(f"loss plot   {plot}")
    if compares:
        with drawing(log.warning):
            plot_preferences(metrics, preferences, title=title)
            log.info(f"preferences {preferences}")
