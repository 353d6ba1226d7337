"""From flags to what PPO and GRPO run on: a checked plan, the models beside the policy, and what a run leaves behind.

    policy       trains                 on the run's mesh
    critic       trains (PPO)           on a mesh of its own, if wanted
    reference    the model before training: the policy without its adapters, or a frozen copy
    rewards      frozen reward models, and functions
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megallm.checkpoint.sharded import TrainState
from megallm.config.check_rl import check_rl
from megallm.config.parallel import ParallelConfig
from megallm.config.rl import RlConfig
from megallm.data.chat_model import ChatModel
from megallm.data.convert import conversations
from megallm.data.examples import conversation_examples
from megallm.data.finetune import SftDataset
from megallm.data.finetune_data import open_template
from megallm.data.prompts import PromptDataset, read_prompts
from megallm.data.records import read_records
from megallm.generate.sampling import Sampling
from megallm.monitor.metrics import MetricsWriter
from megallm.monitor.phase_table import format_phase_table
from megallm.monitor.plots import drawing
from megallm.monitor.rl_plots import plot_rl
from megallm.parallel.mesh import Mesh
from megallm.planner.phases import Phase
from megallm.runtime.environment import LaunchInfo
from megallm.runtime.logging import Log
from megallm.trainers.engine import Engine
from megallm.trainers.finetune import Base, open_base
from megallm.trainers.frozen import Frozen
from megallm.trainers.held_out import HeldOut
from megallm.trainers.iteration import Metrics
from megallm.trainers.job import JobPlan, plan_job, run_program
from megallm.trainers.memory import device_capacity
from megallm.trainers.ptx import PretrainingRows
from megallm.trainers.rewards import RewardMixture, RewardModel, RewardSpec, check_reward, parse_rewards
from megallm.trainers.rl import Advantages, RlProgram
from megallm.trainers.rl_checks import (
    check_beside,
    check_columns,
    check_frozen,
    check_minibatch,
    check_room,
    other_templates,
    pinned,
)
from megallm.trainers.rl_memory import rl_phases
from megallm.trainers.rollouts import Answerer, Answers
from megallm.trainers.scores import read_calibration
from megallm.trainers.source import ModelSource, open_model

SAMPLES = "samples.jsonl"


@dataclass(frozen=True, kw_only=True)
class RlPlan:
    """A run that has been checked, with its prompts."""

    job: JobPlan
    chat: ChatModel
    prompts: PromptDataset
    held_out: PromptDataset | None
    rewards: tuple[RewardSpec, ...]
    ptx: PretrainingRows | None
    phases: list[Phase]
    """Memory of a rank."""


def plan_rl(
    run: RlConfig,
    *,
    embedded: str,
    critic: Callable[[Sequence[RewardSpec]], ModelSource] | None = None,
    world_size: int,
    device: torch.device,
    local_world_size: int = 1,
) -> RlPlan:
    """The checked run; `embedded`: the records that are answered where no data is named; `critic`: of PPO, its source.

    ValueError or FileNotFoundError, in one message, for everything a user can get wrong.
    """
    check_rl(run)
    run = pinned(run)
    base = open_base(run, world_size=world_size, device=device, head="lm", drop=False)
    rewards = _rewards(run, base, world_size)
    check_frozen(run, rewards, has_copy=needs_copy(run))
    critic_source = None if critic is None else critic(rewards)
    if critic_source is not None:
        critic_source.check_weights()
        tp, pp = run.meshes.critic_tp, run.meshes.critic_pp
        check_beside(run, base.tokenizer, critic_source, "the critic", tp, pp, world_size)
        check_minibatch(run, world_size)
    template = open_template(run.data.template, base.tokenizer, base.source.directory)
    chat = ChatModel(tokenizer=base.tokenizer, template=template, max_length=run.train.seq_length)
    prompts, held_out = _prompts(run, chat, embedded)
    check_room(run, base.config, prompts, held_out)
    check_columns(rewards, prompts.prompts, () if held_out is None else held_out.prompts)
    rollout = run.rollout
    words = (
        f"{rollout.rollout_batch_size} prompts, {rollout.samples_per_prompt} answers each of up to "
        f"{rollout.max_new_tokens} tokens, and {run.policy.update_epochs} x "
        f"{run.num_answers // run.train.global_batch_size} updates on {run.train.global_batch_size} answers"
    )
    job = plan_job(
        run, source=base.source, config=base.config, tokenizer=base.tokenizer, world_size=world_size,
        local_world_size=local_world_size, device=device, lora=run.lora,
        notes=(
            prompts.summary(), *([] if held_out is None else [f"held out: {held_out.summary()}"]),
            *other_templates(run, rewards),
        ),
    )  # fmt: skip
    phases = rl_phases(
        run, job.config, critic=None if critic_source is None else critic_source.config, has_reference=needs_copy(run),
        rewards={spec.name: open_model(spec.path).config for spec in rewards if spec.kind == "model"},
        world_size=world_size, device=device,
    )  # fmt: skip
    return RlPlan(
        job=replace(job, step_words=words), chat=chat, prompts=prompts, held_out=held_out, rewards=rewards,
        ptx=_ptx(run, base), phases=phases,
    )  # fmt: skip


def train_rl(
    plan: RlPlan,
    info: LaunchInfo,
    device: torch.device,
    *,
    advantages: Callable[[Engine, TrainState], Advantages],
) -> Engine:
    """Trains as planned; leaves checkpoints, metrics, samples and plots. A collective of the job."""
    run, log = plan.job.run, Log(info.rank)
    assert isinstance(run, RlConfig)

    @contextmanager
    def program(engine: Engine, state: TrainState) -> Iterator[RlProgram]:
        log.info(format_phase_table(plan.phases, capacity=device_capacity(device)))
        frozen = _frozen_mesh(run, engine)
        with ExitStack() as stack:
            rewards = stack.enter_context(_open_rewards(plan, run, frozen))
            shown = stack.enter_context(_Shown.opened(plan, info, state, log))
            answerer = _answerer(plan, run, engine, rewards, log)
            yield RlProgram(
                engine, run, answerer=answerer, advantages=advantages(engine, state),
                reference=reference_of(plan.job, engine, frozen), ptx=plan.ptx, resumed=state.extra, show=shown.show,
                validate=_held_out(plan, run, answerer),
            )  # fmt: skip

    return run_program(plan.job, info, device, program=program, draw=lambda path, log: _draw(plan, path, log))


def _prompts(run: RlConfig, chat: ChatModel, embedded: str) -> tuple[PromptDataset, PromptDataset | None]:
    """Those to train on, and those that are held out, in the records' order; None if there are none."""
    longest = run.train.seq_length - run.rollout.max_new_tokens
    train = PromptDataset(
        read_prompts(run.data.data, embedded=embedded), chat, max_prompt_tokens=longest, seed=run.train.seed
    )
    if run.data.data and not run.data.valid_data:
        return train, None
    held_out = read_prompts(run.data.valid_data, embedded=embedded, split="valid")
    return train, PromptDataset(held_out, chat, max_prompt_tokens=longest, shuffle=False)


