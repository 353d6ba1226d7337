"""Reward models: a scalar head, read at the last token of each response, trained on which response is better."""

from __future__ import annotations

from pathlib import Path

import torch

from megallm.checkpoint import sharded
from megallm.config.check_finetune import check_reward
from megallm.config.finetune import RewardConfig
from megallm.data.finetune import PairDataset
from megallm.monitor.plots import drawing
from megallm.monitor.preference_plots import calibration_error, plot_calibration
from megallm.runtime.environment import LaunchInfo
from megallm.runtime.logging import Log
from megallm.trainers.engine import Engine
from megallm.trainers.finetune import FinetunePlan, batches, plan_comparisons, validate_with
from megallm.trainers.job import run_job
from megallm.trainers.preference_losses import RewardLoss, count_prompts
from megallm.trainers.scores import calibrate, score_responses, write_calibration

_CALIBRATED_ON = 256
"""Prompts whose best response is scored."""
_JUDGED_ON = 1000
"""Held-out prompts whose responses are compared at the end."""


def plan(
    run: RewardConfig, *, world_size: int, device: torch.device, local_world_size: int = 1
) -> FinetunePlan[PairDataset]:
    """The checked run. ValueError or FileNotFoundError, in one message, for everything a user can get wrong."""
    check_reward(run.reward)
    return plan_comparisons(
        run, head="scalar", only_pairs=False, world_size=world_size, local_world_size=local_world_size, device=device
    )


def train(plan: FinetunePlan[PairDataset], info: LaunchInfo, device: torch.device) -> Engine:
    """Trains as planned; leaves checkpoints, metrics and a plot in the save directory. A collective of the job."""
    run = plan.job.run
    assert isinstance(run, RewardConfig)
    loss_fn = RewardLoss(centering=run.reward.centering)
    engine = run_job(
        plan.job, info, device, loader=lambda engine: batches(plan, engine), loss_fn=loss_fn,
        validate=validate_with(plan, loss_fn), count_fn=count_prompts,
    )  # fmt: skip
    if run.reward.calibrate and run.checkpoint.save is not None:
        _calibrate(plan, engine, run.checkpoint.save, Log(info.rank))
    if plan.data.valid is not None and run.checkpoint.save is not None:
        _draw_calibration(plan.data.valid, engine, Path(run.checkpoint.save) / "calibration.png", Log(info.rank))
    return engine


def _calibrate(plan: FinetunePlan[PairDataset], engine: Engine, directory: str, log: Log) -> None:
    """Measures the scores of the best responses to some of the training prompts, for whoever scores with the model."""
    best = plan.data.train.best_responses(_CALIBRATED_ON)
    found = calibrate(engine, best)
    checkpoint = sharded.latest(directory)
    if engine.mesh.world.rank == 0 and checkpoint is not None:
        write_calibration(checkpoint, found)
    log.info(f"calibration {found.responses} good responses score {found.mean:.4f} on average, std {found.std:.4f}")


def _draw_calibration(valid: PairDataset, engine: Engine, picture: Path, log: Log) -> None:
    """Shows how far differences of scores can be believed, on held-out pairs."""
    groups = valid.responses(_JUDGED_ON)
    scores = iter(score_responses(engine, [ids for responses, _ in groups for ids in responses]))
    differences = []
    for _, ranks in groups:
        scored = [(next(scores), rank) for rank in ranks]
        differences += [better - worse for better, i in scored for worse, j in scored if i < j]
    accuracy = sum(each > 0 for each in differences) / len(differences)
    error = calibration_error(differences)
    log.info(f"held out    {len(differences)} pairs: {accuracy:.1%} in the right order, calibration error {error:.3f}")
    if engine.mesh.world.rank == 0:
        with drawing(log.warning):
            plot_calibration(differences, picture, title=f"{len(differences)} held-out pairs")
            log.info(f"calibration {picture}")
