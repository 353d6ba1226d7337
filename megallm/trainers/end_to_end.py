"""From text to a policy in one job of ranks: pretraining, SFT, a reward model, PPO, DPO, and what they have learned.

    runs/pipeline/base  ->  sft  ->  reward  ->  ppo         each directory is what the trainer of that name leaves
                             \\->  dpo
    runs/pipeline/evaluation.json                            of all of them, on held-out prompts

A stage that is finished is not run again; one that was interrupted goes on from its last checkpoint, if what it began
with is still wanted (end_to_end_records.py).
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megallm.checkpoint import sharded
from megallm.config.check_end_to_end import check_end_to_end, of_part
from megallm.config.end_to_end import STAGES, EndToEndConfig, learned_from, wired
from megallm.config.run import RunConfig
from megallm.config.serialize import to_plain
from megallm.monitor.console import format_duration
from megallm.parallel.mesh import start_process_group
from megallm.runtime.environment import LaunchInfo
from megallm.runtime.launch import usage_errors
from megallm.runtime.lock import sole_writer
from megallm.runtime.logging import Log
from megallm.runtime.machine import machine_words
from megallm.trainers import dpo, ppo, pretrain, reward, sft
from megallm.trainers.end_to_end_checks import check_inputs
from megallm.trainers.end_to_end_eval import evaluate
from megallm.trainers.end_to_end_records import RECORD, Finished, begin, check_begun, finished, write_json
from megallm.trainers.source import open_model

EVALUATION = "evaluation.json"
TITLES = {
    "base": "pretraining", "sft": "supervised fine-tuning", "reward": "reward model", "ppo": "PPO", "dpo": "DPO",
    "evaluation": "evaluation",
}  # fmt: skip
NUM_STAGES = len(TITLES)

Cost = Callable[[str], float]
"""Of a stage, in any unit: what the time of the next one is expected from."""


def check(config: EndToEndConfig, root: str, *, world_size: int, device: torch.device) -> None:
    """ValueError or FileNotFoundError for what can be told before any stage runs. `config` is not wired."""
    with of_part("base"):
        source = open_model(config.base.model or pretrain.DEFAULT_MODEL, from_scratch=config.base.from_scratch)
    check_end_to_end(wired(config, root), source.config, world_size)
    check_begun(config, root)
    check_inputs(config, root, world_size=world_size, device=device)


def run_stages(config: EndToEndConfig, root: str, info: LaunchInfo, device: torch.device, *, cache_dir: Path) -> None:
    """Every stage that is not finished, in order; then the evaluation. A collective of the job."""
    with sole_writer(root if info.rank == 0 else None):  # of the records too, which stand beside its checkpoints
        start_process_group(rank=info.rank, world_size=info.world_size, device=device)
        _run_stages(config, root, info, device, cache_dir)


def is_evaluated(config: EndToEndConfig, root: str) -> bool:
    """Whether the evaluation of these stages is there, and not older than one of them."""
    file = Path(root) / EVALUATION
    if not file.is_file():
        return False
    written = file.stat().st_mtime
    if any((Path(root) / name / RECORD).stat().st_mtime > written for name in STAGES):
        return False
    found = json.loads(file.read_text(encoding="utf-8"))
    return bool(found.get("of") == _evaluated(config))


def _evaluated(config: EndToEndConfig) -> dict[str, Any]:
    return to_plain(config.evaluation)


def _run_stages(
    config: EndToEndConfig, root: str, info: LaunchInfo, device: torch.device, cache_dir: Path
) -> None:
    whole, log, clock = wired(config, root), Log(info.rank), _Clock()
    for number, name in enumerate(STAGES, start=1):
        done = finished(root, name)
        title = f"==== stage {number} of {NUM_STAGES}: {TITLES[name]} | elapsed {clock.elapsed()}"
        if done is not None:
            log.info(f"{title} | finished before in {format_duration(done.seconds)}, skipped ({Path(root) / name})")
            clock.add(name, done.seconds if not done.resumed_from else None, whole)
            continue
        log.info(f"{title} | {clock.expected(name, whole)}")
        began, step = time.monotonic(), _step_of(Path(root) / name)
        if info.rank == 0:
            begin(config, root, name)
        _train(name, whole, info, device, cache_dir)
        gc.collect()  # engines hold one another
        seconds = time.monotonic() - began
        clock.add(name, seconds if not step else None, whole)
        if info.rank == 0:
            record = Finished(
                name=name, seconds=seconds, resumed_from=step, learned_from=learned_from(config, name),
                settings=to_plain(whole.stage(name)),
            )  # fmt: skip
            write_json(Path(root) / name / RECORD, vars(record))
    title = f"==== stage {NUM_STAGES} of {NUM_STAGES}: {TITLES['evaluation']} | elapsed {clock.elapsed()}"
    if is_evaluated(config, root):
        log.info(f"{title} | done before, skipped ({Path(root) / EVALUATION})")
        return
    log.info(title)
    began = time.monotonic()
    found = evaluate(whole, info, device)
    found |= {"seconds": time.monotonic() - began, "of": _evaluated(config)}
    found |= {"machine": machine_words(num_ranks=info.world_size)}
    if info.rank == 0:
        write_json(Path(root) / EVALUATION, found)
    log.info(f"==== all {NUM_STAGES} stages | elapsed {clock.elapsed()}")


def _train(name: str, config: EndToEndConfig, info: LaunchInfo, device: torch.device, cache_dir: Path) -> None:
    """What the example program of the stage does."""
    run = config.stage(name)
    where: dict[str, Any] = {"world_size": info.world_size, "local_world_size": info.local_world_size, "device": device}
    if isinstance(run, RunConfig):
        with usage_errors():
            plan = pretrain.plan(run, cache_dir=cache_dir, **where)
        pretrain.pretrain(plan, info, device)
        return
    trainer: Any = {"sft": sft, "reward": reward, "ppo": ppo, "dpo": dpo}[name]
    with usage_errors():
        checked = trainer.plan(run, **where)
    trainer.train(checked, info, device)


class _Clock:
    """What has gone by, and what is to come: a stage takes as long as its tokens cost beside those of the others."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._seconds, self._cost = 0.0, 0.0

    def elapsed(self) -> str:
        return format_duration(time.monotonic() - self._begin)

    def add(self, name: str, seconds: float | None, config: EndToEndConfig) -> None:
        if seconds is not None:
            self._seconds += seconds
            self._cost += cost(name, config)

    def expected(self, name: str, config: EndToEndConfig) -> str:
        if not self._cost:
            return "expected: the log says"
        seconds = self._seconds / self._cost * cost(name, config)
        return f"expected about {format_duration(seconds)}"


def cost(name: str, config: EndToEndConfig) -> float:
    """Tokens that a stage passes through a model, forward as 1 and backward as 2, if every sequence is full."""
    train = config.stage(name).train
    step = float(train.global_batch_size * train.seq_length)
    if name == "ppo":
        answers = config.ppo.num_answers * train.seq_length
        step = answers * (5.0 + 6.0 * config.ppo.policy.update_epochs)
    else:
        step *= {"base": 3.0, "sft": 3.0, "reward": 6.0, "dpo": 8.0}[name]
    return train.steps * step


def _step_of(directory: Path) -> int:
    """Where an interrupted stage goes on."""
    checkpoint = sharded.latest(directory)
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
