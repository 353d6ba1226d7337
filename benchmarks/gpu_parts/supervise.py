"""Runs workers and outlives them: what one measured is kept, a crash or a hang costs the unit that caused it.

    plan.json -> worker 0 .. n-1 -> rows-*.jsonl -> CSV
                    | crashed, or a unit that takes too long: a row that says so, and a new worker for the rest
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_parts.measure import log_line
from gpu_parts.rows import ROOT, JsonLines, Row, append_csv, row

BENCHMARKS = ROOT / "benchmarks"
MAX_RESTARTS = 6
_POLL_S = 0.2


@dataclass(kw_only=True)
class Results:
    """All rows so far, also in the CSV file."""

    csv: Path
    facts: Mapping[str, Any]
    rows: list[Row] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    device: dict[str, int] = field(default_factory=dict)
    """arch and num_sms, as a worker saw them: this process makes no CUDA context."""

    def take(self, lines: list[Row]) -> None:
        """Rows of a worker, and its {"done": key} and {"device": ...} lines."""
        self.done |= {line["done"] for line in lines if "done" in line}
        for line in lines:
            self.device |= line.get("device", {})
        fresh = [line for line in lines if "status" in line]
        self.rows += fresh
        if fresh:
            append_csv(self.csv, fresh, self.facts)

    def add(self, each: Row) -> None:
        """A row of the driver's own."""
        print(log_line(each), flush=True)
        self.take([each])

    @property
    def ceilings(self) -> dict[str, float]:
        """{gb_per_s, tflop_per_s} once measured."""
        rows = [each for each in self.rows if each.get("section") == "ceilings"]
        return {name: each[name] for each in rows for name in ("gb_per_s", "tflop_per_s") if name in each}

    @property
    def condemned(self) -> dict[str, str]:
        """{launch settings: the check that failed with them}."""
        bad = [e for e in self.rows if e.get("section") == "check" and e["status"] in ("failed", "error")]
        return {launch: f"check {each['op']} {each['case']}" for each in bad for launch in each.get("settings", ())}


def worker_environment() -> dict[str, str]:
    """Of a child process: finds our packages, and compiles with few threads of its own."""
    paths = [str(BENCHMARKS), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def run_sections(
    plan: dict[str, Any], results: Results, folder: Path, *, num_workers: int, unit_limit_s: float,
    program: Sequence[str] = ("-m", "gpu_parts.worker"),
) -> None:  # fmt: skip
    """Workers over plan["sections"]; `num_workers` share the units out. `program`: what Python runs as a worker."""
    plan = plan | {"ceilings": results.ceilings, "condemned": results.condemned}
    stem = "-".join(plan["sections"])[:40]
    limit = max(plan["deadlines"][section] for section in plan["sections"])
    workers = [
        _Supervised(folder, f"{stem}-{i}", f"{i}/{num_workers}", unit_limit_s, program, section=plan["sections"][0])
        for i in range(num_workers)
    ]
    _write_plan(folder, plan, results)
    for worker in workers:
        worker.start()
    while any(worker.is_running for worker in workers):
        time.sleep(_POLL_S)
        for worker in workers:
            worker.watch(results, limit, lambda: _write_plan(folder, plan, results))
    for worker in workers:
        results.take(worker.lines.new())


def _write_plan(folder: Path, plan: dict[str, Any], results: Results) -> None:
    partial = folder / ".plan"
    partial.write_text(json.dumps(plan | {"done": sorted(results.done)}))
    partial.replace(folder / "plan.json")


class _Supervised:
    """One worker process and its successors."""

    def __init__(
        self, folder: Path, name: str, shard: str, unit_limit_s: float, program: Sequence[str], *, section: str
    ) -> None:
        self._folder, self._name, self._shard, self._limit = folder, name, shard, unit_limit_s
        self._program, self._section = program, section
        self.lines = JsonLines(folder / f"rows-{name}.jsonl")
        self._process: subprocess.Popen[bytes] | None = None
        self._restarts = 0

    @property
    def is_running(self) -> bool:
        """Whether there is a process to wait for."""
        return self._process is not None

    def start(self) -> None:
        """A new process for what is left."""
        (self._folder / f"current-{self._name}.json").unlink(missing_ok=True)
        command = [sys.executable, *self._program, "--folder", str(self._folder), "--name", self._name]
        self._process = subprocess.Popen([*command, "--shard", self._shard], env=worker_environment(), cwd=ROOT)

    def watch(self, results: Results, limit: float, write_plan: Callable[[], None]) -> None:
        """Collects rows; ends a process that hangs or is late; starts another after a crash."""
        if self._process is None:
            return
        results.take(self.lines.new())
        code = self._process.poll()
        current = self._current()
        now, why = time.time(), ""
        if code is None and current is not None and now - current["since"] > self._limit:
            why = f"took over {self._limit:.0f} s"
        elif code is None and now > limit + self._limit / 2:
            why = "was under way when the section's time was over"
        if code is None and not why:
            return
        if code is None:
            self._process.kill()
            code = self._process.wait()
        results.take(self.lines.new())
        self._process = None
        if code == 0:
            return
        key = current["key"] if current is not None else ""
        if key and key not in results.done:
            section, *rest = key.split("/")
            names = [*rest, "", "", ""][:3]
            note = why or f"the process ended with code {code}"
            contender = "triton" if section == "check" else names[2]
            results.add(
                row(section=section, op=names[0], case=names[1], contender=contender, note=note,
                    status="hung" if why else "crashed")
            )  # fmt: skip
            results.done.add(key)
        self._restarts += 1
        if now < limit and self._restarts <= MAX_RESTARTS and (key or self._restarts <= 1):
            write_plan()
            self.start()
        elif not key:  # at no unit that could be blamed: what it should have run is missing from the rows
            note = why or f"the worker ended with code {code}, outside any unit"
            status = "hung" if why else "crashed"
            results.add(row(section=self._section, contender="triton", status=status, note=note))

    def _current(self) -> dict[str, Any] | None:
        try:
            return json.loads((self._folder / f"current-{self._name}.json").read_text())
        except (OSError, ValueError):
            return None
