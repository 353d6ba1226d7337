"""Rules on the runs of fine-tuning: see check.py."""

from __future__ import annotations

from megallm.config.finetune import DpoOptions, ExamplesConfig, RewardOptions, SftOptions
from megallm.config.rules import not_negative, positive


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
