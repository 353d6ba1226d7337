"""What the benchmark records: one row a measurement, to a file of JSON lines first and from there into a CSV file.

A worker only appends JSON lines, so that whatever it measured before it crashed is kept; the driver copies them into
results/gpu.csv together with the facts that every row carries.
"""

from __future__ import annotations

import csv
import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]

FACTS = ("date", "gpu", "driver", "torch", "triton", "python", "commit", "command")
FIELDS = (
    *FACTS,
    "section", "op", "case", "dtype", "size", "contender", "direction", "status",
    "eager_us", "eager_us_p20", "eager_us_p80", "graph_us", "graph_us_p20", "graph_us_p80", "host_us", "peak_mib",
    "gb_per_s", "tflop_per_s", "of_ceiling", "error", "bound", "settings", "launches", "tokens_per_s", "mfu", "loss",
    "note",
)  # fmt: skip
"""Columns of gpu.csv. status: ok, failed (a wrong result), error (an exception), absent, skipped, crashed, hung.

settings: the launch settings that a check ran with; launches: kernels of one optimizer step.
of_ceiling: of the copy bandwidth for rows with gb_per_s, of the 8192^3 matrix product for rows with tflop_per_s; in
section decode, of the peak memory bandwidth that the GPU's maker gives.
"""
UNKNOWN = "unknown"
"""What nobody could say: a GPU without a name, a commit without a repository."""
BAD = frozenset({"failed", "crashed", "hung"})
"""States of a check, or of one of our own kernels, that make the run end with exit code 1; so does an error of ours."""


def row(**values: Any) -> Row:
    """A row; refuses a column that does not exist."""
    unknown = set(values) - set(FIELDS)
    assert not unknown, f"no such column: {unknown}"
    return {"status": "ok", **values}


class JsonLines:
    """A file that grows by one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0

    def add(self, value: Mapping[str, Any]) -> None:
        """Appends one line and gives it to the operating system."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")

    def new(self) -> list[Row]:
        """The complete lines that were added since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._read += end
        return [json.loads(line) for line in data[:end].splitlines()]


def append_csv(path: Path, rows: Iterable[Row], facts: Mapping[str, Any]) -> None:
    """Adds rows to the CSV file; ValueError if it has other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        with path.open(encoding="utf-8", newline="") as file:
            header = next(csv.reader(file), [])
        if tuple(header) != FIELDS:
            raise ValueError(f"{path} has other columns than this benchmark writes: move it away, or give --out")
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=FIELDS, restval="", lineterminator="\n")
        if is_new:
            writer.writeheader()
        for each in rows:
            writer.writerow({**facts, **{name: _shown(value) for name, value in each.items()}})


def read_csv(path: Path) -> list[dict[str, str]]:
    """All rows; none if there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run_facts(*, commit: str, command: str, gpu: str = "", driver: str = "") -> dict[str, str]:
    """What every row of a run carries. Asks the driver's tool, so that this process needs no CUDA context."""
    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    if not gpu:
        gpu, driver = _gpu_and_driver()
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": gpu,
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": commit or _commit(),
        "command": command,
    }


def _gpu_and_driver() -> tuple[str, str]:
    """(name, driver's version); where nvidia-smi does not answer the name comes from torch, in a process of its own."""
    smi = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    own = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name(0))"]
    for query in (smi, own):
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        name, _, version = done.stdout.strip().partition(",")
        if name.strip():
            return name.strip(), version.strip() or UNKNOWN
    return UNKNOWN, UNKNOWN


def _commit() -> str:
    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT).stdout.strip()
        except OSError:
            return ""

    commit = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "megallm", "kernels", "csrc")
    return (commit or UNKNOWN) + ("+changes" if changed else "")


def _shown(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1 else f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return "; ".join(map(str, value))
    return str(value).replace("\n", " ") if isinstance(value, str) else value
