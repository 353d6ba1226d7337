"""What can be told of every stage before the first one runs: the rules of their own programs, on what is there.

What a stage finds of those before it is known as far as their settings say: the model's shape, whether it has adapters,
most often not its tokenizer, which pretraining makes. What they leave in their directories is not looked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megallm.checkpoint.adapters import read_lora_config
from megallm.config.check_end_to_end import of_part
from megallm.config.check_finetune import before_epochs
from megallm.config.end_to_end import BEGINS_FROM, STAGES, EndToEndConfig, wired
from megallm.config.finetune import DpoConfig, ExamplesConfig, RewardConfig, SftConfig
from megallm.config.lora import LoraConfig
from megallm.config.model import ModelConfig
from megallm.config.rl import PpoConfig
from megallm.config.run import RunConfig
from megallm.data.finetune_data import check_comparisons, check_conversations, open_template
from megallm.data.prepare import data_sources, planned_tokenizer
from megallm.data.prompts import Prompt, plain_prompts, read_prompts
from megallm.data.tokenizer import Tokenizer, byte_tokenizer
from megallm.trainers import pretrain
from megallm.trainers.end_to_end_records import finished
from megallm.trainers.finetune import check_quantized_once, tokenizer_of
from megallm.trainers.job import check_job
from megallm.trainers.ppo import critic_source
from megallm.trainers.rewards import RewardSpec, check_reward, parse_rewards, split_weight
from megallm.trainers.rl_checks import check_beside, check_columns, check_mesh, check_minibatch
from megallm.trainers.rl_setup import open_reward_model
from megallm.trainers.source import ModelSource, open_model, with_head

_MEASURED_WITH = ("sft", "reward")
"""Stages whose records the evaluation reads as well."""
_FROM_MODEL = SftConfig | RewardConfig | DpoConfig | PpoConfig


@dataclass(frozen=True, kw_only=True)
class _Left:
    """What is known of the model that a stage leaves, or will leave."""

    config: ModelConfig
    tokenizer: Tokenizer | None
    """None: there is none, or not yet."""
    tokenizer_is_known: bool
    lora: LoraConfig | None = None


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where stages run."""

    world_size: int
    device: torch.device
    unwritten: tuple[Path, ...]
    """Directories of the stages that are not finished."""

    def will_have(self, path: str | None) -> bool:
        """Whether a path is one that a stage is still to write."""
        return path is not None and any(Path(path).resolve().is_relative_to(each) for each in self.unwritten)


def check_inputs(config: EndToEndConfig, root: str, *, world_size: int, device: torch.device) -> None:
    """ValueError or FileNotFoundError, which name the part, for the first mistake in what the stages still to run are
    given: files, templates, tokenizers, rewards, meshes, adapters, back ends. `config` is not wired, and has passed
    check_end_to_end."""
    whole = wired(config, root)
    done = {name for name in STAGES if finished(root, name) is not None}
    unwritten = tuple(Path(root, name).resolve() for name in STAGES if name not in done)
    place = _Place(world_size=world_size, device=device, unwritten=unwritten)
    left: dict[str, _Left] = {}
    for name in STAGES:
        run = whole.stage(name)
        with of_part(name):
            if name in done:
                left[name] = _is_left(open_model(str(Path(root, name))))
            elif isinstance(run, RunConfig):
                left[name] = _check_base(run, place)
            else:
                assert isinstance(run, _FROM_MODEL)
                left[name] = _check_model(run, left[BEGINS_FROM[name][0]], place)
            if name not in done or name in _MEASURED_WITH:
                _check_records(run)
            if isinstance(run, PpoConfig) and name not in done:
                _check_ppo(run, config.ppo.rewards.reward, left[BEGINS_FROM[name][0]], left[name], place)
    with of_part("evaluation"):
        _prompts(config.evaluation.prompts)


def _is_left(source: ModelSource) -> _Left:
    """By a stage that is finished."""
    lora = None if source.path is None else read_lora_config(source.path)
    return _Left(config=source.config, tokenizer=source.tokenizer(), tokenizer_is_known=True, lora=lora)


