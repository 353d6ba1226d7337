"""GRPO on sums that can be checked: how many does a policy get right before and after? Run by hand, minutes.

    python benchmarks/grpo_learning.py --seeds 1234 1 2

Each seed trains as `python examples/grpo.py --seed N` does, all from the same model, which is made first and is right
in few of its answers. All of them are asked every problem, of those that are trained on and of the held-out ones:
greedily, and with 8 samples each at temperature 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

from cpu import HERE, append, machine

from megallm.cli.reinforcement import ARITHMETIC
from megallm.data.arithmetic import arithmetic_prompts
from megallm.generate.sampling import Sampling
from megallm.monitor.rl_plots import plot_rl
from megallm.parallel.mesh import Mesh
from megallm.trainers.engine import Engine
from megallm.trainers.source import open_model

_NEW_TOKENS, _SAMPLES = 8, 8


def main() -> int:
    """Trains, prints a table, draws a picture, appends rows."""
    args = flags()
    args.work.mkdir(parents=True, exist_ok=True)
    folders = {f"seed {seed}": args.work / f"grpo-{seed}" for seed in args.seeds}
    for seed, folder in zip(args.seeds, folders.values(), strict=True):
        print(f"training: seed {seed}", flush=True)
        with folder.with_suffix(".log").open("w") as log:
            command = [sys.executable, str(HERE.parent / "examples" / "grpo.py"), "--seed", str(seed)]
            command += ["--save", folder.name, *args.more]
            subprocess.run(command, check=True, cwd=args.work, stdout=log, stderr=subprocess.STDOUT)
    report(args, {"before": args.work / ARITHMETIC} | folders)
    plot_rl(
        {name: folder / "metrics.jsonl" for name, folder in folders.items()}, args.picture,
        title="GRPO on one-digit sums", only=("score", "entropy (nats a token)", "groups that say nothing"),
    )  # fmt: skip
    return 0


def flags() -> argparse.Namespace:
    """What this is told; what follows `--` is for examples/grpo.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/grpo_learning"), help="checkpoints, logs and metrics")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "grpo_learning.csv")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs" / "img" / "grpo.png")
    parser.add_argument("more", nargs="*", help="after --: flags of examples/grpo.py")
    return parser.parse_args()


def report(args: argparse.Namespace, folders: dict[str, Path]) -> None:
    """The table and the rows."""
    print(f"{'':10} {'train greedy':>13} {'train sampled':>13} {'valid greedy':>13} {'valid sampled':>13}")
    about = machine() | {"peers": ""}
    for name, folder in folders.items():
        engine = open_policy(folder)
        found = {
            f"{split}_{how}": round(100.0 * accuracy(engine, folder, split, temperature), 1)
            for split in ("train", "valid") for how, temperature in (("greedy", 0.0), ("sampled", 1.0))
        }  # fmt: skip
        print(f"{name:10} " + " ".join(f"{value:11.1f} %" for value in found.values()), flush=True)
        metrics = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if name != "before" else []
        lines = [line for line in lines if "score" in line]
        row: dict[str, object] = {"policy": name, "iterations": len(lines), **found}
        row["seconds"] = round(sum(line["step_time_s"] for line in lines), 1)
        append(args.out, [row | about])


def open_policy(folder: Path) -> Engine:
    """The newest checkpoint."""
    source = open_model(str(folder))
    engine = Engine(source.config, Mesh.build(), train=False)
    source.load_weights(engine)
    return engine


def accuracy(engine: Engine, folder: Path, split: Literal["train", "valid"], temperature: float) -> float:
    """The share of right answers to all problems of a side; several to each if they are sampled."""
    tokenizer, problems = open_model(str(folder)).tokenizer(), arithmetic_prompts(split)
    prompts = [tokenizer.encode(problem["prompt"], add_special_tokens=False) for problem in problems]
    number = _SAMPLES if temperature else 1
    found = engine.rollout(
        prompts, max_new_tokens=_NEW_TOKENS, num_samples=number,
        sampling=Sampling(temperature=temperature, seed=1, stop_ids=(tokenizer.eos_id,)),
    )  # fmt: skip
    wanted = [problem["answer"] for problem in problems for _ in range(number)]
    said = [tokenizer.decode(ids).strip() for ids in found.token_ids]
    return sum(map(str.__eq__, said, wanted)) / len(wanted)


if __name__ == "__main__":
    sys.exit(main())
