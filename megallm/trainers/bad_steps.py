"""Steps whose gradients are not finite: skipped by all ranks alike, counted, named, in the end a reason to stop."""

from __future__ import annotations

import math

from megallm.optim.clip import GradientNorm
from megallm.runtime.failure import RunStopped


class BadSteps:
    """Counts them as their results are read."""

    def __init__(self, *, most_in_a_row: int) -> None:
        """most_in_a_row: RunStopped at so many; 0 = never."""
        self.total, self._in_a_row, self._longest, self._most = 0, 0, 0, most_in_a_row
        self._way_out = ""

    def look(self, step: int, norm: GradientNorm, metrics: dict[str, float]) -> str:
        """A line about a bad step, or "". norm, metrics: its result's. A collective after a bad step."""
        if math.isfinite(metrics["grad_norm"]):
            self._in_a_row = 0
            return ""
        self.total += 1
        if metrics.get("loss_scale", 1.0) > 1.0:  # fp16 that is still on its way down to a scale that fits
            self._way_out = "; begin with a smaller loss_scale, or allow more of them"
        else:
            self._way_out = (
                "; lower the learning rate, look at the data of these steps, or resume from an earlier checkpoint"
            )
        self._in_a_row += 1
        self._longest = max(self._longest, self._in_a_row)
        of = f" of at most {self._most}" if self._most else ""
        scale = f", loss scale {metrics['loss_scale']:g}" if "loss_scale" in metrics else ""
        return (
            f"step {step} changed nothing: its gradients are not finite (first in backward: "
            f"{norm.first_bad()}{scale}; {self._in_a_row}{of} in a row)"
        )

    def check(self, step: int) -> None:
        """RunStopped if there were too many in a row."""
        if self._most and self._longest >= self._most:
            raise RunStopped(
                f"stopped at step {step}: the gradients of {self._longest} steps in a row were not finite "
                f"(max_bad_steps){self._way_out}"
            )
