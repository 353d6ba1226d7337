"""Steps of a tiny model on ranks of this machine, with gloo's threads as torch leaves them and stepped back.

    python benchmarks/gloo_threads.py --ranks 2 4 8

Each round starts a job: tp as far as 4 and dp beyond, fp32, one thread a rank. Its steps are timed; then gloo's threads
step back (megallm/parallel/gloo_threads.py), as `Mesh.build` has them do otherwise, and as many steps are timed again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cpu import HERE, append, machine


def main() -> int:
    """Prints and appends, for each number of ranks, the medians of both and the median of the rounds' ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="powers of two")
    parser.add_argument("--rounds", type=int, default=5, help="jobs")
    parser.add_argument("--steps", type=int, default=8, help="steps of a job that are timed, each way")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gloo_threads.csv", help="CSV to append to")
    args = parser.parse_args()
    for ranks in args.ranks:
        rounds = [job(ranks, args.steps) for _ in range(args.rounds)]
        left, back = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratios = sorted(after / before for before, after in rounds)
        ratio = statistics.median(ratios)
        print(
            f"{ranks} ranks   {1e3 * back:7.1f} ms stepped back   {1e3 * left:7.1f} ms as they are   "
            f"ratio {ratio:.3f} ({ratios[0]:.3f} - {ratios[-1]:.3f})",
            flush=True,
        )
        row: dict[str, Any] = {
            "ranks": ranks, "rounds": args.rounds, "stepped_back_ms": round(1e3 * back, 1),
            "as_they_are_ms": round(1e3 * left, 1), "ratio": round(ratio, 3), "ratio_low": round(ratios[0], 3),
            "ratio_high": round(ratios[-1], 3),
        }  # fmt: skip
        append(args.out, [row | machine()])
    return 0


def job(ranks: int, steps: int) -> tuple[float, float]:
    """Seconds a step, as they are and stepped back, in processes of their own."""
    context = multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=train, args=(r, ranks, steps, folder, found)) for r in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a rank failed: see above")
    return found.get()


def train(rank: int, ranks: int, steps: int, folder: str, found: Any) -> None:
    """One rank's steps; rank 0 reports."""
    import torch

    from megallm.config.model import ModelConfig
    from megallm.parallel import mesh as mesh_module
    from megallm.parallel.gloo_threads import let_gloo_step_back
    from megallm.trainers.engine import Engine
    from megallm.trainers.losses import language_model_loss

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    where = f"file://{Path(folder) / 'store'}"
    mesh_module.start_process_group(rank=rank, world_size=ranks, device=cpu, init_method=where)
    mesh_module.let_gloo_step_back = lambda: None
    config = ModelConfig(
        family="llama", vocab_size=101, hidden_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=6, intermediate_size=88, max_position_embeddings=64,
    )  # fmt: skip
    tp = min(ranks, 4)
    engine = Engine(config, mesh_module.Mesh.build(tp=tp), micro_batch_size=4, seed=0)
    ids = torch.randint(0, config.vocab_size, (8, 16), generator=torch.Generator().manual_seed(rank // tp))
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1)}

    def seconds() -> float:
        for _ in range(2):
            engine.train_step(batch, language_model_loss).metrics()
        start = time.perf_counter()
        for _ in range(steps):
            engine.train_step(batch, language_model_loss).metrics()
        return (time.perf_counter() - start) / steps

    left = seconds()
    let_gloo_step_back()
    back = seconds()
    if rank == 0:
        found.put((left, back))
    mesh_module.stop_process_group()


if __name__ == "__main__":
    sys.exit(main())
