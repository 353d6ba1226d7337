"""Pictures of schedules: monospace text for a terminal, PNG (matplotlib, imported only then) for a report.

    rank 0  0  1  .  0'--- .  1'---
    rank 1  .  0  0'--- 1  1'--- .

0 is the forward of microbatch 0, 0' its backward, a dot is idle. With several chunks on a rank a letter says which:
a0 is microbatch 0 in the first chunk, b0 in the second.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megallm.pipeline.actions import Action
from megallm.pipeline.schedule import Schedule
from megallm.pipeline.simulate import Simulation, Span, simulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORWARD = (0.13, 0.40, 0.67)  # blue
_BACKWARD = (0.85, 0.42, 0.11)  # orange
_INK, _GREY, _IDLE = "#1f2933", "#6b7785", "#eceff2"
_LABEL_INCH_PER_CHAR = 0.085


def format_text(plan: Schedule | Simulation, *, max_width: int | None = None) -> str:
    """The picture as text, one row a rank, ending without a newline.

    A Schedule is drawn slot by slot, a Simulation to scale (the shortest action is one cell wide). A picture wider than
    max_width characters goes on in further blocks below.
    """
    schedule = plan.schedule if isinstance(plan, Simulation) else plan
    spans, unit = _slot_spans(plan) if isinstance(plan, Schedule) else _time_spans(plan)
    cell = 1 + max((len(_label(schedule, span.action)) for span in spans), default=1)
    rows = [_row(schedule, [span for span in spans if span.rank == rank], unit, cell) for rank in _ranks(schedule)]
    width = max(len(row) for row in rows)
    rows = [row + ("." + " " * (cell - 1)) * ((width - len(row)) // cell) for row in rows]
    name_width = len(f"rank {schedule.num_ranks - 1}") + 2
    block = width if max_width is None else max(cell, (max_width - name_width) // cell * cell)
    lines = [f"{_headline(schedule)}    {_legend_text(schedule)}"]
    for start in range(0, width, max(block, 1)):
        if start:
            lines.append("")
        for rank, row in enumerate(rows):
            lines.append(f"{f'rank {rank}':<{name_width}}{row[start : start + block]}".rstrip())
    return "\n".join(lines)


def save_png(plan: Schedule | Simulation, path: str | Path, *, title: str | None = None, dpi: int = 150) -> None:
    """Writes the timeline as a PNG: blue forwards, orange backwards, a shade per chunk, the microbatch in each box.

    A Schedule is simulated with the default times. ValueError if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a PNG of a schedule needs matplotlib: pip install matplotlib") from error
    simulation = simulate(plan) if isinstance(plan, Schedule) else plan
    schedule = simulation.schedule
    shortest = min((span.end - span.start for span in simulation.timeline if span.end > span.start), default=1.0)
    inches = min(max(0.24 * simulation.total_time / shortest, 7.0), 30.0)
    height = 0.42 * schedule.num_ranks
    # The Figure is used without pyplot: no global state, and a PNG is always drawn by Agg. Margins are in inches.
    left, right, top, bottom = 0.85, 1.05, 0.75, 0.82
    size = (inches + left + right, height + top + bottom)
    figure = Figure(figsize=size, facecolor="white")
    axes = figure.add_axes((left / size[0], bottom / size[1], inches / size[0], height / size[1]))
    _draw_bars(axes, simulation, inches / simulation.total_time)
    _draw_frame(axes, simulation)
    _draw_legend(figure, schedule, left / size[0], 0.08 / size[1])
    heading = title if title is not None else _headline(schedule)
    figure.text(left / size[0], 1 - 0.30 / size[1], heading, size=13, weight="bold", color=_INK)
    facts = f"bubble {100 * simulation.bubble:.1f} %     time {simulation.total_time:g}"
    figure.text(left / size[0], 1 - 0.55 / size[1], facts, size=10, color=_GREY)
    figure.savefig(path, dpi=dpi, format="png")


def _ranks(schedule: Schedule) -> range:
    return range(schedule.num_ranks)


def _num_chunks(schedule: Schedule) -> int:
    return max(len(schedule.stages_of(rank)) for rank in _ranks(schedule))


def _chunk(schedule: Schedule, action: Action) -> int:
    return schedule.stages_of(schedule.stage_to_rank[action.stage]).index(action.stage)


def _chunk_name(chunk: int) -> str:
    return chr(ord("a") + chunk) if chunk < 26 else f"{chunk}:"


def _label(schedule: Schedule, action: Action) -> str:
    chunk = _chunk_name(_chunk(schedule, action)) if _num_chunks(schedule) > 1 else ""
    return f"{chunk}{action.microbatch}{'' if action.kind == 'F' else chr(39)}"


def _headline(schedule: Schedule) -> str:
    chunks = _num_chunks(schedule)
    virtual = f", {chunks} virtual stages" if chunks > 1 else ""
    plural = "" if schedule.num_microbatches == 1 else "es"
    return f"{schedule.name}: pp {schedule.num_ranks}{virtual}, {schedule.num_microbatches} microbatch{plural}"


