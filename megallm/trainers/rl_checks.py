"""What has to be true of PPO's and GRPO's models, rewards and prompts together, before ranks talk; and which
checkpoints a run means by the directories that it names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TypeVar

from megallm.checkpoint import sharded
from megallm.config.check import check_layout, check_length, check_positions
from megallm.config.model import ModelConfig
from megallm.config.parallel import ParallelConfig
from megallm.config.rl import PpoConfig, RlConfig
from megallm.config.rules import nearest_multiples
from megallm.data.prompts import Prompt, PromptDataset
from megallm.data.tokenizer import Tokenizer
from megallm.trainers.rewards import RewardSpec, split_weight
from megallm.trainers.source import ModelSource, open_model

Run = TypeVar("Run", bound=RlConfig)


def pinned(run: Run) -> Run:
    """`run` with the checkpoints that `model`, rewards and critic mean, and meant when the run began: what a policy is
    compared with, and rewarded by, must not move."""
    assert run.model is not None, "with_base_model comes first"
    if run.checkpoint.save is not None:
        save, model = Path(run.checkpoint.save).resolve(), Path(run.model).resolve()
        if model == save or (model.parent == save and sharded.latest(model) is not None):
            raise ValueError(
                f"--save {run.checkpoint.save} is the directory of --model {run.model}, which the run is compared "
                "with: give another"
            )
    before = run.checkpoint.load or run.checkpoint.save
    began = None if before is None else sharded.latest(Path(before))
    stored = {} if began is None else sharded.read_run(began)
    known = [split_weight(each)[1] for each in stored.get("rewards", {}).get("reward", ())]
    texts = []
    for text in run.rewards.reward:
        weight, path = split_weight(text)
        named = _pin(path, known, began)
        texts.append(text if named == path else f"{weight!r}*{named}")
    run = replace(
        run, model=_pin(run.model, [stored.get("model")], began), rewards=replace(run.rewards, reward=tuple(texts))
    )
    if isinstance(run, PpoConfig) and run.ppo.critic is not None:
        critic = _pin(run.ppo.critic, [stored.get("ppo", {}).get("critic")], began)
        run = replace(run, ppo=replace(run.ppo, critic=critic))
    return run


def _pin(path: str, before: Sequence[str | None], began: Path | None) -> str:
    """The newest checkpoint of a directory, or the one among `before`; what names no directory of some, as it is."""
    found = sharded.latest(Path(path)) if Path(path).is_dir() else None
    if found is None or found == Path(path):
        return path
    for named in before:
        if named is not None and Path(named).resolve().parent == found.resolve().parent:
            if sharded.latest(Path(named)) is None:
                raise FileNotFoundError(
                    f"{began} began with {named}, which is no longer there: the run would go on with another model; "
                    "give another --save to begin anew"
                )
            return named
    return str(found)


def check_beside(
    run: RlConfig, tokenizer: Tokenizer, source: ModelSource, name: str, tp: int | None, pp: int | None, world_size: int
) -> None:
    """ValueError unless a model beside the policy reads the same tokens, as many of them, and fits its mesh."""
    check_mesh(run, source.config, name, tp, pp, world_size)
    if source.config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"{name} has a vocabulary of {source.config.vocab_size}, {run.model} writes {tokenizer.vocab_size} "
            "different tokens: give a model with the same ones"
        )
    own = source.tokenizer()
    if own is not None and (moved := own.moved(tokenizer)):
        raise ValueError(
            f"{name} has another tokenizer than {run.model}: {moved!r} is another token; train it from a model with "
            "the same one"
        )


def check_mesh(
    run: RlConfig, config: ModelConfig, name: str, tp: int | None, pp: int | None, world_size: int
) -> None:
    """ValueError unless a model of this shape beside the policy reads as many tokens, and fits its mesh."""
    layout = ParallelConfig(tp=tp or run.parallel.tp, pp=pp or run.parallel.pp)
    try:
        check_layout(config, layout, world_size)
        check_length(config, seq_length=run.train.seq_length)
    except ValueError as error:
        raise ValueError(f"{name}, on tp {layout.tp} x pp {layout.pp}: {error}") from error


def check_frozen(run: RlConfig, rewards: Sequence[RewardSpec], *, has_copy: bool) -> None:
    """ValueError for settings of frozen models where there are none; has_copy: whether the reference is one."""
    meshes = run.meshes
    named = [name for name in ("frozen_tp", "frozen_pp", "offload_frozen") if getattr(meshes, name)]
    if named and not has_copy and not any(spec.kind == "model" for spec in rewards):
        raise ValueError(
            f"{' and '.join(named)} without a frozen model: there is no reward model, and no copy of the reference "
            "(kl_coefficient is 0, or adapters can be turned off); leave it out"
        )


def check_minibatch(run: RlConfig, world_size: int) -> None:
    """ValueError unless the critic's replicas share a minibatch."""
    tp, pp = run.meshes.critic_tp or run.parallel.tp, run.meshes.critic_pp or run.parallel.pp
    dp, size, micro = world_size // (tp * pp), run.train.global_batch_size, run.train.micro_batch_size
    if size % (micro * dp):
        raise ValueError(
            f"the critic, on tp {tp} x pp {pp}, has dp {dp}: global_batch_size ({size}) is not divisible by "
            f"micro_batch_size * dp ({micro} * {dp} = {micro * dp}); use {nearest_multiples(size, micro * dp)}, or "
            "another mesh for the critic"
        )


def check_room(run: RlConfig, config: ModelConfig, *prompts: PromptDataset | None) -> None:
    """ValueError if the policy has no positions for the longest answer to the longest prompt."""
    longest = max(each.longest for each in prompts if each is not None)
    check_positions(config, "the longest prompt", prompt_tokens=longest, new_tokens=run.rollout.max_new_tokens)


def check_columns(rewards: Sequence[RewardSpec], *prompts: Sequence[Prompt]) -> None:
    """ValueError if a reward function lacks a column in a record."""
    for spec in rewards:
        for column, each in product(spec.columns, prompts):
            without = next((prompt for prompt in each if column not in prompt.record), None)
            if without is not None:
                raise ValueError(
                    f"reward {spec.path} needs the column {column!r}; the record of prompt {without.text[:80]!a} has "
                    f"{', '.join(sorted(map(str, without.record)))}: add it, or use another reward"
                )


def other_templates(run: RlConfig, rewards: Sequence[RewardSpec]) -> Iterator[str]:
    """A line for each reward model trained on prompts of another form than the policy's, as far as both say."""
    for spec in rewards:
        path = None if spec.kind != "model" else open_model(spec.path).path
        named = None if path is None else sharded.read_run(path).get("data", {}).get("template")
        if named is not None and run.data.template is not None and named != run.data.template:
            yield (
                f"reward {spec.path} was trained with --template {named}, prompts are written with "
                f"{run.data.template}: its scores may mean little"
            )
