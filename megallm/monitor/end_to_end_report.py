"""The report of a run from text to a policy: what its directory holds, as a page (report.py).

    base/ sft/ reward/ ppo/ dpo/     metrics.jsonl of each, stage.json where it is finished
    evaluation.json                  scores and answers of all models

A run that is not finished has a report of what is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megallm.monitor.charts import Bars, Line, bar_chart, line_chart
from megallm.monitor.console import format_count, format_duration
from megallm.monitor.metrics import Metrics, read_metrics
from megallm.monitor.preference_plots import reliability
from megallm.monitor.report import Chart, Page, Sample, Section, Table, Tile, html_page

TITLES = {
    "base": "Pretraining", "sft": "Supervised fine-tuning", "reward": "Reward model", "ppo": "PPO", "dpo": "DPO",
}  # fmt: skip
MODELS = {"base": "pretrained", "sft": "SFT", "ppo": "PPO", "dpo": "DPO"}
_SHARES = ("Ended by themselves", "Share of the time")
_TEXTS = {
    "base": "A transformer with new weights learns to continue text.",
    "sft": "It learns to answer: the loss is of the answers' tokens alone.",
    "reward": "A scalar head on the fine-tuned model learns which of two answers is better.",
    "ppo": "The fine-tuned model answers prompts, the reward model scores the answers, and the policy is moved towards "
    "the better ones, held to where it began by the KL.",
    "dpo": "Beside it, from the same fine-tuned model: the same preferences, without a reward model or samples.",
}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run's directory holds."""

    root: str
    metrics: Mapping[str, Sequence[Metrics]]
    """Lines of each stage that has begun."""
    stages: Mapping[str, Mapping[str, Any]]
    """stage.json of each that is finished."""
    evaluation: Mapping[str, Any]
    """Empty before it is done."""


def read_run(root: str | Path) -> RunRecord:
    """The record of the run in a directory. FileNotFoundError if no stage has begun there."""
    path = Path(root)
    metrics = {
        name: read_metrics(path / name / "metrics.jsonl")
        for name in TITLES
        if (path / name / "metrics.jsonl").is_file()
    }
    if not metrics:
        raise FileNotFoundError(f"{root} holds no run of examples/pipeline.py: run it first, or name its --save")
    stages = {name: _json(path / name / "stage.json") for name in TITLES if (path / name / "stage.json").is_file()}
    evaluation = _json(path / "evaluation.json") if (path / "evaluation.json").is_file() else {}
    return RunRecord(root=str(root), metrics=metrics, stages=stages, evaluation=evaluation)


def render(record: RunRecord) -> str:
    """The page."""
    makers = {"base": _base, "sft": _sft, "reward": _reward, "ppo": _ppo, "dpo": _dpo}
    sections = [each for each in (_results(record), _samples(record)) if each is not None]
    for name, make in makers.items():
        if name in record.metrics:
            charts = make(record.metrics[name], record)
            sections.append(Section(title=TITLES[name], text=_TEXTS[name], charts=charts))
    sections += [_times(record), _all_settings(record)]
    return html_page(Page(
        title="From text to a policy", lead=_lead(record), tiles=_tiles(record), sections=sections,
        foot=f"{record.root}, MegaLLM examples/pipeline.py",
    ))  # fmt: skip


def _lead(record: RunRecord) -> str:
    done = [TITLES[name] for name in TITLES if name in record.stages]
    words = "Pretraining, supervised fine-tuning, a reward model, PPO, and DPO beside it, by one model class in one job"
    layout, is_whole = _layout(record), len(done) == len(TITLES) and bool(record.evaluation)
    missing = "" if is_whole else " The run is not finished: this is what there is."
    return f"{words}{f' ({layout})' if layout else ''}.{missing}"


def _layout(record: RunRecord) -> str:
    for stage in record.stages.values():
        parallel = stage["settings"]["parallel"]
        return f"tp {parallel['tp']} x pp {parallel['pp']}"
    return ""


