"""The picture of a run of PPO or GRPO: what answers are worth, how far the policy has gone, and how it gets there."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from megallm.monitor.metrics import Metrics, read_metrics
from megallm.monitor.plots import COLORS, PathLike, canvas, smooth

_PANELS: dict[str, tuple[str, ...]] = {
    "score": ("score",),
    "KL of an answer (nats)": ("kl",),
    "tokens of an answer": ("response_length",),
    "entropy (nats a token)": ("entropy",),
    "clipped": ("clip_fraction", "value_clip_fraction"),
    "explained variance": ("explained_variance",),
    "groups that say nothing": ("silent_groups",),
    "share of the time": ("share_rollout", "share_score", "share_train"),
}
"""What is drawn, where the metrics have it; of several runs the first of a panel alone."""


def plot_rl(
    metrics: PathLike | Mapping[str, PathLike],
    out_png: PathLike,
    *,
    title: str = "",
    only: Collection[str] = tuple(_PANELS),
) -> None:
    """Draws a metrics file, or {name of the run: file}; `only` these panels. FileNotFoundError without a file,
    ValueError without matplotlib or numbers."""
    named = dict(metrics) if isinstance(metrics, Mapping) else {"": metrics}
    runs = {name: read_metrics(path) for name, path in named.items()}
    panels = {
        label: names for label, names in _PANELS.items()
        if label in only and any(_has(lines, name) for lines in runs.values() for name in names)
    }  # fmt: skip
    if "score" not in panels:
        raise ValueError(f"{', '.join(map(str, named.values()))}: no line with a score: there is nothing to draw yet")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with canvas(out_png, (3.2 * columns, 2.3 * rows)) as figure:
        all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (label, names) in zip(all_axes, panels.items(), strict=False):
            shown = names if len(runs) == 1 else names[:1]
            for number, (run, lines) in enumerate(runs.items()):
                is_held_out = label == "score" and _has(lines, "valid_score")
                for place, name in enumerate(shown):
                    steps, values = _column(lines, name)
                    words = _words(name) if len(shown) > 1 else run or ("sampled" if is_held_out else "")
                    color = COLORS[(number + place) % len(COLORS)]
                    axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
                    axes.plot(steps, smooth(values, len(values) // 25), color=color, linewidth=1.5, label=words)
                if is_held_out:
                    words = "held out, greedy" if len(runs) == 1 else ""
                    axes.plot(*_column(lines, "valid_score"), "o", color=COLORS[number % len(COLORS)], label=words)
            axes.set_xlabel("iteration", fontsize=8)
            axes.set_title(label, fontsize=9, loc="left", color="#333333")
            if axes.get_legend_handles_labels()[1] and (len(shown) > 1 or label == "score"):
                axes.legend(frameon=False, fontsize=7)
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
        if title:
            figure.suptitle(title, fontsize=11, x=0.01, ha="left", fontweight="bold", color="#222222")


def _has(lines: list[Metrics], name: str) -> bool:
    return any(line.get(name) is not None for line in lines)


def _column(lines: list[Metrics], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _words(name: str) -> str:
    return {"clip_fraction": "ratios", "value_clip_fraction": "values"}.get(name, name.removeprefix("share_"))
