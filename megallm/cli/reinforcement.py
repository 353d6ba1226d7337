"""What examples/ppo.py and grpo.py do: read the flags, find models to start from, check, train."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megallm.config.checkpoint import CheckpointConfig
from megallm.config.finetune import ExamplesConfig, RewardConfig, SftConfig
from megallm.config.flags import parse_run_config
from megallm.config.optim import OptimConfig
from megallm.config.rl import GrpoConfig, PpoConfig
from megallm.config.rules import round_up
from megallm.config.train import TrainConfig
from megallm.runtime.environment import LaunchInfo, launch_info, user_cache_dir
from megallm.runtime.launch import device_for, usage_errors
from megallm.runtime.logging import Log

if TYPE_CHECKING:
    import torch

ARITHMETIC, REWARD, BASE_REWARD = Path("runs/base_arithmetic"), Path("runs/reward"), Path("runs/base_reward")
"""What is trained here where nothing is named: a model that writes answers, most of them wrong; a reward model."""


def run_example(trainer: Literal["ppo", "grpo"], defaults: PpoConfig | GrpoConfig, *, description: str) -> int:
    """The exit code of a program that trains as the command line says; `trainer` is a module of megallm.trainers."""
    with usage_errors():
        run, _ = parse_run_config(defaults=defaults, description=description)
        info = launch_info()
        device = device_for(info.local_rank)
        module = importlib.import_module(f"megallm.trainers.{trainer}")  # after the flags, which fail at once
        from megallm.trainers.job import check_outputs

        check_outputs(run)  # before a model to start from is trained
    if isinstance(run, PpoConfig):
        run = _with_reward(run, info, device)
    else:
        run = _with_task(run, info, device)
    with usage_errors():
        plan = module.plan(run, world_size=info.world_size, local_world_size=info.local_world_size, device=device)
    module.train(plan, info, device)
    return 0


def _with_reward(run: PpoConfig, info: LaunchInfo, device: torch.device) -> PpoConfig:
    """`run` with a model and a reward: where none is named, the model of `make demo`, and a reward model of the
    embedded preferences. A collective of the job where one is trained first."""
    from megallm.checkpoint import sharded
    from megallm.trainers import finetune, reward

    run = finetune.with_base_model(run, info, device, cache_dir=user_cache_dir())
    if run.rewards.reward:
        return run
    found = next((path for path in (REWARD, BASE_REWARD) if sharded.latest(path) is not None), None)
    if found is None:
        found = BASE_REWARD
        Log(info.rank).info(f"no reward is named, and {REWARD} is not there: one is trained into {BASE_REWARD} first")
        size = round_up(8, 2 * info.world_size)
        train = TrainConfig(steps=60, micro_batch_size=2, global_batch_size=size, seq_length=256)
        small = RewardConfig(
            model=run.model, train=train, optim=OptimConfig(learning_rate=1e-4, warmup_steps=5, weight_decay=0.0),
            checkpoint=CheckpointConfig(save=str(BASE_REWARD)),
        )  # fmt: skip
        with usage_errors():
            plan = reward.plan(
                small, world_size=info.world_size, local_world_size=info.local_world_size, device=device
            )
        reward.train(plan, info, device)
    return replace(run, rewards=replace(run.rewards, reward=(str(found),)))


def _with_task(run: GrpoConfig, info: LaunchInfo, device: torch.device) -> GrpoConfig:
    """`run` with a model, a task and a reward: where none is named, one-digit sums and a model that gets most of them
    wrong. A collective of the job where that is trained first."""
    if not run.data.data:
        data = replace(run.data, template=run.data.template or "text")
        rewards = replace(run.rewards, reward=run.rewards.reward or ("exact_answer",))
        run = replace(run, data=data, rewards=rewards)
    if run.model is not None:
        return run
    from megallm.checkpoint import sharded
    from megallm.data.arithmetic import arithmetic_examples
    from megallm.trainers import finetune, sft

    if sharded.latest(ARITHMETIC) is None:
        Log(info.rank).info(f"no model is named: one that gets most sums wrong is trained into {ARITHMETIC} first")
        size = round_up(64, 16 * info.world_size)  # long enough to know sums, which most examples miss by a little
        train = TrainConfig(steps=200, micro_batch_size=16, global_batch_size=size, seq_length=32)
        examples = ARITHMETIC / "examples.jsonl"
        if info.rank == 0:
            examples.parent.mkdir(parents=True, exist_ok=True)
            examples.write_text("".join(json.dumps(record) + "\n" for record in arithmetic_examples()), "utf-8")
        warm = SftConfig(
            train=train, optim=OptimConfig(learning_rate=1e-3, warmup_steps=5, weight_decay=0.0),
            checkpoint=CheckpointConfig(save=str(ARITHMETIC)),
            data=ExamplesConfig(data=(str(examples),), template="text"),
        )  # fmt: skip
        warm = finetune.with_base_model(warm, info, device, cache_dir=user_cache_dir())
        with usage_errors():
            plan = sft.plan(warm, world_size=info.world_size, local_world_size=info.local_world_size, device=device)
        sft.train(plan, info, device)
    return replace(run, model=str(ARITHMETIC))
