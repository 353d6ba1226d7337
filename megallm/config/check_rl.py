"""Rules on the runs of reinforcement learning: see check.py."""

from __future__ import annotations

import math

from megallm.config.rl import GrpoConfig, MeshOptions, PolicyOptions, PpoConfig, RewardsConfig, RlConfig, RolloutOptions
from megallm.config.rules import nearest_multiples, not_negative, positive


def check_rl(run: RlConfig) -> None:
    """ValueError for the first broken rule of what PPO and GRPO have in common, and of their own."""
    _check_rollout(run.rollout, seq_length=run.train.seq_length)
    _check_minibatches(run)
    if run.train.eval_every and run.data.data and not run.data.valid_data:
        raise ValueError(f"eval_every ({run.train.eval_every}) needs prompts that are held out: give valid_data")
    _check_rewards(run.rewards, run.rollout)
    _check_policy(run.policy)
    _check_meshes(run.meshes, zero=run.parallel.zero)
    if isinstance(run, PpoConfig):
        _check_ppo(run)
    if isinstance(run, GrpoConfig):
        _check_grpo(run)


def _check_rollout(rollout: RolloutOptions, *, seq_length: int) -> None:
    positive(rollout, "rollout_batch_size", "samples_per_prompt", "max_new_tokens", "temperature", "decode_batch")
    not_negative(rollout, "show_samples")
    if rollout.max_new_tokens >= seq_length:
        raise ValueError(
            f"max_new_tokens ({rollout.max_new_tokens}) leaves no room for a prompt in seq_length ({seq_length}): use "
            "a longer seq_length, or fewer new tokens"
        )


def _check_minibatches(run: RlConfig) -> None:
    size, rollout = run.train.global_batch_size, run.rollout
    if run.num_answers % size:
        unit = math.lcm(size, rollout.samples_per_prompt)
        raise ValueError(
            f"the answers of an iteration (rollout_batch_size {rollout.rollout_batch_size} * samples_per_prompt "
            f"{rollout.samples_per_prompt} = {run.num_answers}) do not split into minibatches of global_batch_size "
            f"({size}): use {nearest_multiples(run.num_answers, unit)} answers, or another global_batch_size"
        )


def _check_rewards(rewards: RewardsConfig, rollout: RolloutOptions) -> None:
    positive(rewards, "reward_timeout", "reward_workers")
    not_negative(rewards, "score_clip", "missing_end_penalty", "overlong_buffer")
    if rewards.missing_end_penalty and rewards.missing_end_score is not None:
        raise ValueError(
            f"missing_end_penalty ({rewards.missing_end_penalty}) and missing_end_score "
            f"({rewards.missing_end_score}) are two answers to one question: give one of them"
        )
    if rewards.overlong_buffer > rollout.max_new_tokens:
        raise ValueError(
            f"overlong_buffer ({rewards.overlong_buffer}) is longer than an answer (max_new_tokens "
            f"{rollout.max_new_tokens}): use a part of it"
        )


def _check_policy(policy: PolicyOptions) -> None:
    positive(policy, "update_epochs", "clip_low", "kl_horizon")
    not_negative(policy, "entropy_coefficient", "kl_coefficient", "ptx_coefficient")
    for name in ("clip_high", "kl_target", "max_approx_kl"):
        if getattr(policy, name) is not None:
            positive(policy, name)
    if policy.clip_low > 1.0:
        raise ValueError(f"clip_low ({policy.clip_low}) must be at most 1: ratios are not negative")
    if policy.dual_clip is not None and policy.dual_clip <= 1.0:
        raise ValueError(f"dual_clip ({policy.dual_clip}) must be above 1, the ratio of a policy that did not move")
    if policy.kl_target is not None and not policy.kl_coefficient:
        raise ValueError(f"kl_target ({policy.kl_target}) adapts kl_coefficient, which is 0: give one, such as 0.2")
    if policy.kl_in == "loss" and policy.kl_estimator == "k1" and policy.kl_coefficient:
        raise ValueError("kl_in loss with kl_estimator k1 has a gradient that says nothing of the KL: use k2 or k3")
    if bool(policy.ptx_coefficient) != bool(policy.ptx_data):
        raise ValueError(
            f"ptx_coefficient ({policy.ptx_coefficient}) and ptx_data ({' '.join(policy.ptx_data) or 'none'}) belong "
            "together: give both, or none"
        )


def _check_meshes(meshes: MeshOptions, *, zero: int) -> None:
    if meshes.offload_frozen and zero == 3:
        raise ValueError("offload_frozen with zero 3: frozen models are sharded there, and stay: leave one of them out")
    for name in ("critic_tp", "critic_pp", "frozen_tp", "frozen_pp"):
        if getattr(meshes, name) is not None:
            positive(meshes, name)


def _check_ppo(run: PpoConfig) -> None:
    not_negative(run.ppo, "critic_warmup", "value_clip")
    if run.ppo.critic_warmup >= run.train.steps:
        raise ValueError(
            f"critic_warmup ({run.ppo.critic_warmup}) leaves no iteration of steps ({run.train.steps}) to the policy: "
            "use a shorter one, or more steps"
        )
    for name in ("gamma", "lam"):
        if not 0.0 <= getattr(run.ppo, name) <= 1.0:
            raise ValueError(f"{name} ({getattr(run.ppo, name)}) must be between 0 and 1")
    if run.ppo.critic_learning_rate is not None:
        positive(run.ppo, "critic_learning_rate")
    if run.policy.importance != "token":
        raise ValueError(
            "importance sequence needs one advantage an answer, PPO has one a token: use it with GRPO, or use token"
        )


def _check_grpo(run: GrpoConfig) -> None:
    not_negative(run.grpo, "dynamic_sampling")
    if run.meshes.critic_tp is not None or run.meshes.critic_pp is not None:
        raise ValueError(
            f"critic_tp ({run.meshes.critic_tp}) and critic_pp ({run.meshes.critic_pp}) are PPO's, GRPO has no critic: "
            "leave them out"
        )
    if run.grpo.advantage == "reinforce++":
        _check_reinforce(run)
    elif run.rollout.samples_per_prompt < 2:
        raise ValueError(
            f"samples_per_prompt ({run.rollout.samples_per_prompt}) makes no groups to compare within: use at least 2, "
            "or advantage reinforce++, which compares all answers"
        )
    elif run.policy.kl_coefficient and run.policy.kl_in == "reward" and run.policy.kl_estimator != "k1":
        raise ValueError("a KL in the reward is summed over the answer, for which kl_estimator k1 is unbiased: use k1")


def _check_reinforce(run: GrpoConfig) -> None:
    if run.grpo.dynamic_sampling:
        raise ValueError(
            f"dynamic_sampling ({run.grpo.dynamic_sampling}) replaces groups that say nothing, and advantage "
            "reinforce++ has no groups: leave it out, or use reinforce++_baseline"
        )
    if run.policy.importance != "token":
        raise ValueError(
            "importance sequence needs one advantage an answer, reinforce++ has one a token: use another advantage, or "
            "importance token"
        )