def _tiles(record: RunRecord) -> list[Tile]:
    found, models = [], record.evaluation.get("models", {})
    base = _last(record.metrics.get("base", ()), "valid_loss")
    if base is not None:
        found.append(Tile(value=f"{base:.2f}", name="pretraining loss", note="held-out text, nats per token"))
    if {"sft", "base"} <= set(models):
        before, after = models["base"]["held_out_loss"], models["sft"]["held_out_loss"]
        if before is not None and after is not None:
            found.append(Tile(value=f"{before:.2f} \u2192 {after:.2f}", name="loss of answers, SFT",
                              note="held out, nats per token"))  # fmt: skip
    judged = record.evaluation.get("reward") or {}
    if judged:
        note = f"{judged['pairs']} held-out pairs"
        found.append(Tile(value=f"{judged['accuracy']:.1%}", name="reward accuracy", note=note))
    if {"sft", "ppo"} <= set(models):
        before, after = models["sft"], models["ppo"]
        found.append(Tile(
            value=f"{_signed(before['sampled_score'])} \u2192 {_signed(after['sampled_score'])}",
            name="score of samples, SFT to PPO", note=f"wins {after['sampled_win_rate']:.0%} of held-out prompts",
        ))  # fmt: skip
    margin, accuracy = (_last(record.metrics.get("dpo", ()), f"valid_reward_{each}") for each in ("margin", "accuracy"))
    if margin is not None and accuracy is not None:
        note = f"held out, {accuracy:.1%} in the right order"
        found.append(Tile(value=_signed(margin), name="margin of DPO", note=note))
    return found


def _results(record: RunRecord) -> Section | None:
    found = record.evaluation
    if not found:
        return None
    head = ("model", "score", "wins over SFT", "score, sampled", "wins over SFT, sampled", "held-out loss", "tokens",
            "ended", "different")  # fmt: skip
    rows = [
        (
            MODELS[name], _spread(each["score"], each["score_std"]), _share(each["win_rate"]),
            _spread(each["sampled_score"], each["sampled_score_std"]), _share(each["sampled_win_rate"]),
            "" if each["held_out_loss"] is None else f"{each['held_out_loss']:.3f}", f"{each['length']:.1f}",
            f"{each['ended']:.0%}", f"{each['distinct']:.0%}",
        )
        for name, each in found["models"].items()
    ]  # fmt: skip
    judged, tables = found.get("reward") or {}, []
    tables.append(Table(
        head=head, rows=rows,
        note=f"Answers to {found['num_prompts']} held-out prompts, greedy and sampled as PPO samples: mean and "
        "deviation of the scores of the reward model that PPO was trained on, less its mean score of good training "
        "answers, so that 0 is a usual good answer. A tie is half a win. Held-out loss: nats per token of the data's "
        "own answers. Tokens, ended by themselves, different from one another: of the greedy answers.",
    ))  # fmt: skip
    if judged:
        tables.append(Table(
            head=("reward model", "held-out pairs"),
            rows=[
                ("pairs", f"{judged['pairs']:,}"), ("in the right order", f"{judged['accuracy']:.1%}"),
                ("calibration error", f"{judged['calibration_error']:.3f}"),
                ("mean score of the better answers", _signed(judged["chosen"])),
                ("mean score of the worse answers", _signed(judged["rejected"])),
            ],
        ))  # fmt: skip
    return Section(title="Results", tables=tables)


def _samples(record: RunRecord) -> Section | None:
    if not record.evaluation.get("samples"):
        return None
    samples = []
    for each in record.evaluation["samples"]:
        scores = [answer["score"] for answer in each["answers"].values()]
        best, worst = max(scores), min(scores)
        samples.append(Sample(prompt=each["prompt"], answers=[
            (MODELS[name], answer["text"], _signed(answer["score"]), answer["score"] == best > worst)
            for name, answer in each["answers"].items()
        ]))  # fmt: skip
    return Section(
        title="Before and after", samples=samples,
        text="The same held-out prompts, each answered greedily by the model of every stage, with the reward model's "
        "score; the best one is marked.",
    )


