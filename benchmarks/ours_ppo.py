"""The benchmark's worker for PPO with MegaLLM: the four models of ppo.py on one rank, a whole iteration every step."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from protocol import serve, write_json

from megallm.checkpoint.sharded import TrainState
from megallm.config.optim import OptimConfig
from megallm.config.rl import PolicyOptions, PpoConfig, PpoOptions, RolloutOptions
from megallm.config.train import TrainConfig
from megallm.data.chat_model import ChatModel
from megallm.data.prompts import Prompt
from megallm.data.tokenizer import Tokenizer
from megallm.generate.sampling import Sampling
from megallm.parallel import Engine, Mesh, open_model
from megallm.trainers.experience import answer_rows, is_answer, token_logprobs
from megallm.trainers.frozen import Frozen
from megallm.trainers.ppo import Critic, critic_engine
from megallm.trainers.rewards import RewardMixture, RewardModel, RewardSpec
from megallm.trainers.rl import RlProgram
from megallm.trainers.rl_setup import frozen_engine
from megallm.trainers.rollouts import Answerer
from megallm.trainers.scores import score_responses


def main() -> None:
    """--folder of the protocol, --shape as JSON, --layout as JSON: rows, ours (files)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--layout", type=json.loads, required=True)
    parser.add_argument("--weights", required=True, help="folder of lm/ and scalar/, and of tokenizer.json")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape, rows = args.shape, json.loads(Path(args.layout["rows"]).read_text())
    models = Models.load(settings(shape), Path(args.weights))
    first = models.fixed(rows["prompts"], rows["answers"])
    program = models.program(rows["prompts"], Tokenizer.from_path(args.weights))
    state, lines = TrainState(step=0, consumed_samples=0, tokens=0), []

    def step() -> float:
        nonlocal state
        began = time.process_time()
        result, consumed = program.step(state, models.run.optim.learning_rate)
        state = replace(state, step=state.step + 1, consumed_samples=state.consumed_samples + consumed)
        assert result.values["response_length"] == shape["new_tokens"], "an answer ended"
        shares = {name: share for name, share in result.values.items() if name.startswith("share_")}
        lines.append({"cpu_s": time.process_time() - began} | shares)
        write_json(Path(args.layout["ours"]), lines)
        return result.values["score"]

    step()
    lines.clear()
    serve(args.folder, rank=0, step=step, barrier=lambda: None, first=first)


def settings(shape: dict[str, int]) -> PpoConfig:
    """What ppo.py says, as the library has it."""
    minibatch = shape["batch"] // shape["minibatches"]
    return PpoConfig(
        train=TrainConfig(steps=1, micro_batch_size=minibatch, global_batch_size=minibatch, seq_length=shape["seq"]),
        optim=OptimConfig(learning_rate=1e-5, weight_decay=0.0, beta2=0.95, max_grad_norm=0.0),
        rollout=RolloutOptions(
            rollout_batch_size=shape["batch"], max_new_tokens=shape["new_tokens"], decode_batch=shape["batch"]
        ),
        policy=PolicyOptions(update_epochs=shape["epochs"], kl_coefficient=0.05),
        ppo=PpoOptions(critic_learning_rate=1e-5),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Models:
    """The four of a run."""

    run: PpoConfig
    policy: Engine
    critic: Engine
    reference: Engine
    reward: Engine

    @staticmethod
    def load(run: PpoConfig, weights: Path) -> Models:
        """With the initial weights."""
        mesh, language, scalar = Mesh.build(), open_model(str(weights / "lm")), open_model(str(weights / "scalar"))
        policy = Engine(language.config, mesh, optim=run.optim, micro_batch_size=run.train.micro_batch_size)
        language.load_weights(policy)
        return Models(
            run=run, policy=policy, critic=critic_engine(run, scalar, mesh),
            reference=frozen_engine(run, language, mesh), reward=frozen_engine(run, scalar, mesh),
        )  # fmt: skip

    def fixed(self, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
        """[mean log-probability of the answers' tokens, mean score] before training: the peer must have the same."""
        rows = answer_rows(prompts, answers)
        logprobs = token_logprobs(self.reference, rows, temperature=1.0, tokens_at_once=4096)[is_answer(rows)]
        scores = score_responses(self.reward, [p + a for p, a in zip(prompts, answers, strict=True)])
        return [float(logprobs.double().mean()), sum(scores) / len(scores)]

    def program(self, prompts: list[list[int]], tokenizer: Tokenizer) -> RlProgram:
        """Iterations on these prompts; nothing ends an answer."""
        spec = RewardSpec(name="reward", kind="model", path="reward")
        rewards = RewardMixture((spec,), self.policy.mesh, models={"reward": RewardModel(engine=self.reward)})
        chat = ChatModel(tokenizer=tokenizer, template=None, max_length=self.run.train.seq_length)
        pool: Any = Pool(prompts)
        answerer = Answerer(
            engine=self.policy, prompts=pool, chat=chat, rewards=rewards,
            sampling=Sampling(temperature=self.run.rollout.temperature, seed=self.run.train.seed), num_samples=1,
            max_new_tokens=self.run.rollout.max_new_tokens, decode_batch=self.run.rollout.decode_batch,
        )  # fmt: skip
        critic = Critic(engine=self.critic, run=self.run)
        return RlProgram(
            self.policy, self.run, answerer=answerer, advantages=critic, reference=Frozen(self.reference)
        )


@dataclass(frozen=True)
class Pool:
    """Prompts that are ids already, in place of a PromptDataset."""

    ids: list[list[int]]

    def prompt(self, index: int) -> Prompt:
        """Number `index`, without end."""
        return Prompt(ids=self.ids[index % len(self.ids)], text="", record={})


if __name__ == "__main__":
    main()
