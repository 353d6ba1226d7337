"""Mixtures of rewards: sums and failures are the same on every rank, whatever the layout, whatever a function does."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megallm.parallel.mesh import Mesh
from megallm.runtime.failure import RunStopped
from megallm.testing.pool import run_ranks
from megallm.testing.tiny import tiny_config
from megallm.trainers.engine import Engine
from megallm.trainers.rewards import (
    OnError,
    Response,
    RewardError,
    RewardMixture,
    RewardModel,
    RewardSpec,
    check_reward,
    parse_reward,
    parse_rewards,
)
from megallm.trainers.scores import Calibration, score_responses

FILE = """
import os, time, ctypes

def digits(prompt, completion, weight, **record):
    if completion == "8":
        raise ArithmeticError("of " + prompt)
    if completion == "9":
        return float("nan")
    if completion == "10":
        ctypes.PyDLL(None).sleep(600)
    if completion == "11":
        os._exit(7)
    return weight * len(completion)

def process(prompt, completion):
    return os.getpid()
"""
CONFIG = dataclasses.replace(tiny_config("llama"), head="scalar")
CALIBRATION = Calibration(mean=0.25, std=4.0, responses=9)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def responses(number: int) -> list[Response]:
    """Number i has the answer 12 + i, every third one is right, all have ids of their own."""
    return [
        Response(
            prompt=f"prompt {i}",
            completion=str(12 + i),
            ids=[1 + (i + at) % 90 for at in range(3 + i % 4)],
            record={"answer": 12 + i if i % 3 == 0 else "?", "weight": 0.5, "prompt": "raw"},
        )
        for i in range(number)
    ]


def bad_responses() -> list[Response]:
    """Numbers 1, 3, 5, 6 fail in each of the ways."""
    made = responses(8)
    for at, completion in ((1, "8"), (3, "9"), (5, "10"), (6, "11")):
        made[at] = dataclasses.replace(made[at], completion=completion)
    return made


def mixture(
    file: str, mesh: Mesh, *, tp: int | None, on_error: OnError = "stop", timeout_s: float = 1.5
) -> tuple[RewardMixture, Engine | None]:
    specs = list(parse_rewards([f"{file}:digits", "2*exact_answer", "-0.5*length"]))
    models, engine = {}, None
    if tp is not None:
        engine = Engine(CONFIG, Mesh.build(tp=tp), precision="fp64", seed=5, train=False)
        specs.append(RewardSpec(name="judge", kind="model", path="x", weight=3.0))
        models["judge"] = RewardModel(engine=engine, calibration=CALIBRATION, divides_by_std=True)
    return RewardMixture(specs, mesh, models=models, on_error=on_error, timeout_s=timeout_s), engine


def scored(rank: int, world_size: int, file: str, number: int, tp: int) -> tuple[Any, ...]:
    made, engine = mixture(file, Mesh.build(), tp=tp, timeout_s=20.0)
    with made:
        found = made.score(responses(number))
        assert made.score([]).total.shape == (0,)
    assert engine is not None
    raw = score_responses(engine, [each.ids for each in responses(number)])
    return found.total, found.parts, found.failures, raw


@pytest.mark.parametrize(("world_size", "tp"), [(1, 1), (2, 1), (2, 2)])
def test_sums_are_equal_on_every_rank_and_layout(file: Path, world_size: int, tp: int) -> None:
    for total, parts, failures, raw in run_ranks(scored, world_size, str(file), 7, tp):
        assert failures == [] and list(parts) == ["digits", "exact_answer", "length", "judge"]
        assert parts["digits"].tolist() == [1.0] * 7 and parts["length"].tolist() == [2.0] * 7
        assert parts["exact_answer"].tolist() == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
        judged = [(score - 0.25) / 4.0 for score in raw]
        assert parts["judge"].tolist() == judged and len(set(judged)) == 7
        expected = parts["digits"] + 2 * parts["exact_answer"] - 0.5 * parts["length"] + 3 * parts["judge"]
        assert total.dtype == torch.float64 and torch.equal(total, expected)
    alone = run_ranks(scored, 1, str(file), 7, 1)[0]
    torch.testing.assert_close(total, alone[0], rtol=0, atol=1e-12)


def failed(rank: int, world_size: int, file: str, on_error: OnError) -> Any:
    with mixture(file, Mesh.build(), tp=None, on_error=on_error)[0] as made:
        try:
            found = made.score(bad_responses())
        except RewardError as error:
            return str(error)
        again = made.score(responses(8))
        assert not again.failures and again.total.isfinite().all()
        return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("on_error", ["skip", "zero"])
def test_failures_are_named_and_the_rest_is_scored(file: Path, world_size: int, on_error: OnError) -> None:
    for found in run_ranks(failed, world_size, str(file), on_error):
        told = [(each.index, each.name, each.kind, each.detail) for each in found.failures]
        assert told == [
            (1, "digits", "raised", "ArithmeticError: of prompt 1 (line 6 of mine.py)"),
            (3, "digits", "not a number", "returned nan"),
            (5, "digits", "blocked", "no score after 1.5 s"),
            (6, "digits", "died", "its process ended (exit code 7)"),
        ]
        bad = torch.tensor([i in (1, 3, 5, 6) for i in range(8)])
        missing = math.nan if on_error == "skip" else 0.0
        torch.testing.assert_close(
            found.parts["digits"], torch.where(bad, missing, torch.ones(8, dtype=torch.float64)), equal_nan=True
        )
        rest = 2 * found.parts["exact_answer"] - 0.5 * found.parts["length"]
        assert rest.isfinite().all()
        torch.testing.assert_close(found.total, found.parts["digits"] + rest, equal_nan=True)


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_rank_stops_with_the_same_words(file: Path, world_size: int) -> None:
    for said in run_ranks(failed, world_size, str(file), "stop"):
        assert said == (
            "reward digits has no score: raised: ArithmeticError: of prompt 1 (line 6 of mine.py); prompt 'prompt 1', "
            "answer '8'; 3 more of 8 responses without one. Mend it, or let such responses be left out "
            "(on_reward_error skip) or count as 0 (on_reward_error zero)"
        )
    assert issubclass(RewardError, RunStopped)


def shared(rank: int, world_size: int, file: str) -> tuple[list[int], set[int]]:
    with RewardMixture(parse_rewards([f"0*{file}:process"]), Mesh.build(), workers=1) as made:
        found = made.score(responses(6))
        assert found.total.tolist() == [0.0] * 6
        return [int(each) for each in found.parts["process"].tolist()], {os.getpid()}


def test_calls_are_shared_over_ranks_and_processes(file: Path) -> None:
    first, second = run_ranks(shared, 2, str(file))
    assert first[0] == second[0] and len(set(first[0])) == 2
    assert first[0] == first[0][:2] * 3 and not set(first[0]) & (first[1] | second[1])


def test_a_models_nan_is_a_failure(file: Path) -> None:
    engine = Engine(CONFIG, Mesh.build(), seed=5, train=False)
    specs = [RewardSpec(name="judge", kind="model", path="x")]
    model = RewardModel(engine=engine, calibration=Calibration(mean=math.nan), encode=lambda each: each.ids[:1])
    with RewardMixture(specs, Mesh.build(), models={"judge": model}, on_error="skip") as made:
        found = made.score(responses(2))
    assert [(each.index, each.kind, each.detail) for each in found.failures] == [
        (0, "not a number", "scored nan"),
        (1, "not a number", "scored nan"),
    ]
    assert found.total.isnan().all()


def test_long_prompts_are_shortened_in_messages(file: Path) -> None:
    long = dataclasses.replace(bad_responses()[1], prompt="a" * 500 + "\nend")
    with mixture(str(file), Mesh.build(), tp=None)[0] as made, pytest.raises(RewardError) as caught:
        made.score([long])
    assert "prompt '" + "a" * 60 + " ... " + "a" * 56 + "\\nend'" in str(caught.value)


def test_an_unusable_record_stops_no_other_rank(file: Path) -> None:
    odd = dataclasses.replace(responses(1)[0], record={"weight": {1, 2}})
    with mixture(str(file), Mesh.build(), tp=None)[0] as made, pytest.raises(RewardError, match="not JSON serial"):
        made.score([odd])


@pytest.mark.parametrize(
    ("text", "name", "kind", "path", "weight"),
    [
        ("exact_answer", "exact_answer", "function", "exact_answer", 1.0),
        ("2*format:<a>.*</a>", "format", "function", "format:<a>.*</a>", 2.0),
        (" -.5e-1 * FILE:digits", "digits", "function", "FILE:digits", -0.05),
        ("0.25*FOLDER", "reward", "model", "FOLDER", 0.25),
    ],
)
def test_one_item_is_parsed(file: Path, text: str, name: str, kind: str, path: str, weight: float) -> None:
    folder = file.parent / "reward"
    folder.mkdir()
    text, path = (each.replace("FILE", str(file)).replace("FOLDER", str(folder)) for each in (text, path))
    spec = parse_reward(text)
    assert (spec.name, spec.kind, spec.path, spec.weight) == (name, kind, path, weight)
    check_reward(spec)


def test_sources_of_one_name_are_told_apart(file: Path) -> None:
    specs = parse_rewards(["format:a", "length", "2*format:b", "format:c"])
    assert [spec.name for spec in specs] == ["format", "length", "format-2", "format-3"]
    with pytest.raises(ValueError, match="no reward is named"):
        parse_rewards([])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exact", r"reward 'exact' is none: give a built-in function \(exact_answer, .*FILE.py:NAME, or the directory"),
        ("2*3*format", r"reward '2\*3\*format' is none"),
        ("nan*format", "is none"),
        ("1e999*format", r"the weight inf is out of range: use at most 1e\+06"),
        ("-1e300*format", r"the weight -1e\+300 is out of range"),
        ("2*", r"reward '2\*' is none"),
        ("length:-5", "'-5' is not what length takes as max_characters: characters must be 0 or more"),
        ("runs/none", "is none"),
        ("mine.py", "which function of the file"),
        ("format:(", "no regular expression"),
    ],
)
def test_items_that_name_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_reward(text)


def test_wrong_mixtures_are_refused(file: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        parse_reward("none.py:score")
    with pytest.raises(ValueError, match="has no function nothing"):
        check_reward(parse_reward(f"{file}:nothing"))
    with pytest.raises(ValueError, match="has no function nothing"):
        RewardMixture(parse_rewards(["length", f"{file}:nothing"]), Mesh.build())
    with pytest.raises(ValueError, match="on_error 'ignore' is not known: use one of stop, skip, zero"):
        RewardMixture(parse_rewards(["length"]), Mesh.build(), on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"models are given for \[\], the specs name \['judge'\]"):
        RewardMixture([RewardSpec(name="judge", kind="model", path="x")], Mesh.build())
    with pytest.raises(ValueError, match="names that differ"):
        RewardMixture([parse_reward("length")] * 2, Mesh.build())
