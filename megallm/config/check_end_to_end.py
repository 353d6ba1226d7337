"""Rules on runs from text to a policy, before the first of them costs time: see check.py."""

from __future__ import annotations

from pathlib import Path

from megallm.config.check import check_run
from megallm.config.check_finetune import before_epochs, check_dpo, check_examples, check_reward, check_sft
from megallm.config.check_rl import check_rl
from megallm.config.end_to_end import STAGES, EndToEndConfig
from megallm.config.finetune import DpoConfig, RewardConfig, SftConfig
from megallm.config.model import ModelConfig
from megallm.config.rules import positive


def check_end_to_end(config: EndToEndConfig, model: ModelConfig, world_size: int) -> None:
    """ValueError or FileNotFoundError for the first broken rule of any stage, which it names. `config` is wired."""
    for name in STAGES:
        try:
            _check_stage(config, name, model, world_size)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{name}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    options = config.evaluation
    positive(options, "num_prompts", "num_pairs", "num_shown", "max_new_tokens", "decode_batch")
    if options.max_new_tokens >= config.ppo.train.seq_length:
        raise ValueError(
            f"evaluation: max_new_tokens ({options.max_new_tokens}) leaves no room for a prompt in ppo's seq_length "
            f"({config.ppo.train.seq_length}): use fewer"
        )
    _check_files(options.prompts)


def _check_stage(config: EndToEndConfig, name: str, model: ModelConfig, world_size: int) -> None:
    run = config.stage(name)
    check_run(before_epochs(run), model, world_size)
    if isinstance(run, SftConfig | RewardConfig | DpoConfig):
        check_examples(run.data)
        _check_files((*run.data.data, *run.data.valid_data))
    if name == "sft":
        check_sft(config.sft.sft)
    elif name == "reward":
        check_reward(config.reward.reward)
    elif name == "dpo":
        check_dpo(config.dpo.dpo)
    elif name == "ppo":
        check_rl(config.ppo)
        _check_files((*config.ppo.data.data, *config.ppo.policy.ptx_data))


def _check_files(paths: tuple[str, ...]) -> None:
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such file; name one that is there")
