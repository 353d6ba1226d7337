"""Progress for humans: one aligned line a step, plain text that reads the same in a terminal, a log file or CI.

    step    20/200 | loss   5.123 | grad norm   1.23 | lr 3.0e-04 |  12.3k tok/s |   0.41 s | eta 1:12
    valid   20/200 | loss   5.210 | perplexity 183.1 <====

Only appends lines: no carriage returns, no colours, no terminal needed.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

_SHOWN = ("step", "loss", "grad_norm", "learning_rate", "count", "tokens", "tokens_per_s", "step_time_s", "mfu",
          "memory_gib", "clip_coefficient", "bad_steps")  # fmt: skip
"""Metrics with a column of their own, or left to the file (tokens, memory, clipping, bad steps).

Any other is added at the end."""


class Console:
    """Prints every `log_every`-th step, the first and the last, and every validation."""

    def __init__(
        self,
        *,
        total_steps: int,
        log_every: int = 1,
        min_interval_s: float = 0.0,
        header: str = "",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`min_interval_s`: steps sooner after the last printed one are left out too (never the first or the last).
        `header`: what is being trained, printed once before the first line. `stream`: None = standard output.
        """
        if log_every < 1:
            raise ValueError(f"log_every is {log_every}: it is the number of steps between lines, 1 or more")
        self._total_steps = total_steps
        self._log_every = log_every
        self._min_interval_s = min_interval_s
        self._header = header
        self._stream = stream
        self._clock = clock
        self._last_printed: float | None = None

    def step(self, metrics: Mapping[str, Any], *, eta_s: float | None = None) -> None:
        """Print the line of one training step, if it is due; `metrics` are those of the metrics file."""
        step = int(metrics["step"])
        if not self._is_due(step):
            return
        self._last_printed = self._clock()
        self._print(step_line(metrics, total_steps=self._total_steps, eta_s=eta_s))

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the line of a validation, always. `metrics`: its `loss` or others."""
        self._print(validation_line(step, metrics, total_steps=self._total_steps))

    def notice(self, text: str) -> None:
        """Print a line of its own, always."""
        self._print(text)

    def _is_due(self, step: int) -> bool:
        if self._last_printed is None or step >= self._total_steps:
            return True
        return step % self._log_every == 0 and self._clock() - self._last_printed >= self._min_interval_s

    def _print(self, line: str) -> None:
        stream = sys.stdout if self._stream is None else self._stream
        if self._header:
            print(self._header, file=stream)
            self._header = ""
        print(line, file=stream, flush=True)


def step_line(metrics: Mapping[str, Any], *, total_steps: int, eta_s: float | None = None) -> str:
    """One training step as text: columns have a fixed width, a metric that is missing or null has no column.

    loss and grad norm always have one, a dash where they have no value, so that the columns stay in place.
    """
    columns = [
        f"step {_progress(metrics['step'], total_steps)}",
        f"loss {_number(metrics.get('loss'), 7, 3)}",
        f"grad norm {_number(metrics.get('grad_norm'), 6, 2)}",
    ]
    if metrics.get("learning_rate") is not None:
        columns.append(f"lr {metrics['learning_rate']:.1e}")
    if metrics.get("tokens_per_s") is not None:
        columns.append(f"{format_count(metrics['tokens_per_s']):>6} tok/s")
    if metrics.get("mfu") is not None:
        columns.append(f"mfu {100 * metrics['mfu']:4.1f}%")
    if metrics.get("step_time_s") is not None:
        columns.append(f"{_seconds(metrics['step_time_s']):>8}")
    others = {name: value for name, value in metrics.items() if name not in _SHOWN and not _has_own_line(name)}
    columns += [f"{name.replace('_', ' ')} {_extra(value)}" for name, value in others.items()]
    if eta_s is not None:
        columns.append(f"eta {format_duration(eta_s)}")
    return " | ".join(columns)


def _has_own_line(name: str) -> bool:
    """Whether only the validation's line shows it."""
    return name.startswith("valid_") and name != "valid_loss"


def validation_line(step: int, metrics: Mapping[str, float], *, total_steps: int) -> str:
    """One validation as text: the columns of a training step, marked at both ends.

    A loss alone is a cross-entropy, whose perplexity is exp(loss); there may be none.
    """
    loss = metrics.get("loss")
    columns = [f"valid{_progress(step, total_steps)}", *([] if loss is None else [f"loss {_number(loss, 7, 3)}"])]
    others = {name: value for name, value in metrics.items() if name != "loss"}
    if loss is not None and not others:
        perplexity = math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.nan
        columns.append(f"perplexity {_number(perplexity, 7, 2)}")
    columns += [f"{name.replace('_', ' ')} {_number(value, 8, 3)}" for name, value in others.items()]
    return " | ".join(columns) + " <===="


def format_count(count: float) -> str:
    """A count in at most 5 characters: 987, 12.3k, 1.23M, 456G."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            scaled = count / size
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{unit}"
    return f"{count:.0f}"


def format_duration(seconds: float) -> str:
    """A duration as 0:07, 1:12, 1:02:03 or 2d 03:04:05."""
    total = round(max(seconds, 0.0))
    days, rest = divmod(total, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}:{left:02d}"
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def _progress(step: int, total_steps: int) -> str:
    width = len(str(total_steps))
    return f"{step:>{width + 1}d}/{total_steps}"


def _number(value: float | None, width: int, digits: int) -> str:
    if value is None:
        return "-".rjust(width)
    texts = (f"{value:{width}.{digits}f}", f"{value:{width}.1e}", f"{value:{width}.0e}")
    return next((text for text in texts if len(text) <= width), texts[-1])


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 0.0995 else f"{seconds:.2f} s"


def _extra(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
