"""What responses are worth: a weighted sum of reward models and functions, the same on every rank.

    "0.5*my.py:score"  ->  RewardSpec  ->  RewardMixture.score(responses)  ->  Scores

    functions   each response on one rank, in that rank's worker processes, all functions at once; then one all-reduce
    models      meanwhile, all responses on the model's own mesh

Letters: N responses.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from megallm.data.reward_functions import BUILT_IN, check_text, function_name
from megallm.data.reward_workers import TIMEOUT_S, Call, Failure, FailureKind, RewardWorkers, check_spec
from megallm.parallel.collectives import all_reduce_, broadcast_text
from megallm.parallel.mesh import Mesh
from megallm.runtime.failure import RunStopped
from megallm.trainers.engine import Engine
from megallm.trainers.frozen import Frozen
from megallm.trainers.scores import Calibration, score_responses

OnError = Literal["stop", "skip", "zero"]
ON_ERROR: tuple[OnError, ...] = ("stop", "skip", "zero")
_WEIGHT = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*(.*)", re.DOTALL)
_SHOWN_CHARACTERS = 120
_LARGEST = 1e30
"""A score: the squares of larger ones overflow."""
_LARGEST_WEIGHT = 1e6


class RewardError(RunStopped):
    """A reward could not be told, and the run was to stop then."""


@dataclass(frozen=True, kw_only=True)
class RewardSpec:
    """One source of rewards."""

    name: str
    """In metrics and messages; no two of a mixture have the same."""
    kind: Literal["function", "model"]
    path: str
    """What data/reward_functions.py takes, or the directory of a reward model."""
    weight: float = 1.0
    """0 = looked at, not counted."""
    columns: tuple[str, ...] = ()
    """Of a record, without which a function has no score; known to check_reward."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """What is to be rewarded."""

    prompt: str
    completion: str
    ids: Sequence[int] = field(repr=False)
    """Of prompt and response, for models."""
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The columns of the prompt's record."""


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A reward model as a source."""

    engine: Engine | Frozen
    calibration: Calibration = field(default_factory=Calibration)
    divides_by_std: bool = False
    """Scores in standard deviations of good responses, not only 0 on average."""
    encode: Callable[[Response], Sequence[int]] | None = None
    """The ids that it reads, where its tokenizer or template is another than the policy's."""


@dataclass(frozen=True, kw_only=True)
class RewardFailure:
    """A response that a source has no score for."""

    index: int
    """Among the responses."""
    name: str
    """Of the source."""
    kind: FailureKind
    detail: str


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of N responses, equal on every rank, on the mesh's device."""

    total: torch.Tensor
    """[N] float64: the weighted sum; NaN = no score, to be left out."""
    parts: dict[str, torch.Tensor]
    """[N] float64 of each source by name, not weighted; NaN or 0 where it failed, as on_error says."""
    failures: list[RewardFailure]
    """By response."""


def split_weight(text: str) -> tuple[float, str]:
    """(weight, what it weighs) of `WEIGHT*SOURCE`; 1 where none is said."""
    found = _WEIGHT.fullmatch(text)
    return (float(found[1]), found[2].strip()) if found else (1.0, text.strip())


def parse_reward(text: str) -> RewardSpec:
    """The source that `NAME[:OPTION]`, `FILE.py:NAME` or a directory of a reward model names, `WEIGHT*` before it or
    not. ValueError or FileNotFoundError for what names none. Runs nothing: see check_reward."""
    weight, path = split_weight(text)
    if not abs(weight) <= _LARGEST_WEIGHT:
        raise ValueError(f"reward {text!r}: the weight {weight} is out of range: use at most {_LARGEST_WEIGHT:g}")
    if path.partition(":")[0] in BUILT_IN or path.endswith(".py") or ".py:" in path:
        check_text(path)
        return RewardSpec(name=function_name(path), kind="function", path=path, weight=weight)
    if path and Path(path).is_dir():
        folder = Path(path).resolve()
        name = folder.parent.name if (folder / "state.json").is_file() else folder.name  # of a run's checkpoint
        return RewardSpec(name=name, kind="model", path=path, weight=weight)
    raise ValueError(
        f"reward {text!r} is none: give a built-in function ({', '.join(BUILT_IN)}), FILE.py:NAME, or the directory of "
        "a reward model, each with a weight before it if wanted, as in 0.5*format"
    )


