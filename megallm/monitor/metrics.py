"""The metrics file: one JSON object a line, one line a training step, readable while the run goes on.

The one idea: a step has one line for ever. Whoever trains gathers a step's numbers, the validation loss included when
that step was validated, and writes them together; a resumed run first cuts off what it is about to train again.

    {"step": 19, "loss": 5.31, "grad_norm": 1.2, "learning_rate": 3e-04, "tokens": 38912, ...}
    {"step": 20, "loss": 5.28, "grad_norm": 1.1, "learning_rate": 3e-04, "tokens": 40960, ..., "valid_loss": 5.4}

Names, units and definitions: docs/metrics.md.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

Metrics = dict[str, Any]


class MetricsWriter:
    """Appends one line a step and flushes each, so that a crash loses at most the line being written.

    Opening rewrites the file atomically (a new file is renamed over the old one): lines with a step above
    `resume_step`, and a half-written last line, are gone; a run that starts from the beginning (`resume_step` 0)
    starts an empty file.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int = 0) -> None:
        """Raises ValueError when the file to be resumed has a broken line anywhere but at its end."""
        if resume_step < 0:
            raise ValueError(f"resume_step is {resume_step}: it is the number of steps already trained, 0 or more")
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = _lines_until(self.path, resume_step)
        self._last_step: int = kept[-1]["step"] if kept else -1
        self._file = _replace(self.path, kept)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one line. Numbers that are not finite become null; anything with a float value is accepted.

        Raises ValueError when `step` is missing or not above the last one written: each step has one line.
        """
        if "step" not in metrics:
            raise ValueError(f"a metrics line needs a step; it has only {sorted(metrics)}")
        line = {name: _plain(value) for name, value in metrics.items()}
        step = line["step"]
        if not isinstance(step, int) or step <= self._last_step:
            raise ValueError(f"step {step!r} cannot follow step {self._last_step}: steps are integers that only grow")
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        self._last_step = step

    def close(self) -> None:
        """Close the file; the writer cannot be used afterwards."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[Metrics]:
    """The lines of a metrics file, in order. A half-written last line is left out.

    Raises FileNotFoundError, and ValueError for any other line that is not one JSON object.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    metrics: list[Metrics] = []
    for number, line in enumerate(lines, start=1):
        parsed = _parse(line)
        if parsed is not None:
            metrics.append(parsed)
        elif number < len(lines):
            raise ValueError(f"{path}, line {number} is not one JSON object: {line[:80]!r}; remove that line")
    return metrics


def _parse(line: str) -> Metrics | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _lines_until(path: Path, resume_step: int) -> list[Metrics]:
    if resume_step == 0 or not path.exists():
        return []
    return [line for line in read_metrics(path) if isinstance(line.get("step"), int) and line["step"] <= resume_step]


def _replace(path: Path, lines: list[Metrics]) -> IO[str]:
    """Put a file with these lines at `path` and return it open for appending (the rename keeps the handle valid)."""
    fresh = path.with_name(path.name + ".partial")
    file = open(fresh, "w", encoding="utf-8")
    file.writelines(json.dumps(line) + "\n" for line in lines)
    file.flush()
    os.replace(fresh, path)
    return file


def _plain(value: Any) -> Any:
    """What JSON can hold: bool, int, str, lists and None as they are, the rest as a finite float or None."""
    if value is None or isinstance(value, (bool, str, list)):
        return value
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None
