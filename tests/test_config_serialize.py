"""Configs as plain JSON: nothing lost, nothing guessed."""

from __future__ import annotations

import json

import pytest

from megallm.config.model import ModelConfig
from megallm.config.optim import OptimConfig
from megallm.config.parallel import ParallelConfig
from megallm.config.presets import get_preset, preset_names
from megallm.config.resolve import resolve_run
from megallm.config.run import RunConfig
from megallm.config.serialize import from_plain, to_plain
from megallm.config.train import TrainConfig


def through_json(config: object) -> object:
    return from_plain(type(config), json.loads(json.dumps(to_plain(config), allow_nan=False)))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_survives_json(name: str) -> None:
    model = get_preset(name)
    assert through_json(model) == model


def test_a_run_survives_json() -> None:
    run = RunConfig(model="gpt2", parallel=ParallelConfig(pp=2, pipeline_partition=(3, 1), schedule="gpipe"))
    assert through_json(run) == run
    assert through_json(resolve_run(run)) == resolve_run(run)


def test_missing_sections_and_fields_take_defaults() -> None:
    assert from_plain(RunConfig, {}) == RunConfig()
    assert from_plain(RunConfig, {"train": {"steps": 3}}) == RunConfig(train=TrainConfig(steps=3))
    assert from_plain(OptimConfig, {"learning_rate": 1}).learning_rate == 1.0


LLAMA = to_plain(get_preset("llama3.2-1b"))


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        (RunConfig, {"trian": {}}, "RunConfig: unknown key 'trian': did you mean train?"),
        (RunConfig, {"train": {"step": 3}}, "train: unknown key 'step': did you mean steps?"),
        (RunConfig, {"train": {"steps": "3"}}, "train.steps: expected int, got '3'"),
        (RunConfig, {"train": {"steps": True}}, "train.steps: expected int, got True"),
        (RunConfig, {"train": {"steps": 3.0}}, "train.steps: expected int, got 3.0"),
        (RunConfig, {"train": {"steps": None}}, "train.steps: null is not allowed here"),
        (RunConfig, {"train": [3]}, r"train: expected a dict of TrainConfig fields, got \[3\]"),
        (RunConfig, {"numerics": {"precision": "bf17"}}, "numerics.precision: 'bf17' is not one of"),
        (RunConfig, {"data": {"data": "a"}}, "data.data: expected a list, got 'a'"),
        (RunConfig, {"data": {"data": ["a", 1]}}, r"data.data\[1\]: expected str, got 1"),
        (RunConfig, {"optim": {"eps": float("nan")}}, "optim.eps: nan is not a finite number"),
        (ModelConfig, {"family": "llama"}, "ModelConfig: vocab_size is missing and has no default"),
        (ModelConfig, {**LLAMA, "rope_scaling": {"rope_type": "llama3", "factr": 2}}, "rope_scaling: unknown key"),
        (ModelConfig, {**LLAMA, "rope_scaling": {}}, "rope_scaling: rope_type is missing"),
    ],
)
def test_what_does_not_fit_is_refused(config: type, data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_plain(config, data)


def test_resolved_run_says_what_auto_means() -> None:
    run = resolve_run(RunConfig(parallel=ParallelConfig(tp=2, pp=2, virtual_stages=2)))
    assert run.parallel.sequence_parallel is True
    assert run.parallel.schedule == "interleaved"
    assert run.optim.min_learning_rate == pytest.approx(3e-5)
    assert run.optim.decay_steps == 100
    plain = resolve_run(RunConfig())
    assert (plain.parallel.sequence_parallel, plain.parallel.schedule) == (False, "1f1b")
    assert resolve_run(run) == run
