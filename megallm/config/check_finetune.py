"""Rules on the runs of fine-tuning: see check.py."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from megallm.config.finetune import (
    DpoConfig,
    DpoOptions,
    ExamplesConfig,
    RewardConfig,
    RewardOptions,
    SftConfig,
    SftOptions,
)
from megallm.config.rules import not_negative, positive
from megallm.config.run import JobConfig

Job = TypeVar("Job", bound=JobConfig)


def check_examples(data: ExamplesConfig) -> None:
    """ValueError unless shares and passes are in range."""
    if not 0.0 <= data.valid_fraction < 1.0:
        raise ValueError(f"valid_fraction ({data.valid_fraction}) must be at least 0 and below 1")
    if data.epochs is not None:
        positive(data, "epochs")


def check_sft(sft: SftOptions) -> None:
    """ValueError unless the noise is a magnitude."""
    not_negative(sft, "neftune_alpha")


def check_reward(reward: RewardOptions) -> None:
    """ValueError unless the coefficient is one."""
    not_negative(reward, "centering")


def check_dpo(dpo: DpoOptions) -> None:
    """ValueError unless the loss is what its constants say."""
    positive(dpo, "beta")
    if not 0.0 <= dpo.label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing ({dpo.label_smoothing}) must be at least 0 and below 0.5, where preferences say nothing"
        )
    if dpo.label_smoothing and dpo.dpo_loss != "sigmoid":
        raise ValueError(f"label_smoothing ({dpo.label_smoothing}) with dpo_loss {dpo.dpo_loss}: use sigmoid, or 0")
    if dpo.ipo_sums and dpo.dpo_loss != "ipo":
        raise ValueError(f"ipo_sums with dpo_loss {dpo.dpo_loss}: leave it out, or use ipo")


def before_epochs(run: Job) -> Job:
    """`run` for the rules that hold whatever the data: where `epochs` are to decide `steps`, as many as its learning
    rate needs."""
    if not isinstance(run, SftConfig | RewardConfig | DpoConfig) or run.data.epochs is None:
        return run
    needed = run.optim.warmup_steps + (run.optim.decay_steps or 0) + 1
    return replace(run, train=replace(run.train, steps=max(run.train.steps, needed)))