def parse_rewards(texts: Sequence[str]) -> tuple[RewardSpec, ...]:
    """The sources of a mixture; of equal names the second gets `-2`, and so on."""
    if not texts:
        raise ValueError("no reward is named: give at least one, such as exact_answer")
    specs: list[RewardSpec] = []
    taken: set[str] = set()
    for spec in map(parse_reward, texts):
        name, number = spec.name, 1
        while name in taken:
            number += 1
            name = f"{spec.name}-{number}"
        taken.add(name)
        specs.append(replace(spec, name=name))
    return tuple(specs)


def check_reward(spec: RewardSpec) -> RewardSpec:
    """The source with the columns that it needs. ValueError or FileNotFoundError for a function that cannot be loaded
    or called. For the time before ranks talk: it runs the function's file, in a process of its own."""
    return replace(spec, columns=check_spec(spec.path)) if spec.kind == "function" else spec


class RewardMixture:
    """The sources at work."""

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        mesh: Mesh,
        *,
        models: Mapping[str, RewardModel] | None = None,
        on_error: OnError = "stop",
        workers: int = 2,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Starts `workers` processes for each function on this rank. `models`: those of the specs that are models, by
        name, each over the ranks of `mesh`. on_error: what a response without a score does, once per response and
        source: stop = every rank raises RewardError; skip = its total is NaN; zero = that part is 0. ValueError or
        FileNotFoundError as check_reward."""
        self._models = dict(models or {})
        self._specs, self._mesh, self._on_error = tuple(specs), mesh, on_error
        self._workers: dict[str, RewardWorkers] = {}
        self._check()
        try:
            for spec in self._specs:
                if spec.kind == "function":
                    self._workers[spec.name] = RewardWorkers(spec.path, workers=workers, timeout_s=timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources, in order."""
        return tuple(spec.name for spec in self._specs)

    def score(self, responses: Sequence[Response]) -> Scores:
        """The scores of `responses`, the same list on every rank. A collective."""
        size, world, device = len(responses), self._mesh.world, self._mesh.device
        if not responses:
            return self._scores(torch.zeros(len(self._specs), 0, dtype=torch.float64, device=device), [], responses)
        found, failed = self._own(responses)
        counts = torch.zeros(world.size, dtype=torch.float64)
        counts[world.rank] = len(failed)
        flat = all_reduce_(torch.cat([found.flatten(), counts]).to(device), world)
        values, counts = flat[: found.numel()].view(len(self._specs), size), flat[found.numel() :]
        failures = []
        for rank, number in enumerate(counts.tolist()):
            if number:
                said = broadcast_text(json.dumps(failed if rank == world.rank else []), world, device, src=rank)
                failures += [RewardFailure(**each) for each in json.loads(said)]
        return self._scores(values, failures, responses)

    def close(self) -> None:
        """Ends this rank's processes."""
        for each in self._workers.values():
            each.close()

    def __enter__(self) -> RewardMixture:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        names = [spec.name for spec in self._specs]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"the sources {names} of a mixture need names that differ, and be at least one")
        if self._on_error not in ON_ERROR:
            raise ValueError(f"on_error {self._on_error!r} is not known: use one of {', '.join(ON_ERROR)}")
        wanted = {spec.name for spec in self._specs if spec.kind == "model"}
        if wanted != set(self._models):
            raise ValueError(f"models are given for {sorted(self._models)}, the specs name {sorted(wanted)}")
        for name, model in self._models.items():
            if sorted(model.engine.mesh.world.ranks) != sorted(self._mesh.world.ranks):
                raise ValueError(
                    f"reward model {name} is on ranks {model.engine.mesh.world.ranks}, the run on "
                    f"{self._mesh.world.ranks}: give it a mesh over the same ranks"
                )

    def _own(self, responses: Sequence[Response]) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """(what this rank found, [sources, N], 0 elsewhere; fields of this rank's failures)."""
        found = torch.zeros(len(self._specs), len(responses), dtype=torch.float64)
        failed: list[dict[str, Any]] = []
        world = self._mesh.world
        with ThreadPoolExecutor(max_workers=max(1, len(self._workers))) as threads:
            waiting = {}
            for place, spec in enumerate(self._specs):
                if spec.kind == "function":  # shifted, so that a few responses are not all on the first ranks
                    own = [i for i in range(len(responses)) if (i + place) % world.size == world.rank]
                    rows = [
                        Call(prompt=each.prompt, completion=each.completion, record=each.record)
                        for each in (responses[i] for i in own)
                    ]
                    waiting[place] = own, threads.submit(_called, self._workers[spec.name], rows)
            for place, spec in enumerate(self._specs):
                if spec.kind == "model":
                    scores = _model_scores(self._models[spec.name], responses)
                    if world.is_first:  # one rank's bits for all
                        found[place] = torch.tensor(scores, dtype=torch.float64)
            for place, (own, future) in waiting.items():
                for i, score in zip(own, future.result(), strict=True):
                    if isinstance(score, Failure):
                        failed.append({"index": i, "name": self._specs[place].name, **vars(score)})
                    else:
                        found[place, i] = score
        return found, failed

    def _scores(
        self, values: torch.Tensor, failures: list[RewardFailure], responses: Sequence[Response]
    ) -> Scores:
        """Of what all ranks found; every rank has the same."""
        places = {spec.name: place for place, spec in enumerate(self._specs)}
        for place, i in (~(values.abs() <= _LARGEST)).nonzero().tolist():  # NaN is none either
            detail = f"scored {float(values[place, i])}"
            failures.append(RewardFailure(index=i, name=self._specs[place].name, kind="not a number", detail=detail))
        failures = sorted(failures, key=lambda each: (each.index, places[each.name]))
        if failures and self._on_error == "stop":
            raise RewardError(_told(failures, responses))
        for each in failures:
            values[places[each.name], each.index] = math.nan if self._on_error == "skip" else 0.0
        total = torch.zeros_like(values[0])
        for place, spec in enumerate(self._specs):
            if spec.weight:
                total += spec.weight * values[place]
        return Scores(total=total, parts={name: values[place] for name, place in places.items()}, failures=failures)


