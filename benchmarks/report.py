"""Makes results/REPORT.md from results/*.csv, and pictures of the GPU's rows: `python benchmarks/report.py`.

The same files give the same text: of several measurements of one thing on one GPU the last row of the file counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]

from gpu_parts.bars import judge, time_us  # noqa: E402  (the paths come first)
from gpu_parts.rows import UNKNOWN, read_csv  # noqa: E402

TextRow = dict[str, str]
DIRECTIONS = ("fwd", "bwd", "both", "step")


def main(argv: list[str] | None = None) -> int:
    """Writes the report; exit code 0 also where there is nothing to report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=str(HERE / "results"), help="folder of the CSV files")
    args = parser.parse_args(argv)
    folder = Path(args.results)
    parts = ["# Benchmark results", "Made by `python benchmarks/report.py` from the CSV files beside it."]
    for gpu, rows in by_gpu(read_csv(folder / "gpu.csv")).items():
        pictures = draw(rows, folder / "img", gpu)
        parts += gpu_part(gpu, rows, [path.relative_to(folder).as_posix() for path in pictures])
    parts += cpu_part(read_csv(folder / "cpu.csv"))
    (folder / "REPORT.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"wrote {folder / 'REPORT.md'}")
    return 0


def by_gpu(rows: Sequence[TextRow]) -> dict[str, list[TextRow]]:
    """{gpu: the last row of each measurement}, in the order they first came; no interpreted runs, no nameless GPUs."""
    found: dict[str, dict[tuple[str, ...], TextRow]] = {}
    for each in rows:
        if each["gpu"].startswith("cpu") or each["gpu"] in ("", UNKNOWN):
            continue
        key = tuple(each[name] for name in ("section", "op", "case", "dtype", "contender", "direction"))
        found.setdefault(each["gpu"], {})[key] = each
    return {gpu: list(last.values()) for gpu, last in found.items()}


def gpu_part(gpu: str, rows: Sequence[TextRow], pictures: Sequence[str]) -> list[str]:
    """Demands, ceilings, one table an op, training steps, checks."""
    facts = sorted({(r["torch"], r["triton"], r["driver"], r["commit"], r["date"]) for r in rows})
    told = "; ".join(f"torch {t}, triton {tr}, driver {d}, commit {c}, {day}" for t, tr, d, c, day in facts)
    parts = [f"## {gpu}", told, "### Demands", _table(
        ("demand", "bar", "measured", "verdict"),
        [(v.what, v.demanded, v.measured or "-", v.word) for v in judge(rows)],
    )]  # fmt: skip
    ceilings = [r for r in rows if r["section"] == "ceilings"]
    if ceilings:
        reached = [(r["op"], r["case"], _rate(r)) for r in ceilings]
        parts += ["### Ceilings", _table(("what", "size", "reached"), reached)]
    timed = [r for r in rows if r["section"] not in ("ceilings", "check") and r["op"] not in ("train_step", "")]
    for op in dict.fromkeys(r["op"] for r in timed):
        parts += [f"### {op}", _op_table([r for r in timed if r["op"] == op])]
    steps = [r for r in rows if r["op"] == "train_step" and r["section"] != "check"]
    if steps:
        parts += ["### Training step", _train_table(steps)]
    parts += [f"![{path}]({path})" for path in pictures]
    checks = [r for r in rows if r["section"] == "check"]
    if checks:
        good = sum(r["status"] == "ok" for r in checks)
        parts += ["### Correctness", f"{good} of {len(checks)} checks passed."]
        bad = [(r["op"], r["case"], r["status"], r["note"]) for r in checks if r["status"] != "ok"]
        parts += [_table(("op", "case", "status", "why"), bad)] if bad else []
    return parts


def cpu_part(rows: Sequence[TextRow]) -> list[str]:
    """The comparisons of cpu.py, the last of each."""
    last = {(r["what"], r["peer"]): r for r in rows}
    if not last:
        return []
    lines = [
        (r["what"], r["peer"], r["ratio_p50"], f"{r['ratio_p20']} - {r['ratio_p80']}", r["commit"], r["cpu"])
        for r in last.values()
    ]
    header = ("what", "peer", "ours / peer", "20th - 80th percentile", "commit", "cpu")
    return ["## CPU training speed", "Below 1, ours is faster.", _table(header, lines)]


def _op_table(rows: Sequence[TextRow]) -> str:
    """Microseconds (graph replay where there is one) and the share of the ceiling, a line for each contender."""
    lines: dict[tuple[str, str], dict[str, TextRow]] = {}
    for each in rows:
        lines.setdefault((each["case"], each["contender"]), {})[each["direction"]] = each
    used = [d for d in DIRECTIONS if any(d in cells for cells in lines.values())]
    result = []
    for (case, contender), cells in lines.items():
        shown = [_cell(cells[d]) if d in cells else "-" for d in used]
        some = next(iter(cells.values()))
        why = "" if some["status"] == "ok" else f"{some['status']}: {some['note']}"
        main = cells.get("both") or cells.get("step") or some
        result.append((case, contender, *shown, main["host_us"], main["peak_mib"], why))
    return _table(("case", "contender", *(f"{d}, us" for d in used), "host us", "MiB", "note"), result)


def _train_table(rows: Sequence[TextRow]) -> str:
    lines = [
        (
            r["case"], r["contender"], r["tokens_per_s"] or r["status"], _percent(r["mfu"]),
            f"{float(r['peak_mib']) / 1024:.1f}" if r["peak_mib"] else "-", r["loss"], r["note"],
        )
        for r in sorted(rows, key=lambda r: r["case"])
    ]  # fmt: skip
    return _table(("model", "contender", "tokens/s", "MFU", "peak GiB", "first loss", "note"), lines)


def _cell(each: TextRow) -> str:
    time = time_us(each)
    if each["status"] != "ok" or time is None:
        return each["status"]
    share = f" ({_percent(each['of_ceiling'])})" if each["of_ceiling"] else ""
    return f"{time:.1f}{share}"


def _rate(each: TextRow) -> str:
    if each["gb_per_s"]:
        return f"{float(each['gb_per_s']):.0f} GB/s"
    return f"{float(each['tflop_per_s'] or 0):.0f} TFLOP/s"


def _percent(share: str) -> str:
    return f"{100 * float(share):.1f} %" if share else "-"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, lines)])


