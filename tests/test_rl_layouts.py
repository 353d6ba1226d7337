"""PPO and GRPO make the same updates on every layout: answers, scores, advantages, losses; in fp64, to 1e-9."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from random import Random
from typing import Any

import pytest
import torch
from training_cases import once

from megallm.checkpoint.sharded import TrainState
from megallm.config.numerics import NumericsConfig
from megallm.config.optim import OptimConfig
from megallm.config.parallel import ParallelConfig
from megallm.config.rl import GrpoConfig, GrpoOptions, PolicyOptions, PpoConfig, PpoOptions, RlConfig, RolloutOptions
from megallm.config.train import TrainConfig
from megallm.data.chat_model import ChatModel
from megallm.data.prompts import PromptDataset
from megallm.data.tokenizer import byte_tokenizer
from megallm.generate.sampling import Sampling
from megallm.parallel.mesh import Mesh
from megallm.testing.pool import run_ranks
from megallm.testing.tiny import tiny_config
from megallm.trainers.engine import Engine
from megallm.trainers.experience import answer_rows, token_logprobs, token_values
from megallm.trainers.frozen import Frozen
from megallm.trainers.grpo import Groups
from megallm.trainers.ppo import Critic
from megallm.trainers.rewards import Response, Scores
from megallm.trainers.rl import Advantages, RlProgram
from megallm.trainers.rollouts import Answerer

TRAIN = TrainConfig(steps=3, micro_batch_size=2, global_batch_size=8, seq_length=40, seed=5)
OPTIM = OptimConfig(learning_rate=2e-3, weight_decay=0.0, lr_schedule="constant", max_grad_norm=0.5)
POLICY = PolicyOptions(update_epochs=2, kl_coefficient=0.1, clip_low=0.1, entropy_coefficient=0.01)
BASE: dict[str, Any] = {"train": TRAIN, "optim": OPTIM, "numerics": NumericsConfig(precision="fp64")}
RUNS: dict[str, RlConfig] = {
    "ppo": PpoConfig(
        **BASE, policy=replace(POLICY, kl_target=1.0, kl_horizon=50.0), ppo=PpoOptions(whiten_rewards=True),
        rollout=RolloutOptions(rollout_batch_size=16, max_new_tokens=12, temperature=0.8),
    ),
    "grpo": GrpoConfig(
        **BASE, policy=replace(POLICY, kl_in="loss", kl_estimator="k3", aggregation="sequence", clip_high=0.3),
        rollout=RolloutOptions(rollout_batch_size=4, samples_per_prompt=4, max_new_tokens=12),
        grpo=GrpoOptions(dynamic_sampling=1),
    ),
    "reinforce++": GrpoConfig(
        **BASE, policy=replace(POLICY, kl_in="reward"), grpo=GrpoOptions(advantage="reinforce++"),
        rollout=RolloutOptions(rollout_batch_size=16, max_new_tokens=12),
    ),
}  # fmt: skip
LAYOUTS = {
    "tp2-pp2-dp2": {"tp": 2, "pp": 2, "dp": 2},
    "tp2": {"tp": 2},
    "pp2-zero1-dp2": {"pp": 2, "dp": 2, "zero": 1},
    "dp2-zero3": {"dp": 2, "zero": 3},
    "dp2, critic tp2": {"dp": 2, "critic_tp": 2},
    "tp2-dp2, critic pp2": {"tp": 2, "dp": 2, "critic_pp": 2, "critic_tp": 1},
}


class Fives:
    """A reward: ids that add up to a multiple of five. Some answers to prompt 3 are left out."""

    def score(self, responses: Sequence[Response]) -> Scores:
        token_ids = [each.ids[len(each.prompt) :] for each in responses]
        total = torch.tensor([float(sum(ids) % 5 == 0) for ids in token_ids], dtype=torch.float64)
        for i, (each, ids) in enumerate(zip(responses, token_ids, strict=True)):
            if each.record["number"] == 3 and ids[0] % 3 == 0:
                total[i] = torch.nan
        return Scores(total=total, parts={"fives": total}, failures=[])


def program_of(
    run: RlConfig, layout: dict[str, Any], stop_ids: tuple[int, ...] = tuple(range(40))
) -> tuple[Engine, Engine | None, RlProgram]:
    tp, pp, dp = (layout.get(name, 1) for name in ("tp", "pp", "dp"))
    mesh = Mesh.build(tp=tp, pp=pp, dp=dp)
    parallel = ParallelConfig(tp=tp, pp=pp, zero=layout.get("zero", 0))
    tokenizer = byte_tokenizer()
    config = tiny_config(
        "llama", vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, initializer_range=0.2
    )
    options: dict[str, Any] = {"optim": run.optim, "micro_batch_size": 2, "precision": run.numerics}
    engine = Engine(config, mesh, parallel=parallel, seed=1, **options)
    reference = Engine(config, mesh, parallel=parallel, seed=2, precision=run.numerics, train=False)
    chat = ChatModel(tokenizer=tokenizer, template=None, max_length=40)
    records = [{"prompt": "ab" * (1 + i % 5), "number": i} for i in range(10)]
    answerer = Answerer(
        engine=engine, prompts=PromptDataset(records, chat, max_prompt_tokens=20, seed=7), chat=chat,
        rewards=Fives(), sampling=Sampling(temperature=run.rollout.temperature, seed=9, stop_ids=stop_ids),
        num_samples=run.rollout.samples_per_prompt, max_new_tokens=run.rollout.max_new_tokens, decode_batch=5,
    )  # fmt: skip
    critic, advantages = None, Groups(run.grpo) if isinstance(run, GrpoConfig) else None
    if isinstance(run, PpoConfig):
        critic_tp, critic_pp = layout.get("critic_tp", tp), layout.get("critic_pp", pp)
        own = (critic_tp, critic_pp) == (tp, pp)
        there = mesh if own else Mesh.build(tp=critic_tp, pp=critic_pp)
        critic = Engine(
            config.replace(head="scalar", tie_word_embeddings=False), there,
            parallel=replace(parallel, tp=critic_tp, pp=critic_pp), seed=3, **options,
        )  # fmt: skip
        advantages = Critic(engine=critic, run=run, offset=0.25)
    chosen: Advantages = advantages
    program = RlProgram(engine, run, answerer=answerer, advantages=chosen, reference=Frozen(reference))
    return engine, critic, program


@once
def train(rank: int, world_size: int, name: str, layout: str) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
    """Metrics of every iteration; at the end, what both models say of every token of fixed rows."""
    run = RUNS[name]
    engine, critic, program = program_of(run, LAYOUTS.get(layout, {}))
    lines, state = [], TrainState(step=0, consumed_samples=0, tokens=0)
    for step in range(run.train.steps):
        result, consumed = program.step(state, run.optim.learning_rate)
        state = replace(state, step=step + 1, consumed_samples=state.consumed_samples + consumed)
        values = {key: value for key, value in result.metrics().items() if not key.startswith("share_")}
        lines.append(values | {"consumed": float(consumed)})
    rows = answer_rows([[5, 6, 7], [8] * 9], [[100, 101, 102, 7], [9]])
    said = [token_logprobs(engine, rows, temperature=1.0, tokens_at_once=64)]
    if critic is not None:
        said.append(token_values(critic, rows, tokens_at_once=64))
    return lines, said


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", RUNS)
def test_iterations_are_those_of_one_rank(name: str, layout: str) -> None:
    world_size = prod(LAYOUTS[layout].get(axis, 1) for axis in ("tp", "pp", "dp"))
    truth, truth_said = train(0, 1, name, "one rank")
    for lines, said in run_ranks(train, world_size, name, layout):
        for step, (ours, theirs) in enumerate(zip(lines, truth, strict=True)):
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                assert ours[key] == pytest.approx(value, rel=1e-9, abs=1e-10), f"{key} of iteration {step + 1}"
        for ours_said, theirs_said in zip(said, truth_said, strict=True):
            torch.testing.assert_close(ours_said, theirs_said, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", RUNS)
def test_the_runs_are_worth_comparing(name: str) -> None:
    """Answers end early and late, ratios are clipped, the policy moves, an answer is left out."""
    lines, _ = train(0, 1, name, "one rank")
    assert any(0.0 < line["ended"] < 1.0 for line in lines)
    assert any(line["clip_fraction"] > 0.0 for line in lines) and lines[-1]["approx_kl"] > 1e-4
    assert lines[0]["mismatch"] == pytest.approx(1.0, abs=1e-6)
    assert any(line.get("left_out", 0.0) > 0.0 for line in lines)
    if name == "grpo":
        assert any(line["consumed"] > RUNS[name].rollout.rollout_batch_size for line in lines)


def train_at_random(rank: int, world_size: int, number: int) -> list[float]:
    """Two iterations, everything drawn by `number`; the losses, nan of one that has no answer that ended."""
    draw = Random(number)
    run = RUNS[draw.choice(["ppo", "grpo"])]
    samples = run.rollout.samples_per_prompt
    prompts = 8 // samples
    run = replace(
        run,
        rollout=replace(run.rollout, rollout_batch_size=prompts, max_new_tokens=draw.randint(1, 15)),
        policy=replace(run.policy, update_epochs=draw.randint(1, 2), max_approx_kl=draw.choice([None, 1e-3])),
        train=replace(TRAIN, micro_batch_size=2, global_batch_size=draw.choice([4, 8])),
        rewards=replace(run.rewards, overlong=draw.choice(["keep", "mask"])),
    )  # fmt: skip
    splits = {2: [{"tp": 2}, {"pp": 2}, {"dp": 2, "zero": 3}], 4: [{"tp": 2, "dp": 2}, {"pp": 2, "dp": 2, "zero": 1}]}
    stop_ids = tuple(draw.sample(range(257), draw.choice([0, 5, 60, 200])))
    _, _, program = program_of(run, draw.choice(splits[world_size]), stop_ids)
    state, losses = TrainState(step=0, consumed_samples=0, tokens=0), []
    for step in range(2):
        result, consumed = program.step(state, 1e-3)
        state = replace(state, step=step + 1, consumed_samples=state.consumed_samples + consumed)
        losses.append(result.metrics()["loss"])
    return losses


@pytest.mark.parametrize("number", range(20))
def test_ranks_that_finish_at_different_lengths_never_wait_for_ever(number: int) -> None:
    """Random layouts, lengths, stops, batches and early ends, under a watchdog of 60 s."""
    world_size = 4 if number % 4 == 0 else 2
    found = run_ranks(train_at_random, world_size, number, timeout=60.0)
    assert all(losses == pytest.approx(found[0], rel=1e-9, abs=1e-12, nan_ok=True) for losses in found)
