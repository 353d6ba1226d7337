"""How a call is timed: CUDA events around eager calls and around replays of a captured graph, medians, host time.

    eager    one event between any two calls: what the device takes, or the host where it is slower
    graph    all buffers' calls captured once, replayed: the device alone
    host     time until the call returns, nothing waits for the device
    peak     memory allocated at most during one call, above what was allocated before it

Calls take a number: which of the rotated buffers to use. Everything runs on one side stream, since a captured backward
must run on the stream that its forward ran on. On CPU there are no events: time.perf_counter, and no graph.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from gpu_parts.place import Place

Call = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Microseconds of one call."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One call, measured."""

    eager: Spread
    graph: Spread | None
    host_us: float
    peak_bytes: int
    note: str
    """Why there is no graph, if so."""

    @property
    def best(self) -> Spread:
        """The device's own time where it could be captured, else eager."""
        return self.graph if self.graph is not None else self.eager


def spread(samples: list[float]) -> Spread:
    """Percentiles (nearest rank) of a non-empty list."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    return Spread(p20=at(0.2), p50=statistics.median(ordered), p80=at(0.8))


class Clock:
    """Times calls on one device."""

    def __init__(self, place: Place, *, seconds: float = 0.08, warmup: int = 3) -> None:
        """`seconds`: about how long the repetitions of one mode may take together."""
        self._place, self._seconds, self._warmup = place, seconds, warmup if place.is_cuda else 1
        self._stream = torch.cuda.Stream(place.device) if place.is_cuda else None

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Work inside runs on the clock's stream; what was enqueued before is waited for."""
        if self._stream is None:
            yield
            return
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.synchronize()

    def measure(self, call: Call, *, num_sets: int, graph: bool = True) -> Timing:
        """`call(0)` ... `call(num_sets - 1)` in turns; inside `stream()`. An exception of the call passes through."""
        for i in range(self._warmup):
            call(i % num_sets)
        self._place.synchronize()
        peak = self._peak(call)
        started = time.perf_counter()
        for i in range(self._warmup):
            call(i % num_sets)
        self._place.synchronize()
        estimate = (time.perf_counter() - started) / self._warmup
        repeats = self._repeats(estimate)
        host = self._host(call, num_sets, min(repeats, 20))
        eager = self._events(call, num_sets, repeats)
        if not graph or not self._place.is_cuda:
            return Timing(eager=eager, graph=None, host_us=host, peak_bytes=peak, note="")
        try:
            replayed, note = self._graph(call, num_sets, estimate), ""
        except Exception as error:  # a contender that synchronises cannot be captured: eager then stands for it
            replayed, note = None, f"no graph: {_first_line(error)}"
        return Timing(eager=eager, graph=replayed, host_us=host, peak_bytes=peak, note=note)

    def seconds(self, call: Call, *, num_sets: int, repeats: int) -> Spread:
        """Eager only, a fixed number of repetitions."""
        for i in range(self._warmup):
            call(i % num_sets)
        return self._events(call, num_sets, repeats)

    def _repeats(self, estimate: float) -> int:
        if not self._place.is_cuda:
            return 1
        return max(7, min(200, int(self._seconds / max(estimate, 1e-6))))

    def _host(self, call: Call, num_sets: int, repeats: int) -> float:
        samples = []
        for i in range(repeats):
            started = time.perf_counter()
            call(i % num_sets)
            samples.append((time.perf_counter() - started) * 1e6)
        self._place.synchronize()
        return statistics.median(samples)

    def _events(self, call: Call, num_sets: int, repeats: int) -> Spread:
        if not self._place.is_cuda:
            samples = []
            for i in range(repeats):
                started = time.perf_counter()
                call(i % num_sets)
                samples.append((time.perf_counter() - started) * 1e6)
            return spread(samples)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        kept: list[object] = [None] * num_sets  # outputs of different buffers live side by side, as their inputs do
        marks[0].record()
        for i in range(repeats):
            kept[i % num_sets] = call(i % num_sets)
            marks[i + 1].record()
        torch.cuda.synchronize()
        return spread([a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(marks)])

    def _graph(self, call: Call, num_sets: int, estimate: float) -> Spread:
        rounds = max(1, -(-4 // num_sets))  # some calls a replay, so that its own launch does not count
        graph = torch.cuda.CUDAGraph()
        kept: list[object] = []
        try:
            kept = self._capture(graph, call, num_sets, rounds)
            calls = rounds * num_sets
            repeats = max(5, min(60, int(self._seconds / max(estimate * calls, 1e-6))))
            for _ in range(2):
                graph.replay()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
            marks[0].record()
            for i in range(repeats):
                graph.replay()
                marks[i + 1].record()
            torch.cuda.synchronize()
            return spread([a.elapsed_time(b) * 1e3 / calls for a, b in itertools.pairwise(marks)])
        finally:
            del kept
            graph.reset()

    def _capture(self, graph: torch.cuda.CUDAGraph, call: Call, num_sets: int, rounds: int) -> list[object]:
        """By hand, since torch.cuda.graph gives all cached memory back each time: tens of milliseconds a capture."""
        kept: list[object] = []
        torch.cuda.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(rounds):
                kept = [call(i) for i in range(num_sets)]
        except BaseException:
            with contextlib.suppress(Exception):  # the capture is void; the first error tells why
                graph.capture_end()
            raise
        graph.capture_end()
        return kept

    def _peak(self, call: Call) -> int:
        if not self._place.is_cuda:
            return 0
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = call(0)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del out
        return peak


def count_launches(call: Callable[[], object]) -> int:
    """Kernels (and copies) that one call starts on the GPU, as torch's profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        call()
        torch.cuda.synchronize()
    on_gpu = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    ranges = [e for e in on_gpu if getattr(e, "is_user_annotation", False) or e.name.startswith("Optimizer.")]
    return len(on_gpu) - len(ranges)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"