def _called(workers: RewardWorkers, rows: Sequence[Call]) -> list[float | Failure]:
    """What the workers say; if they cannot be asked, why, of every row: one rank must not leave the others waiting."""
    try:
        return workers.score(rows)
    except Exception as error:
        return [Failure("died", f"its workers cannot be asked ({type(error).__name__}: {error})")] * len(rows)


def _model_scores(model: RewardModel, responses: Sequence[Response]) -> list[float]:
    sequences = [each.ids if model.encode is None else model.encode(each) for each in responses]
    by, scale = model.calibration, model.calibration.std if model.divides_by_std else 1.0
    with nullcontext(model.engine) if isinstance(model.engine, Engine) else model.engine.here() as engine:
        return [(score - by.mean) / scale for score in score_responses(engine, sequences)]


def _told(failures: Sequence[RewardFailure], responses: Sequence[Response]) -> str:
    first, one = failures[0], responses[failures[0].index]
    others = len({each.index for each in failures}) - 1
    return (
        f"reward {first.name} has no score: {first.kind}: {first.detail}; prompt {_short(one.prompt)}, answer "
        f"{_short(one.completion)}; {others} more of {len(responses)} responses without one. Mend it, or let such "
        "responses be left out (on_reward_error skip) or count as 0 (on_reward_error zero)"
    )


def _short(text: str) -> str:
    half = _SHOWN_CHARACTERS // 2
    return ascii(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:half]} ... {text[-half:]}")
