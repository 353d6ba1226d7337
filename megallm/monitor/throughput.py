"""How fast and how large: step time, tokens/s, model FLOP/s utilisation (MFU), time left, peak memory.

The one idea: a lap is the time between two moments at which the device is known to be idle (the caller has just read
the loss), so kernels still queued never make a step look fast. Whatever is not training (validation, saving) is left
out by calling `start` again after it.

    start -- step -- lap -- step -- lap -- validation -- start -- step -- lap
             `------'       `------'                             `------'
"""

from __future__ import annotations

import re
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_LAPS_REMEMBERED = 20
"""Laps whose median predicts the time left: long enough to be calm, short enough to follow a change of machine load."""


@dataclass(frozen=True, kw_only=True)
class Lap:
    """The speed of the steps since the last lap."""

    step_time_s: float
    """Wall time of one optimizer step, seconds (the mean, when the lap holds several)."""
    tokens_per_s: float
    """Tokens of the whole job per second."""
    mfu: float | None
    """Model FLOP/s over the devices' peak, 0 to 1; None where no peak is known."""


class Throughput:
    """Times laps. `clock` returns seconds and never goes back (tests pass their own)."""

    def __init__(
        self,
        *,
        flops_per_token: float,
        peak_flops: float | None,
        num_devices: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`flops_per_token`: model FLOPs of forward and backward for one token of the whole model, nothing recomputed
        counted. `peak_flops`: dense peak FLOP/s of one device in the precision trained in; None = no MFU.
        """
        if peak_flops is not None and peak_flops <= 0:
            raise ValueError(f"peak_flops is {peak_flops}: give the device's dense peak in FLOP/s, or None for no MFU")
        self._flops_per_token = flops_per_token
        self._job_peak_flops = None if peak_flops is None else peak_flops * num_devices
        self._clock = clock
        self._step_times: deque[float] = deque(maxlen=_LAPS_REMEMBERED)
        self._num_laps = 0
        self._started = clock()

    def start(self) -> None:
        """Begin a lap now; the time since the last lap is counted nowhere."""
        self._started = self._clock()

    def lap(self, *, tokens: int, steps: int = 1) -> Lap:
        """End the lap in which the whole job read `tokens` tokens in `steps` steps, and begin the next.

        MFU = tokens_per_s * flops_per_token / (num_devices * peak_flops)  (PaLM, arXiv 2204.02311, appendix B).
        """
        if steps < 1:
            raise ValueError(f"a lap of {steps} steps has no step time: lap after one or more steps")
        now = self._clock()
        elapsed = max(now - self._started, 1e-9)
        self._started = now
        if self._num_laps == 1:
            self._step_times.clear()  # the first lap warmed caches and compiled kernels: it predicts nothing
        self._num_laps += 1
        self._step_times.append(elapsed / steps)
        tokens_per_s = tokens / elapsed
        peak = self._job_peak_flops
        mfu = None if peak is None else tokens_per_s * self._flops_per_token / peak
        return Lap(step_time_s=elapsed / steps, tokens_per_s=tokens_per_s, mfu=mfu)

    def eta_s(self, remaining_steps: int) -> float | None:
        """Seconds of training left at the median pace of the last laps; None before the first lap."""
        if not self._step_times:
            return None
        return max(remaining_steps, 0) * statistics.median(self._step_times)


def memory_gib(device: torch.device | None = None) -> float:
    """Peak memory so far, GiB: what the CUDA allocator gave out on `device`, else the process' peak resident set."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return _host_peak_bytes() / 2**30


def _host_peak_bytes() -> int:
    """Peak resident set of this process.

    getrusage's figure outlives exec, and a child started by vfork begins with the peak of its parent: Linux's own count
    of this program is asked first.
    """
    if sys.platform == "linux":
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:  # sandboxed kernels leave the line out
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux
