"""Steps of a tiny model on ranks of this machine, with gloo's threads stepped back and as torch leaves them.

    python benchmarks/gloo_threads.py --ranks 2 4 8

Both kinds of job take turns; each is the same engine, tp as far as 4 and dp beyond, fp32, one thread a rank. What a job
is told, and nothing else, is whether Mesh.build calls `let_gloo_step_back` (megallm/parallel/gloo_threads.py).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from cpu import HERE, append, machine

from megallm.testing.pool import close_pools, run_ranks


def main() -> int:
    """Prints and appends, for each number of ranks, the medians of both and the median of the turns' ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="powers of two")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each kind")
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn that are timed")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gloo_threads.csv", help="CSV to append to")
    args = parser.parse_args()
    from gloo_threads import seconds_a_step  # ranks import it by this name, not as __main__

    for ranks in args.ranks:
        turns = []
        for _ in range(args.rounds):
            turn = []
            for back in (True, False):
                turn.append(run_ranks(seconds_a_step, ranks, args.steps, back)[0])
                close_pools()  # what has stepped back stays so
            turns.append(turn)
        back, left = (statistics.median(column) for column in zip(*turns, strict=True))
        ratios = sorted(ours / theirs for ours, theirs in turns)
        ratio = statistics.median(ratios)
        print(
            f"{ranks} ranks   {1e3 * back:7.1f} ms stepped back   {1e3 * left:7.1f} ms as they are   "
            f"ratio {ratio:.3f} ({ratios[0]:.3f} - {ratios[-1]:.3f})",
            flush=True,
        )
        row = {
            "ranks": ranks, "rounds": args.rounds, "stepped_back_ms": round(1e3 * back, 1),
            "as_they_are_ms": round(1e3 * left, 1), "ratio": round(ratio, 3), "ratio_low": round(ratios[0], 3),
            "ratio_high": round(ratios[-1], 3),
        }  # fmt: skip
        append(args.out, [row | machine()])
    return 0


def seconds_a_step(rank: int, world_size: int, steps: int, back: bool) -> float:
    """Mean seconds of a step, after two that are not timed."""
    import torch

    from megallm.parallel import mesh as mesh_module
    from megallm.testing.tiny import tiny_config
    from megallm.trainers.engine import Engine
    from megallm.trainers.losses import language_model_loss

    if not back:
        mesh_module.let_gloo_step_back = lambda: None
    tp = min(world_size, 4)
    config = tiny_config("llama", num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4)
    engine = Engine(config, mesh_module.Mesh.build(tp=tp), micro_batch_size=4, seed=0)
    ids = torch.randint(0, config.vocab_size, (8, 16), generator=torch.Generator().manual_seed(rank // tp))
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    for step in range(steps + 2):
        if step == 2:
            start = time.perf_counter()
        engine.train_step(batch, language_model_loss).metrics()
    return (time.perf_counter() - start) / steps


if __name__ == "__main__":
    sys.exit(main())
