"""The picture of model states: what one rank holds on its device and on the host, for every ZeRO stage and offload.

matplotlib is imported only when something is drawn; the Agg canvas needs no display.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megallm.config.parallel import Offload
from megallm.monitor.plots import COLORS, STYLE, PathLike
from megallm.planner.memory import StateBytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CAUSES = ("parameters", "gradients", "optimizer")
_INK = "#333333"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One bar, or two: a ZeRO stage with an offload."""

    zero: int
    offload: Offload
    device: StateBytes
    host: StateBytes


def plot_placements(placements: Sequence[Placement], out_png: PathLike, *, title: str) -> None:
    """Draws stacked bars in GB (1e9 bytes), in the given order; ValueError when matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a picture needs matplotlib: pip install matplotlib") from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.2), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        _draw(axes, placements)
        figure.suptitle(title, fontsize=11, x=0.01, ha="left", fontweight="bold", color="#222222")
        Path(out_png).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out_png)


def _draw(axes: Axes, placements: Sequence[Placement]) -> None:
    place = 0.0
    ticks: list[tuple[float, str]] = []
    groups: dict[str, list[float]] = {}
    highest = max(max(float(p.device.total), float(p.host.total)) for p in placements) / 1e9
    for i, each in enumerate(placements):
        if i and each.offload != placements[i - 1].offload:
            place += 0.7
        has_host = each.host.total > 0
        places = (place - 0.21, place + 0.21) if has_host else (place,)
        for x, states, is_host in zip(places, (each.device, each.host), (False, True), strict=False):
            _bar(axes, x, states, is_host=is_host, room=0.012 * highest)
        ticks.append((place, f"ZeRO {each.zero}"))
        groups.setdefault(each.offload, []).append(place)
        place += 1.0
    axes.set_xticks([x for x, _ in ticks], labels=[text for _, text in ticks])
    axes.tick_params(axis="x", length=0)
    for offload, members in groups.items():
        text = "no offload" if offload == "none" else f"offload {offload}".replace("+", "\n+ ")
        axes.annotate(
            text, (sum(members) / len(members), 0), (0, -24), xycoords="data", textcoords="offset points", ha="center",
            va="top", color=_INK, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
    axes.set_xlim(-0.6, place)
    axes.set_ylim(0, 1.08 * highest)
    axes.set_ylabel("GB a rank")
    axes.grid(axis="x", visible=False)
    axes.spines["right"].set_visible(False)
    _legend(axes)


def _bar(axes: Axes, x: float, states: StateBytes, *, is_host: bool, room: float) -> None:
    bottom = 0.0
    for cause, color in zip(_CAUSES, COLORS, strict=False):
        height = float(getattr(states, cause)) / 1e9
        if not height:
            continue
        if is_host:
            axes.bar(x, height, 0.38, bottom, color="white", edgecolor=color, hatch="/////", linewidth=0.8)
        else:
            axes.bar(x, height, 0.38, bottom, color=color, edgecolor=color, linewidth=0.8)
        bottom += height
    text = f"{bottom:.3g}" if bottom >= 1 else f"{bottom:.2g}"
    axes.text(x, bottom + room, text, ha="center", va="bottom", fontsize=7.5, color=_INK)


def _legend(axes: Axes) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=color, label="optimizer state" if cause == "optimizer" else cause)
        for cause, color in zip(_CAUSES, COLORS, strict=False)
    ]
    handles += [
        Patch(facecolor="#8a8a8a", edgecolor="#8a8a8a", label="on the device"),
        Patch(facecolor="white", edgecolor="#8a8a8a", hatch="/////", label="on the host"),
    ]
    axes.legend(handles=handles, frameon=False, loc="upper right", ncols=2)
