"""How the benchmark's driver and its workers talk, so that peers are measured in turns within one run.

A worker builds its model, warms up, says that it is ready and sleeps. The driver lets one worker at a time run a burst
of steps. Everything goes through small files in a folder: no ports, no pipes, the same for one rank and several.

    worker rank r      ready-r               after warm-up; {"first": the losses of warm-up, of a rank that has them}
    driver             go-k.json             {"steps": n}, or {"steps": 0}: end
    worker rank r      losses-k-r.json       the burst's losses, of a rank that has them
    worker rank 0      done-k.json           {"seconds": per step, "losses": the mean over the ranks that have them}
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_POLL_S = 0.02


def write_json(path: Path, value: Any) -> None:
    """The file appears whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value))
    partial.replace(path)


def wait_for(path: Path, *, timeout_s: float, is_alive: Callable[[], bool] = lambda: True) -> Any:
    """The content of a JSON file, once it is there."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline or not is_alive():
            raise TimeoutError(f"{path.name} did not come")
        time.sleep(_POLL_S)
    return json.loads(path.read_text())


def serve(
    folder: str,
    *,
    rank: int,
    step: Callable[[], float | None],
    barrier: Callable[[], None],
    first: Sequence[float | None] = (),
) -> None:
    """A worker's life after warm-up. `step` runs one optimizer step to its end and returns the loss, if this rank has
    it; `barrier` waits for all ranks; `first` are the losses of the warm-up."""
    root = Path(folder)
    write_json(root / f"ready-{rank}", {"first": _known(first)})
    for burst in range(1_000_000):
        steps = wait_for(root / f"go-{burst}.json", timeout_s=3600.0)["steps"]
        if steps == 0:
            return
        barrier()
        started = time.perf_counter()
        losses = [step() for _ in range(steps)]
        barrier()
        seconds = (time.perf_counter() - started) / steps
        if own := _known(losses):
            write_json(root / f"losses-{burst}-{rank}.json", own)
        barrier()
        if rank == 0:
            files = sorted(root.glob(f"losses-{burst}-*.json"))
            mean = mean_over_ranks([json.loads(file.read_text()) for file in files])
            write_json(root / f"done-{burst}.json", {"seconds": seconds, "losses": mean})


def mean_over_ranks(losses: Sequence[Sequence[float]]) -> list[float]:
    """The mean of each step's loss over the ranks; every rank saw as many tokens."""
    return [sum(of_step) / len(of_step) for of_step in zip(*losses, strict=True)]


def _known(losses: Sequence[float | None]) -> list[float]:
    return [loss for loss in losses if loss is not None]
