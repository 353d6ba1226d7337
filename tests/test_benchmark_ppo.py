"""The plumbing of the benchmarks of PPO beside TRL: rows, our worker, curves, tables. TRL itself is not installed."""

# ruff: noqa: E402  (benchmarks/ is no package: its path comes first)
from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import ours_ppo
import ppo
import ppo_learning

from megallm.checkpoint.sharded import TrainState
from megallm.config.flags import parse_run_config
from megallm.config.rl import PpoConfig
from megallm.data.tokenizer import train_bpe
from megallm.parallel import Engine, Mesh
from megallm.testing.tiny import tiny_config

TEXTS = [f"def function_{number}(self, name, value={number * number}):\n" for number in range(40)]
SHAPE = {"batch": 8, "minibatches": 2, "epochs": 2, "new_tokens": 5, "seq": 64}


@pytest.mark.parametrize("kind", ["mixed", "equal"])
def test_every_prompt_has_its_answer_and_room_for_it(kind: str) -> None:
    rows = ppo.rows_of(TEXTS, train_bpe(TEXTS, 300), SHAPE, kind)
    assert len(rows["prompts"]) == len(rows["answers"]) == SHAPE["batch"]
    assert {len(answer) for answer in rows["answers"]} == {SHAPE["new_tokens"]}
    assert max(map(len, rows["prompts"])) <= SHAPE["seq"] - SHAPE["new_tokens"]
    if kind == "equal":
        assert len(set(map(len, rows["prompts"]))) == 1


def test_our_worker_answers_with_as_many_tokens_as_asked_for_and_trains(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, 300)
    tokenizer.save(tmp_path)
    for head in ("lm", "scalar"):
        config = tiny_config(vocab_size=300, head=head, tie_word_embeddings=False, max_position_embeddings=64)
        Engine(config, Mesh.build()).save(str(tmp_path / head))
    rows = ppo.rows_of(TEXTS, tokenizer, SHAPE, "mixed")
    models = ours_ppo.Models.load(ours_ppo.settings(SHAPE), tmp_path)
    before = models.fixed(rows["prompts"], rows["answers"])
    assert all(map(math.isfinite, before)) and before[0] == pytest.approx(-math.log(300), abs=0.5)
    weights = [parameter.detach().clone() for parameter in models.policy.model.parameters()]
    program, state = models.program(rows["prompts"], tokenizer), TrainState(step=0, consumed_samples=0, tokens=0)
    for step in range(2):
        result, consumed = program.step(replace(state, step=step), 1e-4)
        assert consumed == SHAPE["batch"] and result.values["response_length"] == SHAPE["new_tokens"]
        assert result.values["updates"] == SHAPE["epochs"] * SHAPE["minibatches"]
    moved = [not torch.equal(a, b) for a, b in zip(weights, models.policy.model.parameters(), strict=True)]
    assert all(moved)
    assert models.fixed(rows["prompts"], rows["answers"]) == before  # of the frozen ones


def test_the_command_that_learns_has_the_settings_that_trl_gets() -> None:
    args = argparse.Namespace(model="m", reward="r", template="plain", iterations=7)
    command = ppo_learning.own_command(args, Path("w"), 3)
    run, _ = parse_run_config(command[2:], defaults=PpoConfig(), description="")
    shape = ppo_learning.SHAPE
    assert run.rollout.rollout_batch_size == shape["batch"] == run.train.global_batch_size * shape["minibatches"]
    assert (run.policy.update_epochs, run.rollout.max_new_tokens) == (shape["epochs"], shape["new_tokens"])
    assert run.optim.learning_rate == run.ppo.critic_learning_rate == ppo_learning.LEARNING_RATE
    assert (run.optim.max_grad_norm, run.optim.weight_decay, run.rewards.normalize_scores) == (0.0, 0.0, "none")


def test_curves_are_raw_scores_of_both_and_the_table_has_their_ends(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "trl.jsonl"
    own = [{"score": step - 7.0, "kl": 0.1 * step, "step_time_s": 2.0} for step in range(12)]
    other = [{"objective/scores": float(step), "objective/kl": 0.2, "seconds": 3.0 * step + 3.0} for step in range(12)]
    ours.write_text("".join(json.dumps(line) + "\n" for line in own))
    theirs.write_text("".join(json.dumps(line) + "\n" for line in [{"fixed_score": 1.0}, *other]))
    curves = {"ours": ppo_learning.own_curve(ours, 7.0), "TRL": ppo_learning.trl_curve(theirs)}
    assert [line["score"] for line in curves["ours"]] == [line["score"] for line in curves["TRL"]]
    assert {line["seconds"] for line in curves["TRL"]} == {3.0}
    out, picture = tmp_path / "rows.csv", tmp_path / "picture.png"
    ppo_learning.report(curves, 7.0, seed=1, out=out)
    ppo_learning.draw(picture, [curves, curves])
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["last_score"] for row in rows] == ["6.5", "6.5"] and picture.is_file()
