"""Pretraining, from flags to a trained model: read and check, build, resume, train, show what it learnt.

Everything the user can get wrong is found in `plan`, before any rank talks to another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megallm.config.model import ModelConfig
from megallm.config.run import RunConfig
from megallm.data.loader import BatchLoader, ValidationLoader
from megallm.data.prepare import load_or_build
from megallm.data.tokenizer import Tokenizer
from megallm.generate.sampling import Sampling
from megallm.runtime.environment import LaunchInfo
from megallm.runtime.logging import Log
from megallm.trainers.engine import Engine
from megallm.trainers.evaluate import validation_metrics
from megallm.trainers.job import JobPlan, check_shape, plan_job, run_job
from megallm.trainers.losses import language_model_loss
from megallm.trainers.source import ModelSource, open_model

DEFAULT_MODEL = "tiny"


@dataclass(frozen=True, kw_only=True)
class PretrainPlan:
    """A run that has been checked, with its data."""

    job: JobPlan
    train_samples: Any
    valid_samples: Any


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
    config, device = source.config, device or torch.device("cpu")
    check_shape(run, config, world_size=world_size, device=device)
    data = load_or_build(run.data, cache_dir=cache_dir, tokenizer=source.tokenizer())
    config = shape_of(run, source, vocab_size=data.vocab_size)
    if data.vocab_size > config.vocab_size:
        raise ValueError(
            f"the data has token ids up to {data.vocab_size - 1}, but {run.model or DEFAULT_MODEL} has a vocabulary of "
            f"{config.vocab_size}: use the model's own tokenizer, or a tokenizer with at most {config.vocab_size} ids"
        )
    if data.tokenizer is not None and config.eos_token_id is None:
        config = config.replace(eos_token_id=data.tokenizer.eos_id)
    job = plan_job(
        run, source=source, config=config, tokenizer=data.tokenizer, world_size=world_size,
        local_world_size=local_world_size, device=device,
    )  # fmt: skip
    return PretrainPlan(
        job=job,
        train_samples=data.train_dataset(seq_length=run.train.seq_length, seed=run.train.seed),
        valid_samples=data.valid_dataset(seq_length=run.train.seq_length),
    )


def shape_of(run: RunConfig, source: ModelSource, *, vocab_size: int) -> ModelConfig:
    """The model's, on data of so many ids: the tiny model speaks the data's language."""
    if source.kind == "preset" and (run.model or DEFAULT_MODEL) == DEFAULT_MODEL:
        return source.config.replace(vocab_size=vocab_size)
    return source.config


def pretrain(plan: PretrainPlan, info: LaunchInfo, device: torch.device, *, sample_prompt: str = "") -> Engine:
    """Trains as planned; leaves checkpoints, metrics and a plot in the save directory. A collective of the job."""
    train = plan.job.run.train

    def loader(engine: Engine) -> BatchLoader:
        dp = engine.mesh.dp
        return BatchLoader(
            plan.train_samples, global_batch_size=train.global_batch_size, dp_rank=dp.rank, dp_size=dp.size,
            prefetch=True,
        )  # fmt: skip

    def validate(engine: Engine) -> Callable[[], dict[str, float]] | None:
        if plan.valid_samples is None:
            return None
        batches = ValidationLoader(
            plan.valid_samples, num_sequences=train.eval_sequences, batch_size=train.global_batch_size,
            dp_rank=engine.mesh.dp.rank, dp_size=engine.mesh.dp.size,
        )  # fmt: skip
        return lambda: validation_metrics(engine, batches, language_model_loss)

    engine = run_job(plan.job, info, device, loader=loader, loss_fn=language_model_loss, validate=validate)
    show_sample(engine, plan.job.tokenizer, sample_prompt, log=Log(info.rank))
    return engine


def show_sample(engine: Engine, tokenizer: Tokenizer | None, prompt: str, *, log: Log) -> None:
    """Prints what the model says after `prompt`, if there is one. A collective."""
    if tokenizer is None or not prompt:
        return
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    room = engine.config.max_position_embeddings - len(ids)
    if not ids or room < 1:
        return
    stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    sampling = Sampling(temperature=0.8, seed=engine.seed, stop_ids=stop)
    new = engine.generate([ids], max_new_tokens=min(120, room), sampling=sampling)[0]
    text = tokenizer.decode(ids + new)
    log.info("a sample from the trained model, decoded under the same layout, temperature 0.8:")
    log.info("\n".join("    " + line for line in text.splitlines()))
