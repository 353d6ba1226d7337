"""Rules on runs from text to a policy, before the first of them costs time: see check.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megallm.config.check import check_run
from megallm.config.check_finetune import before_epochs, check_dpo, check_examples, check_reward, check_sft
from megallm.config.check_rl import check_rl
from megallm.config.end_to_end import STAGES, EndToEndConfig
from megallm.config.finetune import DpoConfig, RewardConfig, SftConfig
from megallm.config.model import ModelConfig
from megallm.config.rules import positive


def check_end_to_end(config: EndToEndConfig, model: ModelConfig, world_size: int) -> None:
    """ValueError for the first broken rule of any stage, which it names. Looks at no file. `config` is wired."""
    for name in STAGES:
        with of_part(name):
            _check_stage(config, name, model, world_size)
    options = config.evaluation
    positive(options, "num_prompts", "num_pairs", "num_shown", "max_new_tokens", "decode_batch")
    if options.max_new_tokens >= config.ppo.train.seq_length:
        raise ValueError(
            f"evaluation: max_new_tokens ({options.max_new_tokens}) leaves no room for a prompt in ppo's seq_length "
            f"({config.ppo.train.seq_length}): use fewer"
        )


@contextmanager
def of_part(name: str) -> Iterator[None]:
    """Puts the name of the part before what is said to be wrong."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _check_stage(config: EndToEndConfig, name: str, model: ModelConfig, world_size: int) -> None:
    run = config.stage(name)
    check_run(before_epochs(run), model, world_size)
    if isinstance(run, SftConfig | RewardConfig | DpoConfig):
        check_examples(run.data)
    if name == "sft":
        check_sft(config.sft.sft)
    elif name == "reward":
        check_reward(config.reward.reward)
    elif name == "dpo":
        check_dpo(config.dpo.dpo)
    elif name == "ppo":
        check_rl(config.ppo)