def _check_base(run: RunConfig, place: _Place) -> _Left:
    source = open_model(run.model or pretrain.DEFAULT_MODEL, from_scratch=run.from_scratch)
    sources, valid_sources = data_sources(run.data)
    planned = planned_tokenizer(
        run.data.tokenizer, sources=sources, valid_sources=valid_sources, model_tokenizer=source.tokenizer()
    )
    tokenizer = planned if isinstance(planned, Tokenizer) else None
    vocab_size = source.config.vocab_size if tokenizer is None else tokenizer.vocab_size
    config = pretrain.shape_of(run, source, vocab_size=vocab_size)
    check_job(run, config, lora=None, world_size=place.world_size, device=place.device)
    return _Left(config=config, tokenizer=tokenizer, tokenizer_is_known=not isinstance(planned, str))


def _check_model(run: _FROM_MODEL, before: _Left, place: _Place) -> _Left:
    """What is left if `run` begins from what is left before it."""
    config = with_head(before.config, "scalar" if isinstance(run, RewardConfig) else "lm")
    check_job(before_epochs(run), config, lora=run.lora, world_size=place.world_size, device=place.device)
    check_quantized_once(run.lora, before.lora, str(run.model))
    named = run.data.tokenizer
    is_known = before.tokenizer_is_known and not place.will_have(named)
    tokenizer = before.tokenizer
    if is_known:
        tokenizer = tokenizer_of(run, own=before.tokenizer, vocab_size=config.vocab_size)
    elif named is not None and not place.will_have(named):
        tokenizer, is_known = Tokenizer.from_path(named), True
    template = run.data.template
    if template is not None and not place.will_have(template):
        # a tokenizer that is not known is taken to have what templates need
        open_template(template, tokenizer or byte_tokenizer(), None)
    lora = run.lora if run.lora.lora_rank else None
    return _Left(config=config, tokenizer=tokenizer, tokenizer_is_known=is_known, lora=lora)


def _check_records(run: object) -> None:
    if isinstance(run, SftConfig):
        check_conversations(run.data)
    elif isinstance(run, RewardConfig | DpoConfig):
        check_comparisons(run.data, only_pairs=isinstance(run, DpoConfig))


def _check_ppo(run: PpoConfig, rewards: tuple[str, ...], before: _Left, own: _Left, place: _Place) -> None:
    """`rewards`: those beside the reward model that is trained here."""
    texts = [text for text in rewards if not place.will_have(split_weight(text)[1])]
    specs = tuple(map(check_reward, parse_rewards(texts))) if texts else ()
    meshes, critic = run.meshes, None

    def check(name: str, source: ModelSource | None, tp: int | None, pp: int | None) -> None:
        """source None: a model that is still to be trained, with the policy's shape."""
        if source is not None and own.tokenizer is not None:
            check_beside(run, own.tokenizer, source, name, tp, pp, place.world_size)
        else:
            config = with_head(before.config, "scalar") if source is None else source.config
            check_mesh(run, config, name, tp, pp, place.world_size)

    check(f"reward {run.rewards.reward[0]}", None, meshes.frozen_tp, meshes.frozen_pp)
    for spec in specs:
        if spec.kind == "model":
            check(f"reward {spec.path}", open_reward_model(spec), meshes.frozen_tp, meshes.frozen_pp)
    if run.ppo.critic is not None and not place.will_have(run.ppo.critic):
        critic = critic_source(specs, run)
        critic.check_weights()
    check("the critic", critic, meshes.critic_tp, meshes.critic_pp)
    check_minibatch(run, place.world_size)
    _check_prompts(run, specs)


def _check_prompts(run: PpoConfig, specs: tuple[RewardSpec, ...]) -> None:
    data, valid_data = run.data.data, run.data.valid_data
    needs_columns = any(spec.columns for spec in specs)
    found = [_prompts(data, embedded=needs_columns), _prompts(valid_data, embedded=needs_columns and not data)]
    check_columns(specs, *found)
    if run.policy.ptx_data:
        check_conversations(ExamplesConfig(data=run.policy.ptx_data))


def _prompts(files: tuple[str, ...], *, embedded: bool = False) -> list[Prompt]:
    """Those of the files; of none, the embedded ones where they are asked for, of which a few tell what all have."""
    return plain_prompts(read_prompts(files, split="valid")) if files or embedded else []
