"""Steps of a small model in programs that share this machine's cores: threads wait as libgomp has it, or asleep.

    python benchmarks/waiting_threads.py --programs 1 2

Each program trains on one rank with a thread for each core, fp32. Each round starts them twice: once with OpenMP's
settings as they are, once as `run_main` leaves them (megallm/runtime/environment.py, `let_waiting_threads_sleep`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from cpu import HERE, append, machine

_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def main() -> int:
    """Prints and appends, for each number of programs, the medians of both and the median of the rounds' ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, nargs="+", default=[1, 2], help="that run at a time")
    parser.add_argument("--rounds", type=int, default=5, help="starts, each way")
    parser.add_argument("--steps", type=int, default=20, help="steps of a program that are timed")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "waiting_threads.csv", help="CSV to append to")
    args = parser.parse_args()
    for name in _SETTINGS:
        os.environ.pop(name, None)
    for programs in args.programs:
        rounds = [
            (job(programs, args.steps, sleep=False), job(programs, args.steps, sleep=True)) for _ in range(args.rounds)
        ]
        spinning, sleeping = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratios = sorted(after / before for before, after in rounds)
        ratio = statistics.median(ratios)
        print(
            f"{programs} programs   {1e3 * sleeping:7.1f} ms a step asleep   {1e3 * spinning:7.1f} ms as it is   "
            f"ratio {ratio:.3f} ({ratios[0]:.3f} - {ratios[-1]:.3f})",
            flush=True,
        )
        row: dict[str, Any] = {
            "programs": programs, "rounds": args.rounds, "sleeping_ms": round(1e3 * sleeping, 1),
            "spinning_ms": round(1e3 * spinning, 1), "ratio": round(ratio, 3), "ratio_low": round(ratios[0], 3),
            "ratio_high": round(ratios[-1], 3),
        }  # fmt: skip
        append(args.out, [row | machine()])
    return 0


def job(programs: int, steps: int, *, sleep: bool) -> float:
    """Seconds a step, the mean over the programs, in processes of their own that start together."""
    context = multiprocessing.get_context("spawn")
    found, ready = context.SimpleQueue(), context.Barrier(programs)
    processes = [context.Process(target=train, args=(steps, sleep, ready, found)) for _ in range(programs)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a program failed: see above")
    return statistics.mean(found.get() for _ in range(programs))


def train(steps: int, sleep: bool, ready: Any, found: Any) -> None:
    """One program."""
    from megallm.runtime.environment import let_waiting_threads_sleep

    if sleep:
        let_waiting_threads_sleep()
    import torch

    from megallm.config.model import ModelConfig
    from megallm.parallel.mesh import Mesh
    from megallm.runtime.launch import device_for
    from megallm.trainers.engine import Engine
    from megallm.trainers.losses import language_model_loss

    device_for(0)
    config = ModelConfig(
        family="llama", vocab_size=2048, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=64, intermediate_size=688, max_position_embeddings=256,
    )  # fmt: skip
    engine = Engine(config, Mesh.build(), micro_batch_size=4, seed=0)
    ids = torch.randint(0, config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    for _ in range(2):
        engine.train_step(batch, language_model_loss).metrics()
    ready.wait()
    start = time.perf_counter()
    for _ in range(steps):
        engine.train_step(batch, language_model_loss).metrics()
    found.put((time.perf_counter() - start) / steps)


if __name__ == "__main__":
    sys.exit(main())
