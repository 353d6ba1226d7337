"""What the models of a run of PPO or GRPO will need on a rank, phase by phase."""

from __future__ import annotations

from dataclasses import replace

import torch

from megallm.config.backends import parse_backends
from megallm.config.check import data_parallel_size
from megallm.config.model import ModelConfig
from megallm.config.rl import RlConfig
from megallm.ops.backends import Backends
from megallm.planner.memory import PARAMETER_BYTES, MemoryPlan
from megallm.planner.phases import ModelMemory, Phase, cache_bytes, plan_phases
from megallm.trainers.memory import plan_memory


def rl_phases(
    run: RlConfig,
    policy: ModelConfig,
    *,
    critic: ModelConfig | None,
    has_reference: bool,
    rewards: dict[str, ModelConfig],
    world_size: int,
    device: torch.device,
) -> list[Phase]:
    """The phases; `critic`, `rewards`: shapes of the models beside the policy, None or empty = there is none."""

    def plan(config: ModelConfig, tp: int | None, pp: int | None, *, frozen: bool = False) -> MemoryPlan:
        parallel = run.parallel
        if tp or pp or frozen:
            parallel = replace(
                parallel, tp=tp or parallel.tp, pp=pp or parallel.pp, virtual_stages=1 if frozen else
                parallel.virtual_stages, offload="none" if frozen else parallel.offload,
                zero=(3 if parallel.zero == 3 else 0) if frozen else parallel.zero,
            )  # fmt: skip
        train = run.train
        if frozen:  # one forward, of any size
            dp = data_parallel_size(parallel, world_size)
            train = replace(train, recompute="full", global_batch_size=train.micro_batch_size * dp)
        return plan_memory(
            replace(run, parallel=parallel, train=train), config, world_size=world_size, device=device,
            backends=Backends(parse_backends(run.backend), announce=lambda line: None),
            lora=None if frozen else run.lora,
        )  # fmt: skip

    meshes = run.meshes
    models = {"policy": ModelMemory(plan=plan(policy, None, None), trains=True)}
    if critic is not None:
        models["critic"] = ModelMemory(plan=plan(critic, meshes.critic_tp, meshes.critic_pp), trains=True)
    frozen = ({"reference": policy} if has_reference else {}) | rewards
    for name, config in frozen.items():
        own = plan(config, meshes.frozen_tp, meshes.frozen_pp, frozen=True)
        models[name] = ModelMemory(plan=own, trains=False, is_away=run.meshes.offload_frozen)
    dp = world_size // (run.parallel.tp * run.parallel.pp)
    answers = -(-run.num_answers // dp)
    cache = cache_bytes(
        policy, run.parallel, num_sequences=min(run.rollout.decode_batch, answers), length=run.train.seq_length,
        element_bytes=PARAMETER_BYTES[run.numerics.precision],
    )  # fmt: skip
    if device.type == "cpu" and run.numerics.precision == "fp32":  # decoding's copies of the linears' weights
        cache += models["policy"].plan.device.parameters or 0
    whole = [plan(config, None, None, frozen=True).device.activations or 0 for config in (policy, *frozen.values())]
    return plan_phases(models, cache=cache, forward=max(whole))
