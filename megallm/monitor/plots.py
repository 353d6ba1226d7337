"""The picture of a run: training and validation loss above, gradient norm and learning rate below.

Reads metrics files and nothing else, so it draws a run that is still going, or several runs over each other.
matplotlib is imported only here and only when something is drawn; the Agg canvas needs no display.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megallm.monitor.console import format_count
from megallm.monitor.metrics import Metrics, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PathLike = str | os.PathLike[str]

COLORS = ("#1f5fa8", "#c8641e", "#2c8a57", "#8a3f9c", "#b02a37", "#5b6470")
"""Distinct in print and for colour-blind readers, told apart by lightness too."""
_GRAY = "#666666"
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": "#333333",
    "xtick.color": _GRAY,
    "ytick.color": _GRAY,
    "axes.axisbelow": True,
}


def plot_loss(
    metrics: PathLike | Sequence[PathLike] | Mapping[str, PathLike],
    out_png: PathLike,
    *,
    title: str = "",
    loss_name: str = "loss (nats per token)",
) -> None:
    """Draw one or several runs to `out_png`. `metrics`: a file, several, or {name of the run: file}.

    Raises ValueError when no line of a file has a loss or when matplotlib is not installed, FileNotFoundError when a
    file is not there.
    """
    runs = {name: _Run(read_metrics(path), path) for name, path in _named(metrics).items()}
    with canvas(out_png, (7.2, 4.8)) as figure:
        _draw(figure, runs, title, loss_name)


@contextmanager
def drawing(warn: Callable[[str], None]) -> Iterator[None]:
    """Around what draws a finished run: `warn` is told why there is no picture, and the program goes on."""
    try:
        yield
    except ValueError as error:
        warn(f"no picture: {error}")


@contextmanager
def canvas(out_png: PathLike, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure of `size` inches in the house's style, written to `out_png` when the block ends. ValueError without
    matplotlib."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("drawing the loss curve needs matplotlib: pip install matplotlib") from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=180, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        Path(out_png).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out_png)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The centred mean of `values` [n] over up to `window` neighbours on each side, float64.

    Near the start the window shrinks on both sides, so that a steep start is kept; near the end only the side that has
    no neighbours does. A centred mean has no lag, which an exponential one has.
    """
    index = np.arange(len(values))
    before = np.minimum(index, window)
    after = np.minimum(len(values) - 1 - index, before)
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return (sums[index + after + 1] - sums[index - before]) / (before + after + 1)


class _Run:
    """The columns of one metrics file, each as (steps, values) without the lines that have no value."""

    def __init__(self, lines: list[Metrics], path: PathLike) -> None:
        self.lines = lines
        self.losses = self.column("loss")
        if not len(self.losses[0]):
            raise ValueError(f"{path} has no line with a loss: there is nothing to draw yet")

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        pairs = [(line["step"], line[name]) for line in self.lines if line.get(name) is not None]
        array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        return array[:, 0], array[:, 1]


def _named(metrics: PathLike | Sequence[PathLike] | Mapping[str, PathLike]) -> dict[str, PathLike]:
    if isinstance(metrics, Mapping):
        return dict(metrics)
    if isinstance(metrics, (str, os.PathLike)):
        return {"": metrics}
    paths = list(metrics)
    if not paths:
        raise ValueError("no metrics file was given: name one or more")
    stems = [Path(path).stem for path in paths]
    return {stem if stems.count(stem) == 1 else str(path): path for stem, path in zip(stems, paths, strict=True)}


def _draw(figure: Figure, runs: dict[str, _Run], title: str, loss_name: str) -> None:
    loss_axes, norm_axes = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [2.6, 1]})
    rate_axes = norm_axes.twinx()
    several = len(runs) > 1
    for index, (name, run) in enumerate(runs.items()):
        _draw_run(loss_axes, norm_axes, rate_axes, run, name if several else "", COLORS[index % len(COLORS)])
    _label(loss_axes, norm_axes, rate_axes)
    loss_axes.set_ylabel(loss_name)
    last_step = max(run.losses[0][-1] for run in runs.values())
    norm_axes.set_xlim(0, max(last_step * 1.01, 1.0))
    _tokens_on_top(loss_axes, next(iter(runs.values())))
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left", fontweight="bold", color="#222222")


def _draw_run(loss_axes: Axes, norm_axes: Axes, rate_axes: Axes, run: _Run, name: str, color: str) -> None:
    steps, losses = run.losses
    prefix = f"{name}: " if name else ""
    is_short = len(losses) < 40
    loss_axes.plot(steps, losses, color=color, alpha=1.0 if is_short else 0.35, linewidth=1.4 if is_short else 0.8,
                   label=f"{prefix}training" if is_short else None)  # fmt: skip
    if not is_short:
        loss_axes.plot(steps, smooth(losses, len(losses) // 50), color=color, linewidth=1.7, label=f"{prefix}training")
    valid_steps, valid_losses = run.column("valid_loss")
    if len(valid_steps):
        valid_color = color if name else COLORS[1]
        loss_axes.plot(valid_steps, valid_losses, "o", color=valid_color, markersize=5, markeredgecolor="white",
                       markeredgewidth=0.9, zorder=4, clip_on=False, label=f"{prefix}validation")  # fmt: skip
    norm_axes.plot(*run.column("grad_norm"), color=color if name else COLORS[5], linewidth=0.8)
    rate_color = color if name else COLORS[2]
    rate_axes.plot(*run.column("learning_rate"), color=rate_color, linewidth=1.4, linestyle=(0, (4, 2)))


def _label(loss_axes: Axes, norm_axes: Axes, rate_axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    loss_axes.spines["right"].set_visible(False)
    legend = loss_axes.legend(frameon=False, loc="upper right")
    for handle in legend.get_lines():
        handle.set_alpha(1.0)
    norm_axes.set_ylabel("gradient norm")
    norm_axes.set_ylim(bottom=0)
    norm_axes.yaxis.set_major_locator(MaxNLocator(3))
    norm_axes.set_xlabel("step")
    norm_axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    norm_axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    rate_axes.set_ylabel("learning rate\n(dashed)")
    rate_axes.set_ylim(bottom=0)
    rate_axes.yaxis.set_major_locator(MaxNLocator(3))
    rate_axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: _rate_text(rate)))
    rate_axes.grid(False)


def _tokens_on_top(axes: Axes, run: _Run) -> None:
    """Mark round token counts above the loss, each at the step that reached it."""
    from matplotlib.ticker import MaxNLocator

    steps, tokens = run.column("tokens")
    if not len(steps) or tokens[-1] <= 0:
        return
    counts = [
        count for count in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(0, tokens[-1]) if 0 <= count <= tokens[-1]
    ]
    places = np.interp(counts, np.concatenate([[0.0], tokens]), np.concatenate([[0.0], steps]))
    top: Any = axes.secondary_xaxis("top")
    top.set_xticks(places, labels=[_count_text(count) for count in counts])
    top.spines["top"].set_visible(False)
    top.tick_params(length=2)
    top.set_xlabel("tokens", fontsize=8)


def _rate_text(rate: float) -> str:
    mantissa, exponent = f"{rate:.1e}".split("e")
    return "0" if rate == 0 else f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _count_text(count: float) -> str:
    """format_count without the zeros that say nothing: 8k, 1.2M."""
    text = format_count(count)
    digits, unit = (text[:-1], text[-1]) if text[-1].isalpha() else (text, "")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + unit
