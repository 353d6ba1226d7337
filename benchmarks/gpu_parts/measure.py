"""One contender on one case: its directions timed, as rows. Nothing that a contender does ends the run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from gpu_parts.calls import OURS, Buffers, Case, CompileBudget, Contender, Direction
from gpu_parts.clock import Clock, Timing, count_launches
from gpu_parts.launches import recorded
from gpu_parts.place import Place
from gpu_parts.rows import Row, row


class DeviceLost(RuntimeError):
    """The CUDA context is unusable after an error: only a new process can go on."""


def measure_contender(
    case: Case, contender: Contender, sets: list[Buffers], place: Place, clock: Clock, *, ceilings: Mapping[str, float],
    condemned: Mapping[str, str], budget: CompileBudget,
) -> list[Row]:  # fmt: skip
    """Rows of all directions. `condemned`: launch settings that failed a check, and which check."""
    common = {
        "section": case.section, "op": case.op, "case": case.name, "size": case.size, "dtype": place.dtype_name,
        "contender": contender.name,
    }  # fmt: skip
    reason = contender.why_absent()
    if reason is not None:
        return [row(**common, status="absent", note=reason)]
    if contender.compiles and budget.left <= 0:
        return [row(**common, status="skipped", note="the compile-time budget is used up")]
    rows: list[Row] = []
    started = time.perf_counter()
    try:
        with clock.stream(), recorded() as used:
            directions = contender.build(sets)
            for name, direction in directions.items():
                used.add(f"{contender.name}: {case.op}")
                timing = _timed(direction, clock, len(sets), used, condemned if _is_ours(contender) else {})
                if isinstance(timing, str):
                    rows.append(row(**common, direction=name, status="failed", note=timing))
                    continue
                numbers = _numbers(case, name, timing, ceilings)
                notes = filter(None, (contender.note, direction.note, timing.note))
                rows.append(row(**common, direction=name, **numbers, note="; ".join(notes)))
            if case.launches and place.is_cuda:
                rows[-1] |= _launches(directions["step"])
    except Exception as error:  # a peer's failure is a row; ours is one that makes the run fail
        text = str(error).strip().splitlines()
        note = f"{type(error).__name__}: {text[0][:300] if text else ''}"
        rows.append(row(**common, status="error", note=note))
    finally:
        if contender.compiles:
            budget.spend(started)
    return rows


def _is_ours(contender: Contender) -> bool:
    return contender.name.startswith(OURS) or contender.name == "cuda"


def _launches(direction: Direction) -> dict[str, Any]:
    try:
        return {"launches": count_launches(lambda: direction.call(0))}
    except Exception as error:  # the profiler's trouble, not the kernel's
        return {"note": f"launches not counted: {type(error).__name__}: {error}"}


def _timed(
    direction: Direction, clock: Clock, num_sets: int, used: set[str], condemned: Mapping[str, str]
) -> Timing | str:
    """The timing, or why none was made: the first call showed launch settings that failed a check."""
    try:
        if direction.setup is not None:
            direction.setup()
        direction.call(0)
        bad = sorted(used & set(condemned))
        if bad:
            return f"not timed: {condemned[bad[0]]} failed with {bad[0]}"
        return clock.measure(direction.call, num_sets=num_sets, graph=direction.graph)
    finally:
        if direction.teardown is not None:
            direction.teardown()


def _numbers(case: Case, direction: str, timing: Timing, ceilings: Mapping[str, float]) -> dict[str, Any]:
    best = timing.best
    extra = max(timing.peak_bytes - (case.returned_bytes if direction == "both" else 0.0), 0.0)
    numbers: dict[str, Any] = {
        "eager_us": timing.eager.p50, "eager_us_p20": timing.eager.p20, "eager_us_p80": timing.eager.p80,
        "host_us": timing.host_us, "peak_mib": extra / 2**20,
    }  # fmt: skip
    if timing.graph is not None:
        graph = timing.graph
        numbers |= {"graph_us": graph.p50, "graph_us_p20": graph.p20, "graph_us_p80": graph.p80}
    if direction in case.bytes_moved:
        numbers["gb_per_s"] = case.bytes_moved[direction] / best.p50 * 1e-3
        if ceilings.get("gb_per_s"):
            numbers["of_ceiling"] = numbers["gb_per_s"] / ceilings["gb_per_s"]
    if direction in case.flops:
        numbers["tflop_per_s"] = case.flops[direction] / best.p50 * 1e-6
        if ceilings.get("tflop_per_s"):
            numbers["of_ceiling"] = numbers["tflop_per_s"] / ceilings["tflop_per_s"]
    return numbers


def check_device(place: Place) -> None:
    """Raises DeviceLost where nothing can run on the device any more."""
    if not place.is_cuda:
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.zeros(1, device=place.device).add_(1).item()
    except Exception as lost:
        raise DeviceLost(str(lost)) from lost


def log_line(each: Row) -> str:
    """One row for the log, in a fixed order and short."""
    head = f"{each.get('section', ''):>12} {each.get('op', ''):<20} {each.get('case', ''):<26}"
    head += f" {each.get('contender', ''):<24} {each.get('direction', ''):<5}"
    if each["status"] != "ok":
        return f"{head} {each['status'].upper()}: {each.get('note', '')}"
    parts = []
    for name, unit in (("graph_us", "us graph"), ("eager_us", "us eager"), ("host_us", "us host")):
        if name in each:
            parts.append(f"{each[name]:10.1f} {unit}")
    for name, unit in (("gb_per_s", "GB/s"), ("tflop_per_s", "TFLOP/s"), ("tokens_per_s", "tokens/s")):
        if name in each:
            parts.append(f"{each[name]:9.1f} {unit}")
    if "of_ceiling" in each:
        parts.append(f"{100 * each['of_ceiling']:5.1f} %")
    if "mfu" in each:
        parts.append(f"MFU {100 * each['mfu']:.1f} %")
    if each.get("peak_mib"):
        parts.append(f"{each['peak_mib']:.0f} MiB")
    if "error" in each:
        parts.append(f"error {each['error']:.2e} of {each['bound']:.2e}")
    if "loss" in each:
        parts.append(f"loss {each['loss']:.4f}")
    return " ".join([head, *parts, *([f"({each['note']})"] if each.get("note") else [])])
