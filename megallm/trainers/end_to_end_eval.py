"""What the models of all stages say to the same held-out prompts, and what the reward model thinks of it.

Each model answers twice: greedily, and as PPO samples. Beside the scores: the loss of held-out answers under each
model, and how often the reward model is right on held-out pairs. The same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megallm.config.end_to_end import EndToEndConfig
from megallm.data.chat_model import ChatModel
from megallm.data.finetune_data import comparison_data, open_template, sft_data
from megallm.data.loader import ValidationLoader
from megallm.data.prompts import Prompt, PromptDataset, read_prompts
from megallm.generate.rollout import Limits, Rollout
from megallm.generate.sampling import Sampling
from megallm.monitor.preference_plots import calibration_error
from megallm.parallel.mesh import Mesh
from megallm.runtime.environment import LaunchInfo
from megallm.runtime.logging import Log
from megallm.trainers.engine import Engine
from megallm.trainers.evaluate import validation_metrics
from megallm.trainers.losses import Batch, language_model_loss
from megallm.trainers.rl_setup import frozen_engine
from megallm.trainers.scores import Calibration, read_calibration, score_responses
from megallm.trainers.source import ModelSource, open_model

ANSWERING = ("base", "sft", "ppo", "dpo")
"""Stages whose models answer."""
_COMPARED_WITH = "sft"


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """What is measured of a language model."""

    score: float
    """Mean of the reward model's, calibrated, over the greedy answers."""
    score_std: float
    win_rate: float | None
    """Share of prompts whose greedy answer scores higher than that of SFT, a tie half of one; None of SFT itself."""
    sampled_score: float
    """Mean over the sampled answers."""
    sampled_score_std: float
    sampled_win_rate: float | None
    """Likewise of sampled answers."""
    length: float
    """Mean tokens of a greedy answer."""
    ended: float
    """Share of greedy answers that end by themselves."""
    distinct: float
    """Different answers among the greedy ones."""
    held_out_loss: float
    """Nats per token of held-out answers, given their prompts; nan without such data."""


@dataclass(frozen=True, kw_only=True)
class _Answered:
    ids: list[list[int]]
    """Of the greedy answers."""
    texts: list[str]
    ended: list[bool]
    sampled: list[list[int]]
    """Ids of the others."""
    held_out_loss: float


def evaluate(config: EndToEndConfig, info: LaunchInfo, device: torch.device) -> dict[str, Any]:
    """Plain data: `models` by stage, `samples`, `reward`. `config` is wired. A collective of the job."""
    log, options = Log(info.rank), config.evaluation
    parallel = config.ppo.parallel
    mesh = Mesh.build(tp=parallel.tp, pp=parallel.pp, device=device)
    source = open_model(str(config.ppo.model))
    chat, prompts = _prompts(config, source)
    held_out = _held_out(config, source, chat, mesh)
    answered = {name: _answers(config, name, chat, prompts, held_out, mesh) for name in ANSWERING}
    judge_source = open_model(config.ppo.rewards.reward[0])
    assert judge_source.path is not None
    judge, by = frozen_engine(config.ppo, judge_source, mesh), read_calibration(judge_source.path)
    scores, sampled = (
        {
            name: _scores(judge, by, [[*p.ids, *ids] for p, ids in zip(prompts, getattr(each, kind), strict=True)])
            for name, each in answered.items()
        }
        for kind in ("ids", "sampled")
    )
    models = {name: _model_scores(name, answered[name], scores, sampled) for name in ANSWERING}
    for name, each in models.items():
        wins = "" if each.win_rate is None else f" | wins over {_COMPARED_WITH} {each.win_rate:.1%}"
        log.info(
            f"{name:<6} score {each.score:7.3f}, sampled {each.sampled_score:7.3f} | held-out loss "
            f"{each.held_out_loss:.3f}{wins}"
        )
    return {
        "models": {name: _finite(asdict(each)) for name, each in models.items()},
        "num_prompts": len(prompts),
        "samples": [
            {"prompt": prompts[i].text, "answers": {
                name: {"text": answered[name].texts[i], "score": scores[name][i]} for name in ANSWERING
            }} for i in range(min(options.num_shown, len(prompts)))
        ],
        "reward": _finite(_judged(config, judge, by, source, chat)),
    }  # fmt: skip


def _prompts(config: EndToEndConfig, source: ModelSource) -> tuple[ChatModel, list[Prompt]]:
    """The held-out ones, as the trained models read them."""
    run, options = config.ppo, config.evaluation
    tokenizer = source.tokenizer()
    assert tokenizer is not None, "SFT has left one"
    template = open_template(run.data.template, tokenizer, source.directory)
    chat = ChatModel(tokenizer=tokenizer, template=template, max_length=run.train.seq_length)
    longest = min(run.train.seq_length, source.config.max_position_embeddings)
    dataset = PromptDataset(
        read_prompts(options.prompts, split="valid"), chat, shuffle=False,
        max_prompt_tokens=longest - options.max_new_tokens,
    )  # fmt: skip
    return chat, [dataset.prompt(i) for i in range(min(options.num_prompts, dataset.num_prompts))]


