"""Proximal policy optimisation: advantages of every token from a critic that learns beside the policy.

(Schulman et al., arXiv 1707.06347; of language models: Ziegler et al., arXiv 1909.08593; Ouyang et al., 2203.02155)
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from megallm.checkpoint import sharded
from megallm.checkpoint.sharded import TrainState
from megallm.config.parallel import ParallelConfig
from megallm.config.rl import PpoConfig
from megallm.parallel.mesh import Mesh
from megallm.runtime.environment import LaunchInfo
from megallm.trainers.engine import Engine
from megallm.trainers.experience import is_answer, own_rows, token_values
from megallm.trainers.iteration import Metrics, Timer, Updates
from megallm.trainers.losses import Batch
from megallm.trainers.policy_losses import ValueLoss
from megallm.trainers.rewards import RewardSpec
from megallm.trainers.rl_setup import RlPlan, other_mesh, plan_rl, train_rl
from megallm.trainers.rollout_maths import explained_variance, gae, token_rewards, whiten
from megallm.trainers.rollouts import Answerer, Answers
from megallm.trainers.scores import read_calibration
from megallm.trainers.source import ModelSource, open_model

CRITIC = "critic"
"""Folder of its checkpoints, in the run's."""


def plan(run: PpoConfig, *, world_size: int, device: torch.device, local_world_size: int = 1) -> RlPlan:
    """The checked run. ValueError or FileNotFoundError, in one message, for everything a user can get wrong."""
    found = plan_rl(
        run, embedded="prompts", critic=lambda rewards: critic_source(rewards, run), world_size=world_size,
        device=device, local_world_size=local_world_size,
    )  # fmt: skip
    resume = found.job.resume_from
    if resume is not None and not (resume.parent / CRITIC / resume.name / "state.json").is_file():
        raise FileNotFoundError(
            f"{resume} has no critic beside it ({resume.parent / CRITIC / resume.name}): it is not a checkpoint of "
            "PPO; give another --save, or name it as --model to begin from its weights"
        )
    return found


def train(plan: RlPlan, info: LaunchInfo, device: torch.device) -> Engine:
    """Trains as planned; leaves checkpoints, metrics, samples and plots. A collective of the job."""
    run = plan.job.run
    assert isinstance(run, PpoConfig)

    def advantages(engine: Engine, state: TrainState) -> Critic:
        mesh = other_mesh(engine, run.meshes.critic_tp, run.meshes.critic_pp)
        source = critic_source(plan.rewards, run)
        critic = critic_engine(run, source, mesh)
        resume = plan.job.resume_from
        if resume is not None:
            if engine.mesh.world.is_first and run.checkpoint.load is None:  # never in another run's directory
                _forget_after(resume)
            critic.load(str(resume.parent / CRITIC / resume.name))
            critic.step = int(state.extra["critic_updates"])
        offset = 0.0 if source.path is None or source.new_head else read_calibration(source.path).mean
        offset = state.extra.get("critic_offset", offset)  # of what the critic began as, whatever is named now
        return Critic(engine=critic, run=run, offset=offset)

    return train_rl(plan, info, device, advantages=advantages)


def _forget_after(resume: Path) -> None:
    """Removes critics of steps that the policy has not reached: they would count among those that are kept."""
    for each in (resume.parent / CRITIC).glob("step-*"):
        if each.name > resume.name:
            shutil.rmtree(each, ignore_errors=True)


def critic_source(rewards: Sequence[RewardSpec], run: PpoConfig) -> ModelSource:
    """What the critic starts from."""
    models = [spec.path for spec in rewards if spec.kind == "model"]
    name = run.ppo.critic or (str(models[0]) if models else None)
    return open_model(name or str(run.model), head="scalar")


def critic_engine(run: PpoConfig, source: ModelSource, mesh: Mesh) -> Engine:
    """The critic on its mesh, its weights loaded. A collective."""
    parallel = run.parallel
    if (mesh.tp.size, mesh.pp.size) != (parallel.tp, parallel.pp):
        parallel = replace(
            ParallelConfig(tp=mesh.tp.size, pp=mesh.pp.size), zero=parallel.zero, offload=parallel.offload,
            bucket_size=parallel.bucket_size,
        )  # fmt: skip
    rate = run.ppo.critic_learning_rate or run.optim.learning_rate
    engine = Engine(
        source.config.replace(hidden_dropout=0.0, attention_dropout=0.0), mesh, parallel=parallel,
        optim=replace(run.optim, learning_rate=rate), micro_batch_size=run.train.micro_batch_size,
        precision=run.numerics, recompute=run.train.recompute, seed=run.train.seed, lora=run.lora,
    )  # fmt: skip
    source.load_weights(engine)
    return engine


@dataclass
class Critic:
    """Advantages of tokens by GAE, from values that are trained. See rl.Advantages."""

    engine: Engine
    run: PpoConfig
    offset: float = 0.0
    """Taken off its values: the mean score of good answers, which calibrated rewards lack as well."""
    updates: Updates = field(default_factory=Updates)

    @property
    def policy_waits(self) -> int:
        """See rl.Advantages."""
        return self.run.ppo.critic_warmup

    def collect(
        self, answerer: Answerer, consumed: int, num_prompts: int, timer: Timer
    ) -> tuple[Answers, int, Metrics]:
        """See rl.Advantages."""
        with timer.phase("rollout"):
            chosen, found = answerer.sample(consumed, num_prompts)
        with timer.phase("score"):
            return answerer.answers(chosen, found), num_prompts, {}

    def add_to(self, rows: Batch, scores: torch.Tensor, groups: torch.Tensor, cost: torch.Tensor) -> Metrics:
        """Adds `old_values`, `returns` and `advantages` [N, S]. See rl.Advantages."""
        options, mask = self.run.ppo, is_answer(rows)
        at_once = self.run.train.micro_batch_size * self.run.train.seq_length
        values = token_values(self.engine, rows, tokens_at_once=at_once) - self.offset * mask
        rewards = token_rewards(scores.to(values.dtype), cost, mask, kl_coefficient=1.0)
        if options.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, values, mask, gamma=options.gamma, lam=options.lam)
        metrics = {"explained_variance": explained_variance(values, returns, mask)}
        if options.whiten_advantages:
            advantages = whiten(advantages, mask)
        rows |= {"advantages": advantages, "returns": returns, "old_values": values}
        return metrics

    def train(self, minibatch: Batch, learning_rate: float) -> None:
        """See rl.Advantages."""
        loss = ValueLoss(clip=self.run.ppo.value_clip or None)
        rate = learning_rate * self.engine.optim.learning_rate / self.run.optim.learning_rate
        batch = own_rows(minibatch, self.engine.mesh)
        mask = is_answer(batch)
        for name in ("returns", "old_values"):  # as the model has them
            batch[name] = batch[name] + self.offset * mask
        self.updates.add(self.engine.train_step(batch, loss, learning_rate=rate, count_fn=loss.count))

    def take_updates(self) -> Updates:
        """See rl.Advantages."""
        found, self.updates = self.updates, Updates()
        return found

    def save(self, directory: Path, state: TrainState, *, keep: int) -> dict[str, float]:
        """See rl.Advantages. One more than the policy's are kept: a stop between the two leaves a pair."""
        sharded.save(
            directory / CRITIC, self.engine.model, self.engine.optimizer, state, flat=self.engine.flat,
            keep=keep + 1 if keep else 0,
        )  # fmt: skip
        return {"critic_updates": float(self.engine.step), "critic_offset": self.offset}
