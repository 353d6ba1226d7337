"""What examples/sft.py, reward.py and dpo.py do: read the flags, find a model to start from, check, train."""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import replace
from typing import Literal

from megallm.config.finetune import DpoConfig, RewardConfig, SftConfig
from megallm.config.flags import parse_run_config
from megallm.runtime.environment import launch_info, user_cache_dir
from megallm.runtime.launch import device_for, usage_errors
from megallm.runtime.logging import Log


def run_example(
    trainer: Literal["sft", "reward", "dpo"], defaults: SftConfig | RewardConfig | DpoConfig, *, description: str
) -> int:
    """The exit code of a program that trains as the command line says; `trainer` is a module of megallm.trainers."""
    with usage_errors():
        run, args = parse_run_config(defaults=defaults, description=description, extra=add_arguments)
        info = launch_info()
        device = device_for(info.local_rank)
        # After the flags: a mistyped one is answered at once.
        from megallm.trainers import finetune
        from megallm.trainers.job import check_outputs
        from megallm.trainers.pretrain import show_sample

        module = importlib.import_module(f"megallm.trainers.{trainer}")
        if args.show_masks:  # a look at the data alone
            run = replace(run, checkpoint=replace(run.checkpoint, save=None, load=None))
        check_outputs(run)  # before a model to start from is trained
    run = finetune.with_base_model(run, info, device, cache_dir=user_cache_dir())
    with usage_errors():
        plan = module.plan(run, world_size=info.world_size, local_world_size=info.local_world_size, device=device)
    if args.show_masks:
        if info.rank == 0:
            print(finetune.show(plan, args.show_masks, colour=sys.stdout.isatty()))
        return 0
    engine = module.train(plan, info, device)
    if engine.config.head == "lm":
        show_sample(engine, plan.job.tokenizer, args.sample_prompt, log=Log(info.rank))
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of these examples alone."""
    parser.add_argument(
        "--show-masks", type=int, default=0, metavar="N", help="print N examples with what is trained in them, and stop"
    )
    parser.add_argument(
        "--sample-prompt", default="", help="continued by the trained model at the end, if it is a language model"
    )