def _rewards(run: RlConfig, base: Base, world_size: int) -> tuple[RewardSpec, ...]:
    """Those named, checked as far as can be without ranks."""
    specs = tuple(map(check_reward, parse_rewards(run.rewards.reward)))
    for spec in specs:
        if spec.kind != "model":
            continue
        source = open_reward_model(spec)
        check_beside(
            run, base.tokenizer, source, f"reward {spec.path}", run.meshes.frozen_tp, run.meshes.frozen_pp, world_size
        )  # fmt: skip
    return specs


def open_reward_model(spec: RewardSpec) -> ModelSource:
    """Its source, looked at. ValueError or FileNotFoundError unless it is a reward model that can be read."""
    source = open_model(spec.path)
    if source.config.head != "scalar":
        raise ValueError(f"reward {spec.path} is a language model: train a reward model on it (examples/reward.py)")
    assert source.path is not None
    source.check_weights()
    read_calibration(source.path)  # damaged, it says so now
    return source


def _open_rewards(plan: RlPlan, run: RlConfig, mesh: Mesh) -> RewardMixture:
    """The sources at work, models on `mesh`. A collective."""
    models = {}
    for spec in plan.rewards:
        if spec.kind == "model":
            source = open_model(spec.path)
            assert source.path is not None
            engine = Frozen(frozen_engine(run, source, mesh), offload=run.meshes.offload_frozen)
            models[spec.name] = RewardModel(engine=engine, calibration=read_calibration(source.path))
    return RewardMixture(
        plan.rewards, mesh, models=models, on_error=run.rewards.on_reward_error, workers=run.rewards.reward_workers,
        timeout_s=run.rewards.reward_timeout,
    )  # fmt: skip


def reference_of(job: JobPlan, engine: Engine, mesh: Mesh) -> Frozen | None:
    """The model before training; None if the run does not ask for it. A collective."""
    run = job.run
    assert isinstance(run, RlConfig)
    if not run.policy.kl_coefficient:
        return None
    if engine.lora is not None:
        return Frozen(engine)
    return Frozen(frozen_engine(run, job.source, mesh), offload=run.meshes.offload_frozen)


def needs_copy(run: RlConfig) -> bool:
    """Whether the reference is a model beside the policy."""
    return bool(run.policy.kl_coefficient) and not run.lora.lora_rank


def frozen_engine(run: RlConfig, source: ModelSource, mesh: Mesh) -> Engine:
    """A model without gradients on a mesh, its weights loaded. A collective."""
    parallel = ParallelConfig(tp=mesh.tp.size, pp=mesh.pp.size, zero=3 if run.parallel.zero == 3 else 0)
    config = source.config.replace(hidden_dropout=0.0, attention_dropout=0.0)
    engine = Engine(
        config, mesh, parallel=parallel, micro_batch_size=run.train.micro_batch_size, precision=run.numerics,
        seed=run.train.seed, train=False,
    )  # fmt: skip
    source.load_weights(engine)
    return engine


