"""Runs of everything from text to a policy: five trainings, each with its own flags, and what is measured at the end.

    base -> sft -> reward -> ppo        a YAML file has a part of that name for each, and `all` for what they share:
               \\-> dpo
                                            all: {precision: bf16, tp: 8}
                                            sft: {steps: 500, data: chats.jsonl}

Where one begins from and where it is saved follows from the root directory: `wired`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from megallm.config.config_file import field_values, load_yaml
from megallm.config.fields import did_you_mean
from megallm.config.finetune import DpoConfig, RewardConfig, SftConfig
from megallm.config.flags import config_fields, with_values
from megallm.config.rl import PpoConfig
from megallm.config.run import JobConfig, RunConfig
from megallm.config.serialize import to_plain

STAGES = ("base", "sft", "reward", "ppo", "dpo")
"""In the order in which they run."""
BEGINS_FROM = {"sft": ("base",), "reward": ("sft",), "ppo": ("sft", "reward"), "dpo": ("sft",)}
"""The stages whose checkpoints a stage reads."""
_ALL, _EVALUATION = "all", "evaluation"
_WIRED = {"save", "load"}
"""Names that no file sets, and `model` of every stage but base."""
_BY_LAYOUT = ("parallel", "checkpoint", "backend")
"""Sections that do not change what is learned."""
_NOT_LEARNED = ("micro_batch_size", "log_every", "metrics_file")

Job = TypeVar("Job", bound=JobConfig)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured of the models at the end."""

    prompts: tuple[str, ...] = ()
    """Files of records with a prompt, which no stage has trained on. Empty = the embedded ones of held-out modules."""
    num_prompts: int = 128
    """How many are answered, greedily."""
    num_pairs: int = 400
    """Held-out preferences that the reward model is judged on."""
    num_shown: int = 8
    """Prompts whose answers the report shows."""
    max_new_tokens: int = 32
    """Longest answer."""
    decode_batch: int = 64
    """Sequences decoded together, on each replica."""


@dataclass(frozen=True, kw_only=True)
class EndToEndConfig:
    """The stages."""

    base: RunConfig = field(default_factory=RunConfig)
    """Pretraining."""
    sft: SftConfig = field(default_factory=SftConfig)
    """Supervised fine-tuning of it."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """A reward model, from what that gives."""
    ppo: PpoConfig = field(default_factory=PpoConfig)
    """The policy that it trains."""
    dpo: DpoConfig = field(default_factory=DpoConfig)
    """Beside it: the same preferences without a reward model."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured."""

    def stage(self, name: str) -> JobConfig:
        """The run of that name."""
        run: JobConfig = getattr(self, name)
        return run


def wired(config: EndToEndConfig, root: str) -> EndToEndConfig:
    """`config` with every stage saved in a directory of its name below `root`, and begun from those before it."""
    where = {name: str(Path(root) / name) for name in STAGES}

    def placed(run: Job, name: str) -> Job:
        model = run.model if name == "base" else where[BEGINS_FROM[name][0]]
        return replace(run, model=model, checkpoint=replace(run.checkpoint, save=where[name]))

    ppo = placed(config.ppo, "ppo")
    return replace(
        config, base=placed(config.base, "base"), sft=placed(config.sft, "sft"),
        reward=placed(config.reward, "reward"), dpo=placed(config.dpo, "dpo"),
        ppo=replace(ppo, rewards=replace(ppo.rewards, reward=(where["reward"], *ppo.rewards.reward))),
    )  # fmt: skip


def from_file(config: EndToEndConfig, path: str) -> EndToEndConfig:
    """`config` with what a YAML file says. ValueError for what is not known; FileNotFoundError."""
    return _with_parts(config, load_yaml(path), where=path)


def with_settings(config: EndToEndConfig, texts: Sequence[str]) -> EndToEndConfig:
    """`config` with `PART.NAME=VALUE` texts, such as `ppo.steps=40` or `all.precision=bf16`."""
    for text in texts:
        name, equals, value = text.partition("=")
        part, dot, key = name.partition(".")
        if not equals or not dot or not key:
            raise ValueError(f"{text!r} is no setting: write PART.NAME=VALUE, such as ppo.steps=40")
        config = _with_parts(config, {part: {key: value}}, where=text)
    return config


def with_layout(config: EndToEndConfig, *, tp: int | None, pp: int | None) -> EndToEndConfig:
    """`config` with these degrees in every stage; None = as they are."""
    given = {name: value for name, value in (("tp", tp), ("pp", pp)) if value is not None}
    changed: dict[str, Any] = {name: with_values(config.stage(name), given) for name in STAGES}
    return replace(config, **changed)


def learned_from(config: EndToEndConfig, name: str) -> dict[str, Any]:
    """The settings that decide what a stage learns, its own and those of the stages before it, whatever the layout and
    the directory: a finished stage is kept while they are the same. `config` is not wired."""
    plain = {key: value for key, value in to_plain(config.stage(name)).items() if key not in _BY_LAYOUT}
    train = {key: value for key, value in plain["train"].items() if key not in _NOT_LEARNED}
    before = {key: value for each in BEGINS_FROM.get(name, ()) for key, value in learned_from(config, each).items()}
    return before | {name: plain | {"train": train}}


def _with_parts(config: EndToEndConfig, content: Mapping[str, Any], *, where: str) -> EndToEndConfig:
    parts = {name: dict(value or {}) for name, value in content.items() if isinstance(value, Mapping | None)}
    if wrong := next((name for name in content if name not in (_ALL, *STAGES, _EVALUATION)), None):
        raise ValueError(f"{where}: unknown part {wrong!r}{did_you_mean(wrong, (_ALL, *STAGES, _EVALUATION))}")
    if wrong := next((name for name in content if name not in parts), None):
        raise ValueError(f"{where}: expected `{wrong}: {{name: value}}`, got {content[wrong]!r}")
    shared, heard = parts.pop(_ALL, {}), set[str]()
    changed: dict[str, Any] = {}
    for name in STAGES:
        known = {each.name: each for each in config_fields(type(config.stage(name)))}
        general = {key: value for key, value in shared.items() if _plain(key) in known or key in _sections(known)}
        heard |= set(general)
        for values in (general, parts.get(name, {})):
            found, _ = field_values(values, known, where=f"{where}: {name}")
            taken = sorted(set(found) & (_WIRED | ({"model"} if name != "base" else set())))
            if taken:
                raise ValueError(f"{where}: {name}.{taken[0]} follows from the stages: leave it out (--save names all)")
            changed[name] = with_values(changed.get(name, config.stage(name)), found)
    if unheard := sorted(set(shared) - heard):
        raise ValueError(f"{where}: no stage has {unheard[0]!r}")
    known = {each.name: each for each in config_fields(EvaluationConfig)}
    found, _ = field_values(parts.get(_EVALUATION, {}), known, where=f"{where}: {_EVALUATION}")
    return replace(config, **changed, evaluation=replace(config.evaluation, **found))


def _plain(key: str) -> str:
    return key.replace("-", "_")


def _sections(fields: Mapping[str, Any]) -> set[str]:
    return {each.section for each in fields.values() if each.section}
