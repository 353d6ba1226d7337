"""Writes ops/measured.csv, from which the library chooses its back ends: microseconds of forward and backward."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_parts.bars import time_us
from gpu_parts.rows import ROOT, Row, read_csv

TABLE = ROOT / "megallm" / "ops" / "measured.csv"
COLUMNS = ("gpu", "op", "dtype", "size", "backend", "microseconds", "torch", "triton", "commit")
BACKEND_OF = {"triton, fp32 gradient buffer": "triton"}
"""Contenders that stand for a back end of another name."""


def table_rows(rows: Sequence[Row], facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row for each (op, dtype, size, back end) that was measured right; of several, the last."""
    from megallm.config.backends import BACKENDS

    found: dict[tuple[str, str, int, str], str] = {}
    for each in rows:
        op, name = str(each.get("op", "")), str(each.get("contender", ""))
        backend = BACKEND_OF.get(name, name)
        size = int(each.get("size", -1) if each.get("size", -1) != "" else -1)
        wanted = "step" if op == "adamw" else "both"
        taken = each.get("status") == "ok" and each.get("direction") == wanted and size >= 0
        microseconds = time_us(each)
        if not taken or backend not in BACKENDS.get(op, ()) or microseconds is None:
            continue
        dtype = "float32" if op == "adamw" else str(each["dtype"])
        found[(op, dtype, size, backend)] = f"{microseconds:.1f}"
    shared = {name: str(facts[name]) for name in ("gpu", "torch", "triton", "commit")}
    return [
        {"op": op, "dtype": dtype, "size": str(size), "backend": backend, "microseconds": time, **shared}
        for (op, dtype, size, backend), time in found.items()
    ]


def update_table(path: Path, fresh: Sequence[Mapping[str, str]]) -> int:
    """Replaces the rows of the same gpu, op, dtype, size and back end, keeps the others; how many are new."""
    key = COLUMNS[:5]
    kept = {tuple(each[name] for name in key): each for each in read_csv(path)}
    kept |= {tuple(each[name] for name in key): dict(each) for each in fresh}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept[each] for each in sorted(kept))
    return len(fresh)
