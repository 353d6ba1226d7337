"""What supervised fine-tuning, reward models and DPO have in common: a model that exists, records, and their plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import torch

from megallm.checkpoint import sharded
from megallm.checkpoint.adapters import read_lora_config
from megallm.config.check_finetune import before_epochs, check_examples
from megallm.config.checkpoint import CheckpointConfig
from megallm.config.data import DataConfig
from megallm.config.finetune import DpoConfig, RewardConfig, SftConfig
from megallm.config.lora import LoraConfig
from megallm.config.model import ModelConfig
from megallm.config.optim import OptimConfig
from megallm.config.rl import RlConfig
from megallm.config.rules import round_up
from megallm.config.run import RunConfig
from megallm.config.train import TrainConfig
from megallm.data.finetune import PairDataset
from megallm.data.finetune_data import Dataset, FinetuneData, comparison_data
from megallm.data.loader import BatchLoader, ValidationLoader
from megallm.data.show import show_masks
from megallm.data.tokenizer import Tokenizer
from megallm.runtime.environment import LaunchInfo
from megallm.runtime.logging import Log
from megallm.trainers import pretrain
from megallm.trainers.engine import Engine
from megallm.trainers.evaluate import validation_metrics
from megallm.trainers.job import JobPlan, check_shape, plan_job
from megallm.trainers.losses import LossFunction
from megallm.trainers.source import Head, ModelSource, open_model

DEMO, BASE = Path("runs/demo"), Path("runs/base")
"""What `make demo` leaves; what is trained here where that is not there."""
_ROUND_TO = 8
"""Rows are as long as their batch's longest, rounded up to this (times tp)."""