def other_mesh(engine: Engine, tp: int | None, pp: int | None) -> Mesh:
    """A mesh of these degrees over the engine's ranks; its own if they are the same. A collective."""
    own = engine.mesh
    tp, pp = tp or own.tp.size, pp or own.pp.size
    if (tp, pp) == (own.tp.size, own.pp.size):
        return own
    return Mesh.build(tp=tp, pp=pp, device=own.device)


def _frozen_mesh(run: RlConfig, engine: Engine) -> Mesh:
    return other_mesh(engine, run.meshes.frozen_tp, run.meshes.frozen_pp)


def _answerer(plan: RlPlan, run: RlConfig, engine: Engine, rewards: RewardMixture, log: Log) -> Answerer:
    stop_ids, end = plan.chat.stop_ids, plan.chat.turn_end
    spelled = bool(end) and plan.chat.tokenizer.token_to_id(end) not in stop_ids
    sampling = Sampling(
        temperature=run.rollout.temperature, seed=run.train.seed, stop_ids=stop_ids,
        stop_strings=(end,) if spelled else (),
    )  # fmt: skip
    return Answerer(
        engine=engine, prompts=plan.prompts, chat=plan.chat, rewards=rewards, sampling=sampling,
        num_samples=run.rollout.samples_per_prompt, max_new_tokens=run.rollout.max_new_tokens,
        decode_batch=run.rollout.decode_batch, warn=log.warning,
    )  # fmt: skip


def _held_out(plan: RlPlan, run: RlConfig, answerer: Answerer) -> HeldOut | None:
    if plan.held_out is None:
        return None
    return HeldOut(
        engine=answerer.engine, prompts=plan.held_out, most=run.train.eval_sequences, chat=answerer.chat,
        rewards=answerer.rewards, sampling=replace(answerer.sampling, temperature=0.0),
        max_new_tokens=answerer.max_new_tokens, decode_batch=answerer.decode_batch, warn=answerer.warn,
    )  # fmt: skip


def _ptx(run: RlConfig, base: Base) -> PretrainingRows | None:
    if not run.policy.ptx_data:
        return None
    template = open_template(run.data.template, base.tokenizer, base.source.directory)
    made, dropped = conversations(read_records(run.policy.ptx_data), data_format=None)
    examples, _ = conversation_examples(
        made, base.tokenizer, template, max_length=run.train.seq_length, train_on="full", dropped=dropped
    )
    length = run.train.seq_length
    padded = None if length % base.multiple else base.multiple
    dataset = SftDataset(examples, seq_length=length, seed=run.train.seed, pad_to_multiple=padded)
    return PretrainingRows(dataset=dataset, coefficient=run.policy.ptx_coefficient)


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """Some answers of every iteration, for people."""

    writer: MetricsWriter | None
    most: int
    log: Log

    @staticmethod
    @contextmanager
    def opened(plan: RlPlan, info: LaunchInfo, state: TrainState, log: Log) -> Iterator[_Shown]:
        """Writes into the save directory, where a resumed run goes on."""
        run = plan.job.run
        assert isinstance(run, RlConfig)
        writer = None
        if info.rank == 0 and run.checkpoint.save is not None and run.rollout.show_samples:
            writer = MetricsWriter(Path(run.checkpoint.save) / SAMPLES, resume_step=state.step)
        try:
            yield _Shown(writer=writer, most=run.rollout.show_samples, log=log)
        finally:
            if writer is not None:
                writer.close()

    def show(self, step: int, answers: Answers, metrics: Metrics) -> None:
        """One line an iteration; the first one is printed at steps 1, 2, 4, 8, ..."""
        rows = sample_rows(answers, self.most)
        if self.writer is not None:
            self.writer.write({"step": step, "samples": rows})
        if rows and step & (step - 1) == 0:
            asked, said, score = (rows[0][name] for name in ("prompt", "completion", "score"))
            self.log.info(f"sample {step:>5d} | {_short(str(asked))} -> {_short(str(said))} | score {score}")


def sample_rows(answers: Answers, most: int) -> list[dict[str, str | float | None]]:
    """Prompt, completion, score and end of the first answers to different prompts."""
    rows = []
    for at in _firsts(answers.groups.tolist())[:most]:
        score = float(answers.total[at])
        rows.append({
            "prompt": answers.prompts[at].text, "completion": answers.texts[at],
            "score": round(score, 4) if score == score else None, "finish_reason": answers.finish_reasons[at],
        })  # fmt: skip
    return rows


def _firsts(groups: Sequence[int]) -> list[int]:
    return [at for at, group in enumerate(groups) if at == 0 or groups[at - 1] != group]


def _short(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= most else line[: most - 3] + "...")


def _draw(plan: RlPlan, metrics: Path, log: Log) -> None:
    picture = metrics.with_name("rl.png")
    with drawing(log.warning):
        plot_rl(metrics, picture, title=f"{plan.job.config.family}, {plan.job.run.train.steps} iterations")
        log.info(f"curves      {picture}")