def _answers(
    config: EndToEndConfig, name: str, chat: ChatModel, prompts: Sequence[Prompt], held_out: list[Batch], mesh: Mesh
) -> _Answered:
    source = open_model(str(config.stage(name).checkpoint.save))
    engine = frozen_engine(config.ppo, source, mesh)
    end, stop_ids = chat.turn_end, chat.stop_ids
    spelled = bool(end) and chat.tokenizer.token_to_id(end) not in stop_ids

    def answers(temperature: float) -> Rollout:
        return engine.rollout(
            [prompt.ids for prompt in prompts], max_new_tokens=config.evaluation.max_new_tokens,
            sampling=Sampling(
                temperature=temperature, seed=config.ppo.train.seed, stop_ids=stop_ids,
                stop_strings=(end,) if spelled else (),
            ),
            limits=Limits(max_batch=config.evaluation.decode_batch), tokenizer=chat.tokenizer,
        )  # fmt: skip

    greedy = answers(0.0)
    return _Answered(
        ids=greedy.token_ids, texts=[chat.answer(ids) for ids in greedy.token_ids],
        ended=[reason != "length" for reason in greedy.finish_reasons],
        sampled=answers(config.ppo.rollout.temperature).token_ids,
        held_out_loss=validation_metrics(engine, held_out, language_model_loss)["loss"] if held_out else math.nan,
    )  # fmt: skip


def _held_out(config: EndToEndConfig, source: ModelSource, chat: ChatModel, mesh: Mesh) -> list[Batch]:
    """This rank's batches of SFT's validation data; none without any."""
    run = config.sft
    data = sft_data(
        run.data, run.sft, tokenizer=chat.tokenizer, model=source.directory, seq_length=run.train.seq_length,
        seed=run.train.seed, multiple=mesh.tp.size,
    )  # fmt: skip
    if data.valid is None:
        return []
    return list(ValidationLoader(
        data.valid, num_sequences=run.train.eval_sequences, batch_size=run.train.global_batch_size,
        dp_rank=mesh.dp.rank, dp_size=mesh.dp.size,
    ))  # fmt: skip


def _scores(judge: Engine, by: Calibration, sequences: Sequence[Sequence[int]]) -> list[float]:
    return [score - by.mean for score in score_responses(judge, sequences)]


def _model_scores(
    name: str, answered: _Answered, scores: Mapping[str, list[float]], sampled: Mapping[str, list[float]]
) -> ModelScores:
    number = len(answered.ids)
    score, std, wins = _compared(name, scores)
    sampled_score, sampled_std, sampled_wins = _compared(name, sampled)
    return ModelScores(
        score=score, score_std=std, win_rate=wins, sampled_score=sampled_score, sampled_score_std=sampled_std,
        sampled_win_rate=sampled_wins, length=sum(map(len, answered.ids)) / number,
        ended=sum(answered.ended) / number, distinct=len(set(answered.texts)) / number,
        held_out_loss=answered.held_out_loss,
    )  # fmt: skip


def _compared(name: str, scores: Mapping[str, list[float]]) -> tuple[float, float, float | None]:
    """(mean, standard deviation, share of wins)."""
    own, others = scores[name], scores[_COMPARED_WITH]
    mean = math.fsum(own) / len(own)
    std = math.sqrt(math.fsum((each - mean) ** 2 for each in own) / len(own))
    wins = math.fsum((a > b) + 0.5 * (a == b) for a, b in zip(own, others, strict=True)) / len(own)
    return mean, std, None if name == _COMPARED_WITH else wins


def _judged(
    config: EndToEndConfig, judge: Engine, by: Calibration, source: ModelSource, chat: ChatModel
) -> dict[str, Any]:
    """The reward model on held-out pairs; empty without any."""
    run = config.reward
    data = comparison_data(
        run.data, tokenizer=chat.tokenizer, model=source.directory, seq_length=run.train.seq_length,
        seed=run.train.seed, multiple=1, only_pairs=False,
    )  # fmt: skip
    if data.valid is None:
        return {}
    groups = data.valid.responses(config.evaluation.num_pairs)
    flat = iter(_scores(judge, by, [ids for responses, _ in groups for ids in responses]))
    best, worst, differences = [], [], []
    for responses, ranks in groups:
        scored = sorted(zip(ranks, (next(flat) for _ in responses), strict=True), key=lambda each: each[0])
        best.append(scored[0][1])
        worst.append(scored[-1][1])
        differences += [better - worse for i, better in scored for j, worse in scored if i < j]
    return {
        "pairs": len(differences),
        "accuracy": sum((each > 0) + 0.5 * (each == 0) for each in differences) / len(differences),
        "calibration_error": calibration_error(differences),
        "chosen": math.fsum(best) / len(best),
        "rejected": math.fsum(worst) / len(worst),
        "differences": differences,
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """For JSON: None where a number is not finite."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