FinetuneConfig = SftConfig | RewardConfig | DpoConfig
Run = TypeVar("Run", bound=FinetuneConfig | RlConfig)


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model to start from."""

    source: ModelSource
    config: ModelConfig
    tokenizer: Tokenizer
    multiple: int
    """What row lengths are rounded to."""


@dataclass(frozen=True, kw_only=True)
class FinetunePlan(Generic[Dataset]):
    """A run that has been checked, with its data."""

    job: JobPlan
    data: FinetuneData[Dataset]


def with_base_model(run: Run, info: LaunchInfo, device: torch.device, *, cache_dir: Path) -> Run:
    """`run` with a model to start from: where none is named, that of `make demo`, else a tiny one trained first.

    A collective of the job in the last case.
    """
    if run.model is not None:
        return run
    found = next((path for path in (DEMO, BASE) if sharded.latest(path) is not None), None)
    if found is None:
        found = BASE
        Log(info.rank).info(f"no model is named, and {DEMO} is not there: a tiny one is trained into {BASE} first")
        tiny = RunConfig(
            train=TrainConfig(
                steps=140, micro_batch_size=2, global_batch_size=round_up(16, 2 * info.world_size),
                seq_length=128,
            ),
            optim=OptimConfig(learning_rate=2e-3, warmup_steps=5),
            data=DataConfig(tokenizer_vocab_size=2048),
            checkpoint=CheckpointConfig(save=str(BASE)),
        )
        plan = pretrain.plan(tiny, world_size=info.world_size, cache_dir=cache_dir, device=device)
        pretrain.pretrain(plan, info, device)
    return replace(run, model=str(found))


def open_base(
    run: FinetuneConfig | RlConfig, *, world_size: int, device: torch.device, head: Head, drop: bool = True
) -> Base:
    """The model that `run` starts from, its shape checked. ValueError or FileNotFoundError.

    drop: whether the model's dropout stays; losses that compare two passes want none.
    """
    assert run.model is not None, "with_base_model comes first"
    source = open_model(run.model, from_scratch=run.from_scratch, head=head)
    source.check_weights()
    config = source.config if drop else source.config.replace(hidden_dropout=0.0, attention_dropout=0.0)
    check_shape(before_epochs(run), config, world_size=world_size, device=device)
    if source.kind == "checkpoint" and source.path is not None:
        check_quantized_once(run.lora, read_lora_config(source.path), source.path)
    tokenizer = tokenizer_of(run, own=source.tokenizer(), vocab_size=config.vocab_size)
    return Base(source=source, config=config, tokenizer=tokenizer, multiple=_ROUND_TO * run.parallel.tp)


def tokenizer_of(run: FinetuneConfig | RlConfig, *, own: Tokenizer | None, vocab_size: int) -> Tokenizer:
    """The tokenizer of `run`, whose model has `own` and a vocabulary of this size. ValueError or FileNotFoundError."""
    tokenizer = own if run.data.tokenizer is None else Tokenizer.from_path(run.data.tokenizer)
    if tokenizer is None:
        raise ValueError(f"{run.model} has no tokenizer.json beside it: give one with --tokenizer")
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but {run.model} has a vocabulary of "
            f"{vocab_size}: use the tokenizer that the model was trained with"
        )
    if own is not None and (moved := own.moved(tokenizer)):
        raise ValueError(
            f"--tokenizer {run.data.tokenizer} is another than that of {run.model}: {moved!r} has id "
            f"{tokenizer.token_to_id(moved)} instead of {own.token_to_id(moved)}; leave the flag out, or extend the "
            "model's own"
        )
    return tokenizer


def plan_finetune(
    run: FinetuneConfig,
    base: Base,
    data: FinetuneData[Dataset],
    *,
    world_size: int,
    local_world_size: int,
    device: torch.device,
) -> FinetunePlan[Dataset]:
    """The checked run on its data; `steps` follow from `epochs` where these are given."""
    if run.data.epochs is not None:
        wanted = run.data.epochs * data.train.num_samples
        if run.train.global_batch_size > max(wanted, 1):
            raise ValueError(
                f"global_batch_size ({run.train.global_batch_size}) is more than the {wanted:g} samples of "
                f"{run.data.epochs:g} epochs: use at most {max(int(wanted), 1)}, or more epochs"
            )
        steps = math.ceil(run.data.epochs * data.train.num_samples / run.train.global_batch_size)
        run = replace(run, train=replace(run.train, steps=steps))
    passes = run.train.steps * run.train.global_batch_size / data.train.num_samples
    note = f"{data.train.num_samples:,} samples: {run.train.steps:,} steps are {passes:.2f} passes over them"
    job = plan_job(
        run, source=base.source, config=base.config, tokenizer=base.tokenizer, world_size=world_size,
        local_world_size=local_world_size, device=device, rows_per_sample=data.train.rows_per_sample,
        notes=(*data.notes, note), lora=run.lora,
    )  # fmt: skip
    return FinetunePlan(job=job, data=data)


def show(plan: FinetunePlan[Dataset], number: int, *, colour: bool) -> str:
    """The first examples with what is trained in them made visible."""
    assert plan.job.tokenizer is not None
    return "\n".join([*plan.job.notes, show_masks(plan.data.examples, plan.job.tokenizer, number, colour=colour)])


def check_quantized_once(lora: LoraConfig, saved: LoraConfig | None, where: str | Path) -> None:
    """ValueError where weights in 4 bits would take adapters up and be quantised a second time. `saved`: of the model
    to start from."""
    if lora.is_nf4 and saved is not None and saved.is_nf4:
        raise ValueError(
            f"{where} has adapters beside weights in 4 bits; with lora_base nf4 their sum would be quantised "
            "again and lose what the adapters learned: use lora_base model, or go on in the same --save"
        )


def plan_comparisons(
    run: RewardConfig | DpoConfig,
    *,
    head: Head,
    only_pairs: bool,
    world_size: int,
    local_world_size: int,
    device: torch.device,
) -> FinetunePlan[PairDataset]:
    """The checked run of a trainer that compares responses, without dropout; `only_pairs`: rankings are refused."""
    check_examples(run.data)
    base = open_base(run, world_size=world_size, device=device, head=head, drop=False)
    data = comparison_data(
        run.data, tokenizer=base.tokenizer, model=base.source.directory, seq_length=run.train.seq_length,
        seed=run.train.seed, multiple=base.multiple, only_pairs=only_pairs,
        outputs="ends" if head == "scalar" else "responses",
    )  # fmt: skip
    return plan_finetune(run, base, data, world_size=world_size, local_world_size=local_world_size, device=device)


def batches(plan: FinetunePlan[Dataset], engine: Engine) -> BatchLoader:
    """This rank's training batches."""
    dp = engine.mesh.dp
    return BatchLoader(
        plan.data.train, global_batch_size=plan.job.run.train.global_batch_size, dp_rank=dp.rank, dp_size=dp.size,
        prefetch=True,
    )  # fmt: skip


def valid_batches(plan: FinetunePlan[Dataset], engine: Engine) -> ValidationLoader | None:
    """This rank's validation batches; None if there is no validation data."""
    train, dp = plan.job.run.train, engine.mesh.dp
    if plan.data.valid is None:
        return None
    return ValidationLoader(
        plan.data.valid, num_sequences=train.eval_sequences, batch_size=train.global_batch_size, dp_rank=dp.rank,
        dp_size=dp.size,
    )  # fmt: skip


def validate_with(
    plan: FinetunePlan[Dataset], loss_fn: LossFunction
) -> Callable[[Engine], Callable[[], dict[str, float]] | None]:
    """What `run_job` takes: the loss function's mean and metrics on the validation data."""

    def validate(engine: Engine) -> Callable[[], dict[str, float]] | None:
        loader = valid_batches(plan, engine)
        return None if loader is None else lambda: validation_metrics(engine, loader, loss_fn)

    return validate