def _base(lines: Sequence[Metrics], record: RunRecord) -> list[Chart]:
    return [
        Chart(title="Loss", svg=_losses(lines), note=_note(lines)),
        Chart(title="Gradient norm", svg=line_chart([_line(lines, "grad_norm")], y_limits=(0.0, None))),
        Chart(title="Learning rate", svg=line_chart([_line(lines, "learning_rate", exact=True)], y_limits=(0.0, None))),
    ]


def _sft(lines: Sequence[Metrics], record: RunRecord) -> list[Chart]:
    return [
        Chart(title="Loss of answers", svg=_losses(lines), note=_note(lines)),
        Chart(title="Gradient norm", svg=line_chart([_line(lines, "grad_norm")], y_limits=(0.0, None))),
    ]


def _reward(lines: Sequence[Metrics], record: RunRecord) -> list[Chart]:
    charts = [
        Chart(title="Pairs in the right order", svg=line_chart(
            [_line(lines, "reward_accuracy", "training"),
             _line(lines, "valid_reward_accuracy", "held out", marks=True)],
            y_limits=(0.4, 1.0), level=0.5), note="0.5 is chance"),
        Chart(title="Margin, better less worse", svg=line_chart(
            [_line(lines, "reward_margin", "training"), _line(lines, "valid_reward_margin", "held out", marks=True)])),
        Chart(title="Loss", svg=_losses(lines, y_name="nats per prompt")),
    ]  # fmt: skip
    differences = (record.evaluation.get("reward") or {}).get("differences") or []
    if differences:
        predicted, observed, _ = reliability(differences)
        charts.append(Chart(
            title="Calibration", note="On the diagonal it is as sure as it is right",
            svg=line_chart([Line("calibrated", [0.5, 1.0], [0.5, 1.0], dashed=True, color=1),
                            Line("held-out pairs", predicted.tolist(), observed.tolist(), marks=True, color=0)],
                           x_name="probability that the model gives its choice", y_name="share in the right order"),
        ))  # fmt: skip
        charts.append(Chart(title="Difference of scores", svg=_histogram(differences)))
    return charts


def _ppo(lines: Sequence[Metrics], record: RunRecord) -> list[Chart]:
    panels = {
        "Score of sampled answers": (("score", "score"),),
        "KL to SFT": (("kl", "nats an answer"),),
        "Entropy": (("entropy", "nats a token"),),
        "Length of answers": (("response_length", "tokens"),),
        "Ended by themselves": (("ended", "share"),),
        "Explained variance of the critic": (("explained_variance", "share"),),
        "Clipped": (("clip_fraction", "policy"), ("value_clip_fraction", "values")),
        "Loss of the critic": (("value_loss", "squared score"),),
        "Share of the time": (("share_rollout", "rollout"), ("share_score", "score"), ("share_train", "train")),
    }
    charts = []
    for title, names in panels.items():
        series = [_line(lines, name, words) for name, words in names]
        if not any(len(each.x) for each in series):
            continue
        level = 0.0 if title.startswith(("Score", "Explained")) else None
        lowest = 0.0 if title in ("KL to SFT", "Length of answers", "Clipped", *_SHARES) else None
        limits = (lowest, 1.0 if title in _SHARES else None)
        note = "0: a usual good answer of the data" if title.startswith("Score") else ""
        y_name = names[0][1] if len(names) == 1 else ""
        svg = line_chart(series, x_name="iteration", y_name=y_name, y_limits=limits, level=level)
        charts.append(Chart(title=title, note=note, svg=svg))
    return charts


