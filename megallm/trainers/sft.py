"""Supervised fine-tuning: conversations to (packed) rows, cross-entropy on what the mask trains.

The loss of a step is the sum over its trained tokens, over all microbatches and ranks, divided by their number.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megallm.config.check_finetune import check_examples, check_sft
from megallm.config.finetune import SftConfig
from megallm.data.finetune import SftDataset
from megallm.data.finetune_data import sft_data
from megallm.runtime.environment import LaunchInfo
from megallm.trainers.engine import Engine
from megallm.trainers.finetune import FinetunePlan, batches, open_base, plan_finetune, validate_with
from megallm.trainers.job import run_job
from megallm.trainers.losses import language_model_loss


def plan(
    run: SftConfig, *, world_size: int, device: torch.device, local_world_size: int = 1
) -> FinetunePlan[SftDataset]:
    """The checked run. ValueError or FileNotFoundError, in one message, for everything a user can get wrong."""
    check_sft(run.sft)
    check_examples(run.data)
    base = open_base(run, world_size=world_size, device=device, head="lm")
    data = sft_data(
        run.data, run.sft, tokenizer=base.tokenizer, model=base.source.directory, seq_length=run.train.seq_length,
        seed=run.train.seed, multiple=base.multiple,
    )  # fmt: skip
    plan = plan_finetune(run, base, data, world_size=world_size, local_world_size=local_world_size, device=device)
    return replace(plan, job=replace(plan.job, neftune_alpha=run.sft.neftune_alpha))


def train(plan: FinetunePlan[SftDataset], info: LaunchInfo, device: torch.device) -> Engine:
    """Trains as planned; leaves checkpoints, metrics and a plot in the save directory. A collective of the job."""
    return run_job(
        plan.job, info, device, loader=lambda engine: batches(plan, engine), loss_fn=language_model_loss,
        validate=validate_with(plan, language_model_loss),
    )  # fmt: skip
