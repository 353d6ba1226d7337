"""Pictures of preferences: accuracy and margin over a run, and how far a reward model's differences can be believed.

A reward model says that the better of two responses wins with probability sigmoid(difference of their scores)
(Bradley-Terry). It is calibrated if, of all pairs to which it gives 80 %, it has 80 % in the right order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megallm.monitor.metrics import read_metrics
from megallm.monitor.plots import COLORS, PathLike, canvas, smooth

Floats = npt.NDArray[np.float64]
_PANELS = {"reward_accuracy": "pairs in the right order", "reward_margin": "margin, chosen - rejected"}


def plot_preferences(metrics: PathLike, out_png: PathLike, *, title: str = "") -> None:
    """Accuracy and margin of the steps of a metrics file, and of its validations. FileNotFoundError without the file,
    ValueError without matplotlib."""
    lines = read_metrics(metrics)
    with canvas(out_png, (7.2, 3.0)) as figure:
        for axes, (name, label) in zip(figure.subplots(1, 2), _PANELS.items(), strict=True):
            for prefix, words, color in (("", "training", COLORS[0]), ("valid_", "validation", COLORS[1])):
                points = [(line["step"], line[prefix + name]) for line in lines if line.get(prefix + name) is not None]
                steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
                if prefix:
                    axes.plot(steps, values, "o-", color=color, markersize=4, linewidth=1.0, label=words)
                else:
                    axes.plot(steps, smooth(values, len(values) // 20), color=color, linewidth=1.4, label=words)
            axes.set_ylabel(label)
            axes.set_xlabel("step")
            if name == "reward_accuracy":
                axes.set_ylim(0.0, 1.02)
                axes.axhline(0.5, color="#999999", linewidth=0.8, linestyle=":")
                axes.legend(frameon=False, loc="lower right")
        if title:
            figure.suptitle(title, fontsize=11, x=0.01, ha="left", fontweight="bold", color="#222222")


def reliability(differences: Sequence[float], bins: int = 8) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """(predicted, observed, pairs) of each bin of pairs, as equal in number as can be, in order of their confidence.

    differences: score of the better response less that of the worse. predicted: mean of sigmoid(|difference|), 0.5 to
    1; observed: the share of the bin's pairs in the right order (a tie is half of one).
    """
    values = np.array(differences, dtype=np.float64)
    parts = np.array_split(values[np.argsort(np.abs(values), kind="stable")], min(bins, len(values)))
    predicted = np.array([np.mean(1.0 / (1.0 + np.exp(-np.abs(part)))) for part in parts])
    observed = np.array([np.mean((part > 0) + 0.5 * (part == 0)) for part in parts])
    return predicted, observed, np.array([len(part) for part in parts])


def calibration_error(differences: Sequence[float], bins: int = 8) -> float:
    """The mean over pairs of |predicted - observed| of their bin (expected calibration error, arXiv 1706.04599)."""
    predicted, observed, pairs = reliability(differences, bins)
    return float(np.average(np.abs(predicted - observed), weights=pairs))


def plot_calibration(differences: Sequence[float], out_png: PathLike, *, title: str = "") -> None:
    """The reliability diagram of held-out pairs, beside the distribution of their differences."""
    predicted, observed, _ = reliability(differences)
    values = np.array(differences, dtype=np.float64)
    with canvas(out_png, (7.2, 3.0)) as figure:
        curve, histogram = figure.subplots(1, 2)
        curve.plot([0.5, 1.0], [0.5, 1.0], color="#999999", linewidth=0.8, linestyle=":", label="calibrated")
        curve.plot(predicted, observed, "o-", color=COLORS[0], markersize=4, linewidth=1.2, label="held-out pairs")
        curve.set_xlabel("probability that the model gives its choice")
        curve.set_ylabel("share in the right order")
        curve.set_ylim(min(0.45, float(observed.min()) - 0.02), 1.02)
        curve.legend(frameon=False, loc="lower right")
        limit = float(np.abs(values).max()) or 1.0
        edges = np.linspace(-limit, limit, 41)
        histogram.hist(values[values > 0], bins=edges, color=COLORS[0], label="right order")  # type: ignore[arg-type]
        histogram.hist(values[values <= 0], bins=edges, color=COLORS[1], label="wrong order")  # type: ignore[arg-type]
        histogram.set_xlabel("score of chosen - score of rejected")
        histogram.set_ylabel("pairs")
        histogram.legend(frameon=False, loc="upper left")
        if title:
            figure.suptitle(title, fontsize=11, x=0.01, ha="left", fontweight="bold", color="#222222")
