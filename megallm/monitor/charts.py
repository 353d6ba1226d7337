"""Line charts as SVG text: they scale with the page and take its colours, and need no library to draw or to look at.

    svg = line_chart([Line("training", steps, losses), Line("validation", ..., marks=True)], y_name="nats per token")

Colours are CSS variables (--series-0, ..., --ink, --faint, --grid) of the page that the text is put into.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megallm.monitor.plots import smooth

WIDTH, HEIGHT = 420.0, 230.0
"""Of the drawing, in its own units; the page decides how large that is."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 14.0, 12.0, 38.0
_MOST_POINTS = 400
_SMOOTH_FROM = 40
"""Points from which a noisy line is drawn faintly, and its mean over neighbours on top."""
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Line:
    """A series."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marks: bool = False
    """Points joined by a thin line, never smoothed: few values, each measured."""
    dashed: bool = False
    exact: bool = False
    """Never smoothed: it has no noise."""
    color: int | None = None
    """Which of the page's colours; None = its place among the lines."""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A histogram: two counts to each bin."""

    edges: Sequence[float]
    counts: Sequence[Sequence[float]]
    """Of each name, stacked."""
    names: Sequence[str] = field(default_factory=tuple)


def line_chart(
    lines: Sequence[Line],
    *,
    x_name: str = "step",
    y_name: str = "",
    y_limits: tuple[float | None, float | None] = (None, None),
    level: float | None = None,
) -> str:
    """An <svg>. `y_limits`: what the axis reaches at least. `level`: a dotted line across."""
    known = [(i, line) for i, line in enumerate(lines) if len(line.x)]
    xs = [x for _, line in known for x in line.x]
    ys = [y for _, line in known for y in line.y if math.isfinite(y)]
    ys += [y for y in (*y_limits, level) if y is not None]
    if not xs or not ys:
        return _nothing()
    x_axis = _Axis.over(xs, _LEFT, WIDTH - _RIGHT, whole=all(float(x).is_integer() for x in xs))
    y_axis = _Axis.over(ys, HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(x_axis, y_axis, x_name, y_name)]
    if level is not None:
        y = y_axis.place(level)
        parts.append(f'<line class="level" x1="{_LEFT:.1f}" x2="{WIDTH - _RIGHT:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts += [_drawn(line, i if line.color is None else line.color, x_axis, y_axis) for i, line in known]
    names = [(line.name, i if line.color is None else line.color) for i, line in known]
    return _svg(parts, y_name or "chart") + _legend(names if len(names) > 1 else [])


def bar_chart(bars: Bars, *, x_name: str, y_name: str) -> str:
    """An <svg> of stacked bars."""
    totals = [sum(each) for each in zip(*bars.counts, strict=True)]
    if not totals or not sum(totals):
        return _nothing()
    x_axis = _Axis.over(list(bars.edges), _LEFT, WIDTH - _RIGHT)
    y_axis = _Axis.over([0.0, *totals], HEIGHT - _BOTTOM, _TOP)
    parts, below = [_frame(x_axis, y_axis, x_name, y_name)], [0.0] * len(totals)
    for color, counts in enumerate(bars.counts):
        for i, count in enumerate(counts):
            left, right = x_axis.place(bars.edges[i]), x_axis.place(bars.edges[i + 1])
            bottom, top = y_axis.place(below[i]), y_axis.place(below[i] + count)
            below[i] += count
            if count:
                size = f'width="{max(right - left - 0.8, 0.5):.1f}" height="{max(bottom - top, 0.0):.1f}"'
                box = f'x="{left + 0.4:.1f}" y="{top:.1f}" {size}'
                parts.append(f'<rect class="f{color}" {box}><title>{count:g}</title></rect>')
    return _svg(parts, y_name) + _legend(list(zip(bars.names, range(len(bars.names)), strict=True)))


@dataclass(frozen=True)
class _Axis:
    """Values to places."""

    low: float
    high: float
    first: float
    last: float
    """Places of low and high."""
    ticks: tuple[float, ...]

    @staticmethod
    def over(values: Sequence[float], first: float, last: float, *, whole: bool = False) -> _Axis:
        """One that holds them; `whole`: begins and ends at them, with ticks at whole numbers."""
        low, high = min(values), max(values)
        if high - low < 1e-12 * max(abs(low), abs(high), 1e-9):
            low, high = low - (0.5 if not whole else 0.0), high + (0.5 if not whole else 1.0)
        step = _round_step((high - low) / (6 if whole else 4), whole=whole)
        if not whole:
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        begin, end = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return _Axis(low, high, first, last, tuple(i * step for i in range(begin, end + 1)))

    def place(self, value: float) -> float:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)


def _round_step(step: float, *, whole: bool) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    found = next(each * power for each in _STEPS if each * power >= step * (1 - 1e-9))
    return max(1.0, float(math.ceil(found))) if whole else found


def _frame(x_axis: _Axis, y_axis: _Axis, x_name: str, y_name: str) -> str:
    parts = []
    for tick in y_axis.ticks:
        y = y_axis.place(tick)
        parts.append(f'<line class="grid" x1="{_LEFT:.1f}" x2="{WIDTH - _RIGHT:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_axis.ticks:
        x = x_axis.place(tick)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 16:.1f}" text-anchor="middle">{number(tick)}</text>')
    place = f'x="{(_LEFT + WIDTH - _RIGHT) / 2:.1f}" y="{HEIGHT - 4:.1f}"'
    parts.append(f'<text class="name" {place} text-anchor="middle">{_text(x_name)}</text>')
    up = (_TOP + HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text class="name" transform="translate(12 {up:.1f}) rotate(-90)" text-anchor="middle">{_text(y_name)}</text>'
    )
    return "".join(parts)


def _drawn(line: Line, color: int, x_axis: _Axis, y_axis: _Axis) -> str:
    pairs = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""

    def path(values: Sequence[float], extra: str) -> str:
        every = max(1, len(xs) // _MOST_POINTS)
        kept = sorted({*range(0, len(xs), every), len(xs) - 1})
        points = " ".join(f"{x_axis.place(xs[i]):.1f},{y_axis.place(values[i]):.1f}" for i in kept)
        return f'<polyline class="s{color}{extra}"{dash} points="{points}"/>'

    if not pairs:
        return ""
    if line.marks or len(xs) == 1:
        dots = "".join(
            f'<circle class="f{color}" cx="{x_axis.place(x):.1f}" cy="{y_axis.place(y):.1f}" r="3.2">'
            f"<title>{_text(line.name)} {number(x)}: {y:.4g}</title></circle>"
            for x, y in pairs
        )
        return path(ys, " thin") + dots
    if line.exact or len(xs) < _SMOOTH_FROM:
        return path(ys, "")
    return path(ys, " faint") + path(smooth(np.array(ys), len(ys) // 30).tolist(), "")


def number(value: float) -> str:
    """Short: 0, 0.05, 12, 3.5, 1,200, 2e-5."""
    if abs(value) < 1e-12:
        return "0"
    if abs(value) < 0.01:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}") if value < 0 else text


def _legend(names: Sequence[tuple[str, int]]) -> str:
    if not names:
        return ""
    items = "".join(f'<span><i class="b{color}"></i>{_text(name)}</span>' for name, color in names)
    return f'<div class="legend">{items}</div>'


def _svg(parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{_text(label)}">{"".join(parts)}</svg>'
    )


def _nothing() -> str:
    return '<p class="nothing">nothing was measured</p>'


def _text(text: str) -> str:
    return html.escape(text, quote=True)