def draw(rows: Sequence[TextRow], folder: Path, gpu: str) -> list[Path]:
    """Bars of the share of each ceiling for our kernels and their peers, and attention by length; none without rows."""
    shares = [r for r in rows if r["status"] == "ok" and r["of_ceiling"] and r["section"] != "ceilings"]
    if not shares:
        return []
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    name = gpu.lower().replace(" ", "-")
    paths = []
    bars = [r for r in shares if r["gb_per_s"] and r["direction"] in ("both", "step")]
    if bars:
        paths.append(folder / f"{name}-bandwidth.png")
        _bars(Figure(figsize=(9, 1 + 0.22 * len(bars))), bars, gpu, paths[-1])
    plain = [r for r in shares if r["op"] == "attention" and "window" not in r["case"]]
    curves = [r for r in plain if r["case"].startswith("D 128 S ")]
    if curves:
        paths.append(folder / f"{name}-attention.png")
        _curves(Figure(figsize=(9, 4)), curves, gpu, paths[-1])
    return paths


def _bars(figure, rows: Sequence[TextRow], gpu: str, path: Path) -> None:  # type: ignore[no-untyped-def]
    axes = figure.add_subplot()
    labels = [f"{r['op']} {r['case']}: {r['contender']}" for r in rows]
    colors = ["tab:blue" if r["contender"] == "triton" else "tab:gray" for r in rows]
    axes.barh(range(len(rows)), [100 * float(r["of_ceiling"]) for r in rows], color=colors)
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel(f"forward and backward: % of the copy bandwidth of {gpu}")
    _save(figure, path)


def _curves(figure, rows: Sequence[TextRow], gpu: str, path: Path) -> None:  # type: ignore[no-untyped-def]
    for index, direction in enumerate(("fwd", "bwd")):
        axes = figure.add_subplot(1, 2, index + 1)
        for contender in sorted({r["contender"] for r in rows}):
            mine = [r for r in rows if (r["contender"], r["direction"]) == (contender, direction)]
            points = sorted((int(r["case"].rpartition(" ")[2]), float(r["tflop_per_s"])) for r in mine)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=contender)
        axes.set_xscale("log", base=2)
        axes.set_title(f"attention {direction}, D 128, causal")
        axes.set_xlabel("sequence length")
        axes.set_ylabel(f"TFLOP/s on {gpu}")
        if axes.lines:
            axes.legend(fontsize=7)
    _save(figure, path)


def _save(figure, path: Path) -> None:  # type: ignore[no-untyped-def]
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())