def _legend_text(schedule: Schedule) -> str:
    chunks = _num_chunks(schedule)
    if chunks == 1:
        return "(0 forward, 0' backward, . idle)"
    return f"(a0 forward, a0' backward of chunk a; chunks a to {_chunk_name(chunks - 1)}; . idle)"


def _slot_spans(schedule: Schedule) -> tuple[list[Span], float]:
    spans = [
        Span(rank, action, float(slot), float(slot + 1))
        for rank, row in enumerate(schedule.grid)
        for slot, action in enumerate(row)
        if action is not None
    ]
    return spans, 1.0


def _time_spans(simulation: Simulation) -> tuple[list[Span], float]:
    spans = [span for span in simulation.timeline if span.end > span.start]
    return spans, min((span.end - span.start for span in spans), default=1.0)


def _row(schedule: Schedule, spans: list[Span], unit: float, cell: int) -> str:
    """One rank's row: each span's label, dashes if it takes more than a cell; a dot for every idle cell."""
    row = ""
    for span in spans:
        start, end = round(span.start / unit * cell), round(span.end / unit * cell)
        row += "".join("." if column % cell == 0 and column + 1 < start else " " for column in range(len(row), start))
        fill = "-" if end - start > cell else " "
        row += _label(schedule, span.action).ljust(end - start - 1, fill)[: end - start - 1] + " "
    return row + " " * (-len(row) % cell)


def _shade(schedule: Schedule, kind: str, chunk: int) -> tuple[float, float, float]:
    """The kind's hue, mixed with white: the first chunk is the darkest."""
    red, green, blue = _FORWARD if kind == "F" else _BACKWARD
    white = 0.6 * chunk / max(1, _num_chunks(schedule) - 1)
    return (red + (1 - red) * white, green + (1 - green) * white, blue + (1 - blue) * white)


def _text_colour(shade: tuple[float, float, float]) -> str:
    red, green, blue = shade
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.6 else _INK


def _draw_bars(axes: Axes, simulation: Simulation, inch_per_time: float) -> None:
    schedule = simulation.schedule
    for rank in _ranks(schedule):
        axes.barh(rank, simulation.total_time, height=0.86, color=_IDLE, linewidth=0)
    # All boxes of one width are labelled or none, and the white edges stay thin beside the boxes.
    label_width = (_LABEL_INCH_PER_CHAR * len(str(schedule.num_microbatches - 1)) + 0.03) / inch_per_time
    shortest = min((span.end - span.start for span in simulation.timeline), default=0.0)
    edge = min(0.8, 0.12 * 72 * inch_per_time * shortest)
    for span in simulation.timeline:
        width = span.end - span.start
        shade = _shade(schedule, span.action.kind, _chunk(schedule, span.action))
        axes.barh(span.rank, width, left=span.start, height=0.86, color=shade, edgecolor="white", linewidth=edge)
        if width >= label_width:
            middle, text, colour = (span.start + span.end) / 2, str(span.action.microbatch), _text_colour(shade)
            axes.text(middle, span.rank, text, ha="center", va="center_baseline", size=8, color=colour)


def _draw_frame(axes: Axes, simulation: Simulation) -> None:
    schedule = simulation.schedule
    axes.set_xlim(0, simulation.total_time)
    axes.set_ylim(schedule.num_ranks - 0.5, -0.5)
    axes.set_yticks(list(_ranks(schedule)), [f"rank {rank}" for rank in _ranks(schedule)])
    axes.set_xlabel("time", color=_GREY, size=9)
    axes.tick_params(length=0, labelsize=9, labelcolor=_INK)
    axes.tick_params(axis="x", length=3, color=_GREY, labelcolor=_GREY)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c5ccd3")
    for rank, peak in enumerate(simulation.peak_live_microbatches):
        _write_right(axes, f"{peak:.4g}", rank, 0, size=9, colour=_INK)
    _write_right(axes, "peak live\nmicrobatches", -0.5, 4, size=8, colour=_GREY)


def _write_right(axes: Axes, text: str, row: float, points_above: float, *, size: int, colour: str) -> None:
    """Text to the right of the axes at this row; above it if points_above > 0."""
    axes.annotate(
        text,
        (1.0, row),
        (10, points_above),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        annotation_clip=False,
        ha="left",
        va="bottom" if points_above else "center",
        size=size,
        color=colour,
    )


def _draw_legend(figure: Figure, schedule: Schedule, x: float, y: float) -> None:
    from matplotlib.patches import Patch

    chunks = range(_num_chunks(schedule))
    handles = []
    for kind, word in (("F", "forward"), ("B", "backward")):
        # Many chunks: the ends of the shading say enough.
        for chunk in chunks if len(chunks) <= 4 else (chunks[0], chunks[-1]):
            label = word if len(chunks) == 1 else f"{word} chunk {chunk}"
            handles.append(Patch(color=_shade(schedule, kind, chunk), label=label))
    handles.append(Patch(color=_IDLE, label="idle"))
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(x, y),
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        borderaxespad=0,
        borderpad=0,
        handlelength=1.2,
        handleheight=1.0,
        columnspacing=1.4,
    )
