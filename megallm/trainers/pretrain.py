"""Pretraining, from flags to a trained model: read and check, build, resume, train, show what it learnt.

Everything the user can get wrong is found in `plan`, before any rank talks to another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megallm.checkpoint import sharded
from megallm.checkpoint.sharded import TrainState
from megallm.config.backends import parse_backends
from megallm.config.check import check_run
from megallm.config.flags import format_config
from megallm.config.model import ModelConfig
from megallm.config.resolve import resolve_run
from megallm.config.run import RunConfig
from megallm.config.serialize import to_plain
from megallm.data.loader import BatchLoader, ValidationLoader
from megallm.data.prepare import PreparedData, load_or_build
from megallm.generate.sampling import Sampling
from megallm.model.counts import parameter_counts
from megallm.model.fp8 import check_fp8
from megallm.model.fused import check_backends, check_names
from megallm.monitor.memory_table import format_memory_table
from megallm.monitor.plots import plot_loss
from megallm.ops.backends import Backends
from megallm.ops.fp8 import fp8_recipe
from megallm.parallel.mesh import Mesh, start_process_group
from megallm.pipeline.partition import partition_layers
from megallm.planner.memory import MemoryPlan
from megallm.runtime.environment import LaunchInfo
from megallm.runtime.logging import Log
from megallm.trainers.engine import DTYPES, Engine
from megallm.trainers.evaluate import validation_loss
from megallm.trainers.loop import Outputs, train_loop
from megallm.trainers.losses import language_model_loss
from megallm.trainers.memory import MemoryReport, check_offload, device_capacity, plan_memory
from megallm.trainers.source import ModelSource, open_model

DEFAULT_MODEL = "tiny"


@dataclass(frozen=True, kw_only=True)
class PretrainPlan:
    """A run that has been checked."""

    run: RunConfig
    """Resolved: no `auto` left."""
    source: ModelSource
    config: ModelConfig
    data: PreparedData
    train_samples: Any
    valid_samples: Any
    warnings: tuple[str, ...]
    memory: MemoryPlan
    """Of the rank that needs most."""
    resume_from: Path | None


def plan(
    run: RunConfig,
    *,
    world_size: int,
    cache_dir: Path,
    device: torch.device | None = None,
    local_world_size: int = 1,
) -> PretrainPlan:
    """The checked run. ValueError or FileNotFoundError, in one message, for everything a user can get wrong.

    local_world_size: ranks that share this node's memory.
    """
    source = open_model(run.model or DEFAULT_MODEL, from_scratch=run.from_scratch)
    config = source.config
    check_run(run, config, world_size)  # before minutes are spent on data
    partition_layers(config.num_hidden_layers, run.parallel.pp * run.parallel.virtual_stages)
    device = device or torch.device("cpu")
    fp8_warnings = check_fp8(fp8_recipe(run.numerics), config, tp=run.parallel.tp, device=device)
    data = load_or_build(run.data, cache_dir=cache_dir, tokenizer=source.tokenizer())
    if source.kind == "preset" and (run.model or DEFAULT_MODEL) == DEFAULT_MODEL:
        config = config.replace(vocab_size=data.vocab_size)  # the tiny model speaks the data's language
    if data.vocab_size > config.vocab_size:
        raise ValueError(
            f"the data has token ids up to {data.vocab_size - 1}, but {run.model or DEFAULT_MODEL} has a vocabulary of "
            f"{config.vocab_size}: use the model's own tokenizer, or a tokenizer with at most {config.vocab_size} ids"
        )
    if data.tokenizer is not None and config.eos_token_id is None:
        config = config.replace(eos_token_id=data.tokenizer.eos_id)
    run = resolve_run(run)
    warnings = check_run(run, config, world_size) + fp8_warnings
    backends = Backends(parse_backends(run.backend), announce=lambda line: None)
    check_names(backends, config)
    check_backends(
        backends, config, tp=run.parallel.tp, device=device, dtype=DTYPES[run.numerics.precision],
        offload=run.parallel.offload != "none",
    )  # fmt: skip
    memory = plan_memory(run, config, world_size=world_size, device=device, backends=backends)
    check_offload(memory, local_world_size=local_world_size)
    train_samples = data.train_dataset(seq_length=run.train.seq_length, seed=run.train.seed)
    valid_samples = data.valid_dataset(seq_length=run.train.seq_length)
    resume_from = _resume_from(run)
    if resume_from is not None and sharded.read_model_config(resume_from) != config:
        raise ValueError(
            f"{resume_from} holds a checkpoint of another model or tokenizer: give another --save, or the --model and "
            "--data it was made with"
        )
    return PretrainPlan(
        run=run,
        source=source,
        config=config,
        data=data,
        train_samples=train_samples,
        valid_samples=valid_samples,
        warnings=tuple(warnings),
        memory=memory,
        resume_from=resume_from,
    )


def pretrain(plan: PretrainPlan, info: LaunchInfo, device: torch.device, *, sample_prompt: str = "") -> Engine:
    """Trains as planned; leaves checkpoints, metrics and a plot in the save directory. A collective of the job."""
    run, log = plan.run, Log(info.rank)
    start_process_group(rank=info.rank, world_size=info.world_size, device=device)
    parallel, train = run.parallel, run.train
    mesh = Mesh.build(
        tp=parallel.tp, pp=parallel.pp, cp=parallel.cp, shard_size=parallel.zero_shard_size, device=device
    )
    engine = Engine(
        plan.config,
        mesh,
        parallel=parallel,
        optim=run.optim,
        micro_batch_size=train.micro_batch_size,
        precision=run.numerics,
        recompute=train.recompute,
        seed=train.seed,
        backends=Backends(parse_backends(run.backend), announce=lambda line: log.info(f"kernel {line}")),
    )
    _announce(plan, mesh, log)
    state = TrainState(step=0, consumed_samples=0, tokens=0)
    if plan.resume_from is not None:
        state = engine.load(str(plan.resume_from))
        log.info(f"resumed from {plan.resume_from}: step {state.step}, {state.tokens:,} tokens")
    else:
        plan.source.load_weights(engine)
    if state.step >= train.steps:
        log.info(f"nothing left to train: {state.step} of {train.steps} steps are done (raise --steps to go on)")
    outputs = _outputs(plan)
    state = _train(plan, engine, state, outputs, log)
    _conclude(plan, engine, log, outputs)
    _show_sample(plan, engine, log, sample_prompt)
    return engine


def _train(plan: PretrainPlan, engine: Engine, state: TrainState, outputs: Outputs, log: Log) -> TrainState:
    train, dp = plan.run.train, engine.mesh.dp
    loader = BatchLoader(
        plan.train_samples, global_batch_size=train.global_batch_size, dp_rank=dp.rank, dp_size=dp.size, prefetch=True
    )
    validate = None
    if plan.valid_samples is not None:
        batches = ValidationLoader(
            plan.valid_samples,
            num_sequences=train.eval_sequences,
            batch_size=train.global_batch_size,
            dp_rank=dp.rank,
            dp_size=dp.size,
        )

        def validate() -> float:
            return validation_loss(engine, batches)

    try:
        return train_loop(
            engine, plan.run, loader, language_model_loss, validate=validate, state=state, outputs=outputs,
            memory=MemoryReport(engine, plan.memory, announce=log.info),
        )  # fmt: skip
    finally:
        loader.close()


def _resume_from(run: RunConfig) -> Path | None:
    if run.checkpoint.load is not None:
        found = sharded.latest(run.checkpoint.load)
        if found is None:
            raise FileNotFoundError(f"{run.checkpoint.load} holds no complete checkpoint to load")
        return found
    return None if run.checkpoint.save is None else sharded.latest(run.checkpoint.save)


def _outputs(plan: PretrainPlan) -> Outputs:
    save, metrics = plan.run.checkpoint.save, plan.run.train.metrics_file
    root = None if save is None else Path(save)
    if metrics is not None:
        metrics_path: Path | None = Path(metrics)
    else:
        metrics_path = None if root is None else root / "metrics.jsonl"
    return Outputs(metrics=metrics_path, checkpoints=root, settings=to_plain(plan.run))


def _announce(plan: PretrainPlan, mesh: Mesh, log: Log) -> None:
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
        f"one step = {run.train.global_batch_size} sequences of {run.train.seq_length} tokens"
    )
    log.info(format_memory_table(plan.memory, capacity=device_capacity(mesh.device)))


def _conclude(plan: PretrainPlan, engine: Engine, log: Log, outputs: Outputs) -> None:
    if engine.mesh.world.rank != 0 or outputs.metrics is None or not outputs.metrics.is_file():
        return
    plot = outputs.metrics.with_name("loss.png")
    plot_loss(outputs.metrics, plot, title=f"{plan.config.family}, {plan.run.train.steps} steps")
    if outputs.checkpoints is not None and plan.data.tokenizer is not None:
        plan.data.tokenizer.save(outputs.checkpoints)
    log.info(f"loss plot   {plot}")
    log.info(f"metrics     {outputs.metrics}")
    if outputs.checkpoints is not None:
        log.info(f"checkpoint  {sharded.latest(outputs.checkpoints)}")


def _show_sample(plan: PretrainPlan, engine: Engine, log: Log, prompt: str) -> None:
    tokenizer = plan.data.tokenizer
    if tokenizer is None or not prompt:
        return
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    room = plan.config.max_position_embeddings - len(ids)
    if not ids or room < 1:
        return
    stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    sampling = Sampling(temperature=0.8, seed=plan.run.train.seed, stop_ids=stop)
    new = engine.generate([ids], max_new_tokens=min(120, room), sampling=sampling)[0]
    text = tokenizer.decode(ids + new)
    log.info("a sample from the trained model, decoded under the same layout, temperature 0.8:")
    log.info("\n".join("    " + line for line in text.splitlines()))