def _dpo(lines: Sequence[Metrics], record: RunRecord) -> list[Chart]:
    def both(name: str, *, limits: tuple[float | None, float | None] = (None, None), level: float | None = None) -> str:
        return line_chart(
            [_line(lines, name, "training"), _line(lines, f"valid_{name}", "held out", marks=True)], y_limits=limits,
            level=level,
        )  # fmt: skip

    chosen = [_line(lines, "logprob_chosen", "chosen"), _line(lines, "logprob_rejected", "rejected")]
    return [
        Chart(title="Margin of implicit rewards", svg=both("reward_margin", level=0.0)),
        Chart(title="Pairs in the right order", svg=both("reward_accuracy", limits=(0.4, 1), level=0.5)),
        Chart(title="Log-probability of answers", svg=line_chart(chosen, y_name="nats an answer")),
        Chart(title="Loss", svg=_losses(lines, y_name="nats per prompt")),
    ]


def _times(record: RunRecord) -> Section:
    rows, total = [], 0.0
    for name, title in TITLES.items():
        done, lines = record.stages.get(name), record.metrics.get(name, ())
        if not lines:
            continue
        seconds = float(done["seconds"]) if done else 0.0
        total += seconds
        spent = format_duration(seconds) if done else "not finished"
        if done and done["resumed_from"]:
            spent += f" (from step {done['resumed_from']} on)"
        tokens = _last(lines, "tokens")
        rows.append((title, f"{lines[-1]['step']:,}", format_count(tokens) if tokens else "", spent))
    if record.evaluation:
        seconds = float(record.evaluation.get("seconds", 0.0))
        total += seconds
        rows.append(("Evaluation", "", "", format_duration(seconds)))
    rows.append(("Sum", "", "", format_duration(total)))
    tables = [Table(head=("stage", "steps", "tokens trained on", "time"), rows=rows)]
    if machine := record.evaluation.get("machine"):
        tables.append(Table(head=("machine", ""), rows=[(str(name), str(value)) for name, value in machine.items()]))
    return Section(
        title="Times and machine", tables=tables, text="Reading and preparing data is part of each stage's time."
    )


def _all_settings(record: RunRecord) -> Section:
    found = {}
    for name, done in record.stages.items():
        found[TITLES[name]] = [(key, _value(value)) for key, value in _flat(done["settings"])]
    if "of" in record.evaluation:
        found["Evaluation"] = [(key, _value(value)) for key, value in _flat(record.evaluation["of"])]
    return Section(title="Settings", settings=found)


def _losses(lines: Sequence[Metrics], *, y_name: str = "nats per token") -> str:
    return line_chart(
        [_line(lines, "loss", "training"), _line(lines, "valid_loss", "held out", marks=True)], y_name=y_name
    )


def _histogram(differences: Sequence[float]) -> str:
    limit = max(abs(each) for each in differences) or 1.0
    edges = np.linspace(-limit, limit, 33)
    values = np.array(differences)
    counts = [np.histogram(values[keep], edges)[0].tolist() for keep in (values > 0, values <= 0)]
    return bar_chart(
        Bars(edges=edges.tolist(), counts=counts, names=("right order", "wrong order")),
        x_name="score of the better answer less that of the worse", y_name="pairs",
    )  # fmt: skip


def _line(
    lines: Sequence[Metrics], name: str, words: str = "", *, marks: bool = False, exact: bool = False
) -> Line:
    points = [(float(line["step"]), float(line[name])) for line in lines if line.get(name) is not None]
    return Line(words or name, [x for x, _ in points], [y for _, y in points], marks=marks, exact=exact)


def _last(lines: Sequence[Metrics], name: str) -> float | None:
    return next((float(line[name]) for line in reversed(lines) if line.get(name) is not None), None)


def _note(lines: Sequence[Metrics]) -> str:
    valid = _last(lines, "valid_loss")
    return "" if valid is None else f"held out, the last one: {valid:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\u2212")


def _spread(mean: float, std: float) -> str:
    return f"{_signed(mean)} \u00b1 {std:.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _flat(values: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{path}.{key}" if path else key
        found += _flat(value, name) if isinstance(value, Mapping) else [(name, value)]
    return found


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "empty"
    return "auto" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and run the pipeline again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: remove it, and run the pipeline again")
    return found
