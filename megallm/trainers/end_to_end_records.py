"""What a stage of a run from text to a policy leaves beside its checkpoints, so that weights of two are never mixed.

    begun.json    when its first step begins: the settings that decide what it learns, a name for this training, and the
                  names of those whose weights it begins from
    stage.json    when it is finished

A directory without checkpoints is one that nothing has begun in.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megallm.checkpoint import sharded
from megallm.config.end_to_end import BEGINS_FROM, STAGES, EndToEndConfig, learned_from

RECORD, BEGUN = "stage.json", "begun.json"
_WAY_OUT = "remove that directory and those of the stages after it, or give another --save"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a stage has left in its stage.json."""

    name: str
    seconds: float
    """Of the session that finished it."""
    resumed_from: int
    """Step at which that session began."""
    learned_from: dict[str, Any]
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What a stage has left in its begun.json."""

    name: str
    training: str
    """A name that no other training has; one that is resumed keeps it."""
    began_from: dict[str, str]
    """By stage, the trainings whose weights it reads; empty for those of versions that gave no names."""
    learned_from: dict[str, Any]


def finished(root: str | Path, name: str) -> Finished | None:
    """A stage's record; None while it is not finished. ValueError if the file is damaged."""
    return _read(Path(root) / name, RECORD, Finished, "remove it, and the stage goes on from its last checkpoint")


def begun(root: str | Path, name: str) -> Begun | None:
    """What a stage began with; None if there is no checkpoint of it, or no such file. ValueError if it is damaged."""
    return _read(Path(root) / name, BEGUN, Begun, _WAY_OUT)


def begin(config: EndToEndConfig, root: str | Path, name: str) -> None:
    """Records that a stage begins; nothing where it goes on. By the one rank that writes. `config` is not wired."""
    directory = Path(root) / name
    if sharded.latest(directory) is not None:
        return
    record = Begun(
        name=name, training=uuid.uuid4().hex,
        began_from={each: _training(root, each) for each in BEGINS_FROM.get(name, ())},
        learned_from=learned_from(config, name),
    )  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / BEGUN, vars(record))


def check_begun(config: EndToEndConfig, root: str | Path) -> None:
    """ValueError if a stage has begun, but as another than `config` wants (which is not wired), or from other weights
    than those that are there."""
    for name in STAGES:
        directory = Path(root) / name
        if sharded.latest(directory) is None:
            continue
        done, start = finished(root, name), begun(root, name)
        found = done or start
        if found is None:
            raise ValueError(
                f"{directory} has checkpoints of a stage that is not finished, and no {BEGUN} that says what it began "
                f"with (earlier versions wrote none): {_WAY_OUT}"
            )
        wanted = json.loads(json.dumps(learned_from(config, name)))
        if changed := _first_difference(found.learned_from, wanted):
            state = "begun" if done is None else "finished"
            raise ValueError(f"{directory} was {state} with other settings ({changed}): {_WAY_OUT}")
        for before in BEGINS_FROM.get(name, ()):
            if sharded.latest(Path(root) / before) is None:
                raise ValueError(
                    f"{directory} began from the weights of {before}, and {Path(root) / before} has none: those to be "
                    f"trained there would be others; {_WAY_OUT}"
                )
            if _training(root, before) != (start.began_from.get(before, "") if start is not None else ""):
                raise ValueError(
                    f"{directory} began from other weights of {before} than {Path(root) / before} has, which has been "
                    f"trained anew since: {_WAY_OUT}"
                )


def write_json(path: Path, value: dict[str, Any]) -> None:
    """The file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _training(root: str | Path, name: str) -> str:
    found = begun(root, name)
    return "" if found is None else found.training


Kind = TypeVar("Kind", Finished, Begun)


def _read(directory: Path, file: str, kind: type[Kind], way_out: str) -> Kind | None:
    if not (directory / file).is_file() or sharded.latest(directory) is None:
        return None
    try:
        return kind(**json.loads((directory / file).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{directory / file} is damaged ({error}): {way_out}") from None


def _first_difference(one: Any, other: Any, path: str = "") -> str:
    """`sft.train.steps: 60, now 80`; empty if they are equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            if found := _first_difference(one.get(key), other.get(key), f"{path}.{key}" if path else key):
                return found
        return ""
    return "" if one == other else f"{path}: {one}, now {other}"
