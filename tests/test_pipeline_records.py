"""examples/pipeline.py: a stage goes on as it began, and weights of two runs are never mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megallm.config.end_to_end import BEGINS_FROM, STAGES, EndToEndConfig, learned_from, with_layout, with_settings
from megallm.trainers.end_to_end_records import BEGUN, RECORD, begin, begun, check_begun, write_json

CONFIG = EndToEndConfig()


def begin_with_weights(config: EndToEndConfig, root: Path, *names: str) -> None:
    """As if each had been stopped behind its first checkpoint."""
    for name in names:
        begin(config, root, name)
        (root / name / "step-00000002").mkdir(parents=True)
        (root / name / "step-00000002" / "state.json").write_text("{}")


def finish(config: EndToEndConfig, root: Path, name: str) -> None:
    record = {"name": name, "seconds": 1.0, "resumed_from": 0, "learned_from": learned_from(config, name)}
    write_json(root / name / RECORD, record | {"settings": {}})


def remove_weights(root: Path, name: str) -> None:
    """The directory, as somebody who wants the stage anew."""
    for each in sorted((root / name).rglob("*"), reverse=True):
        each.rmdir() if each.is_dir() else each.unlink()
    (root / name).rmdir()


def test_a_stage_that_has_begun_goes_on_with_the_same_settings(tmp_path: Path) -> None:
    begin_with_weights(CONFIG, tmp_path, "base", "sft")
    check_begun(with_settings(with_layout(CONFIG, tp=1, pp=2), ["all.log_every=3"]), tmp_path)
    before = begun(tmp_path, "sft")
    begin(CONFIG, tmp_path, "sft")
    assert before is not None and begun(tmp_path, "sft") == before


@pytest.mark.parametrize("text", ["sft.learning_rate=5e-4", "base.steps=600", "sft.steps=400", "sft.seed=3"])
@pytest.mark.parametrize("is_finished", [False, True])
def test_other_settings_are_refused_for_stages_that_have_begun(tmp_path: Path, text: str, is_finished: bool) -> None:
    begin_with_weights(CONFIG, tmp_path, "base", "sft")
    for name in ("base", "sft") if is_finished else ():
        finish(CONFIG, tmp_path, name)
    state, last = "finished" if is_finished else "begun", text.partition("=")[0].rpartition(".")[2]
    with pytest.raises(ValueError, match=rf"was {state} with other settings \(.*{last}: .*, now .*: remove that dir"):
        check_begun(with_settings(CONFIG, [text]), tmp_path)


def test_a_stage_begun_from_weights_that_were_removed_is_refused(tmp_path: Path) -> None:
    begin_with_weights(CONFIG, tmp_path, "base", "sft", "dpo")
    remove_weights(tmp_path, "base")
    with pytest.raises(ValueError, match=r"sft began from the weights of base, and .*base has none"):
        check_begun(CONFIG, tmp_path)


@pytest.mark.parametrize("name", [name for name in STAGES if BEGINS_FROM.get(name)])
@pytest.mark.parametrize("is_finished", [False, True])
def test_a_stage_is_refused_after_one_before_it_was_trained_anew(tmp_path: Path, name: str, is_finished: bool) -> None:
    begin_with_weights(CONFIG, tmp_path, *STAGES)
    for each in STAGES if is_finished else ():
        finish(CONFIG, tmp_path, each)
    check_begun(CONFIG, tmp_path)
    before = BEGINS_FROM[name][-1]
    for each in STAGES:  # those between are trained anew as well
        if each == before or (each != name and before in BEGINS_FROM.get(each, ())):
            remove_weights(tmp_path, each)
    begin_with_weights(CONFIG, tmp_path, before)
    with pytest.raises(ValueError, match=f"{name} began from other weights of {before} than"):
        check_begun(CONFIG, tmp_path)


def test_stages_of_versions_without_names_are_kept_if_they_are_finished(tmp_path: Path) -> None:
    begin_with_weights(CONFIG, tmp_path, "base", "sft")
    for name in ("base", "sft"):
        (tmp_path / name / BEGUN).unlink()
        finish(CONFIG, tmp_path, name)
    begin_with_weights(CONFIG, tmp_path, "reward")
    check_begun(CONFIG, tmp_path)
    (tmp_path / "sft" / RECORD).unlink()
    with pytest.raises(ValueError, match=r"sft has checkpoints of a stage that is not finished, and no begun\.json"):
        check_begun(CONFIG, tmp_path)


def test_a_stage_without_a_checkpoint_begins_anew_with_any_settings(tmp_path: Path) -> None:
    begin(CONFIG, tmp_path, "base")
    check_begun(with_settings(CONFIG, ["base.steps=7"]), tmp_path)
    first = json.loads((tmp_path / "base" / BEGUN).read_text())
    begin(CONFIG, tmp_path, "base")
    assert json.loads((tmp_path / "base" / BEGUN).read_text())["training"] != first["training"]


def test_a_damaged_record_of_the_beginning_is_named(tmp_path: Path) -> None:
    begin_with_weights(CONFIG, tmp_path, "base")
    (tmp_path / "base" / BEGUN).write_text("{")
    with pytest.raises(ValueError, match=r"begun\.json is damaged .*: remove that directory"):
        check_begun(CONFIG, tmp_path)
