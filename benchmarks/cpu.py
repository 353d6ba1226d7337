"""Training speed on one CPU, beside peers, in one run: `make bench-cpu`.

Every pair of workers (ours, a peer) is built at equal shape, precision, threads and batch, and then takes turns:
ours, peer, ours, peer ... The figure is the median over the turns of ours / peer, with its 20th and 80th percentile;
a ratio below 1 means that ours is faster. Absolute times depend on the machine and are given for orientation.

A round in which other programs took more than `--disturbed` of the CPUs is left out and made up for, where /proc says.

Peers live in a virtual environment of their own (`--peers-python`, or one made in `--peers-dir`).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from protocol import mean_over_ranks, wait_for, write_json
from quiet import Others

HERE = Path(__file__).parent
PEERS = (
    "torch==2.13.0", "transformers==5.23.0", "megatron-core==0.16.1", "deepspeed==0.19.8", "trl==1.16.0",
    "datasets==5.2.0", "ninja==1.13.2", "psutil", "numpy",
)  # fmt: skip
SMALL = {"layers": 4, "hidden": 256, "intermediate": 688, "heads": 8, "kv_heads": 4, "vocab": 4096, "seq": 256,
         "micro_batch": 2, "microbatches": 4}  # fmt: skip
LARGE = SMALL | {"hidden": 512, "intermediate": 1376, "layers": 6}


MOST_APART = 1e-4
"""Between the first losses of two workers with equal weights; they come out 1e-6 apart."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One comparison."""

    name: str
    peer: str
    ours: str = "ours"
    """Our worker's file, as `peer` is the other's."""
    shape: dict[str, int]
    ranks: int = 1
    threads: int = 1
    layout: dict[str, object]
    peer_layout: dict[str, object] | None = None


PAIRS = (
    Pair(name="1 rank", peer="hf", shape=SMALL, layout={}),
    Pair(name="1 rank, larger", peer="hf", shape=LARGE, layout={}),
    Pair(name="1 rank, 2 threads", peer="hf", shape=SMALL, threads=2, layout={}),
    Pair(name="tp 2, sequence parallel", peer="megatron_core", shape=SMALL, ranks=2, layout={"tp": 2}),
    Pair(name="tp 2", peer="megatron_core", shape=SMALL, ranks=2, layout={"tp": 2, "sequence_parallel": False}),
    Pair(name="pp 2, 1f1b", peer="megatron_core", shape=SMALL, ranks=2, layout={"pp": 2}),
    Pair(name="dp 2", peer="megatron_core", shape=SMALL, ranks=2, layout={}),
    Pair(name="dp 2, peer with zero 1", peer="megatron_core", shape=SMALL, ranks=2, layout={}, peer_layout={"zero": 1}),
)


class Worker:
    """A process (or torchrun's processes) that runs bursts of steps when told."""

    def __init__(
        self, script: Path, python: str, pair: Pair, layout: dict[str, object], *, weights: str | None = None
    ) -> None:
        """weights: a directory with the initial ones."""
        self._folder = Path(tempfile.mkdtemp(prefix="bench-"))
        self._burst = 0
        arguments = [str(script), "--folder", str(self._folder), "--shape", json.dumps(pair.shape)]
        arguments += ["--threads", str(pair.threads)]
        if script.name != "hf.py":
            arguments += ["--layout", json.dumps(layout)]
        if weights is not None:
            arguments += ["--weights", weights]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(pair.ranks)]
        command = [python, *(launcher if pair.ranks > 1 else []), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": str(pair.threads), "PYTHONWARNINGS": "ignore"}
        self._log = (self._folder / "log").open("w")
        self._process = subprocess.Popen(command, env=environment, stdout=self._log, stderr=subprocess.STDOUT)
        self._num_ranks = pair.ranks

    def wait_ready(self) -> list[float]:
        """The losses of the warm-up, after it."""
        try:
            files = [self._folder / f"ready-{rank}" for rank in range(self._num_ranks)]
            ready = [wait_for(file, timeout_s=300.0, is_alive=self._is_alive) for file in files]
            return mean_over_ranks([each["first"] for each in ready if each["first"]])
        except TimeoutError as error:
            log = (self._folder / "log").read_text()[-6000:]
            raise RuntimeError(f"a worker did not start:\n{log}") from error

    def burst(self, steps: int) -> tuple[float, list[float]]:
        """(seconds per step, losses) of so many steps."""
        write_json(self._folder / f"go-{self._burst}.json", {"steps": steps})
        done = wait_for(self._folder / f"done-{self._burst}.json", timeout_s=600.0, is_alive=self._is_alive)
        self._burst += 1
        return done["seconds"], done["losses"]

    def end(self) -> None:
        """Lets the process leave."""
        write_json(self._folder / f"go-{self._burst}.json", {"steps": 0})
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    def _is_alive(self) -> bool:
        return self._process.poll() is None


def compare(
    pair: Pair,
    *,
    peers_python: str,
    rounds: int,
    steps: int,
    weights: str | None = None,
    disturbed: float = 0.0,
    limit_s: float = 600.0,
) -> dict[str, object]:
    """One row of results.

    weights: a directory of initial weights for both; then their first losses must agree, or RuntimeError.
    disturbed: rounds in which others used more than this share of the CPUs are left out and made up for, until limit_s;
    0 keeps all.
    """
    peer_layout = pair.layout if pair.peer_layout is None else pair.peer_layout
    own_times, peer_times = [], []
    workers: list[Worker] = []
    num_disturbed, others, deadline = 0, Others(), time.monotonic() + limit_s
    try:
        workers.append(ours := Worker(HERE / f"{pair.ours}.py", sys.executable, pair, pair.layout, weights=weights))
        first = ours.wait_ready()
        script = HERE / "peers" / f"{pair.peer}.py"
        workers.append(peer := Worker(script, peers_python, pair, peer_layout, weights=weights))
        gap = max((abs(a - b) for a, b in zip(first, peer.wait_ready(), strict=False)), default=0.0)
        if weights is not None and gap > MOST_APART:
            raise RuntimeError(f"{pair.name}: from equal weights, the first losses are {gap} apart")
        while len(own_times) < rounds and (time.monotonic() < deadline or not own_times):
            if disturbed:
                others.wait_until_idle(disturbed, timeout_s=deadline - time.monotonic())
            others.start()
            order = workers if len(own_times) % 2 == 0 else workers[::-1]
            turns = {worker: worker.burst(steps) for worker in order}
            if disturbed and others.share() > disturbed and time.monotonic() < deadline:
                num_disturbed += 1
                continue
            (seconds, own_losses), (peer_seconds, peer_losses) = turns[ours], turns[peer]
            own_times.append(seconds)
            peer_times.append(peer_seconds)
    finally:
        for worker in workers:
            worker.end()
    ratios = sorted(a / b for a, b in zip(own_times, peer_times, strict=True))
    return {
        "what": pair.name,
        "peer": pair.peer,
        "ranks": pair.ranks,
        "threads": pair.threads,
        "ratio_p50": round(statistics.median(ratios), 4),
        "ratio_p20": round(ratios[int(0.2 * (len(ratios) - 1))], 4),
        "ratio_p80": round(ratios[int(0.8 * (len(ratios) - 1) + 0.999)], 4),
        "ours_ms": round(statistics.median(own_times) * 1e3, 1),
        "peer_ms": round(statistics.median(peer_times) * 1e3, 1),
        "ours_loss": round(own_losses[-1], 4),
        "peer_loss": round(peer_losses[-1], 4) if peer_losses else None,
        "rounds": len(ratios),
        "steps_per_round": steps,
        "shape": json.dumps(pair.shape),
        "rounds_left_out": num_disturbed,
        "first_losses_apart": f"{gap:.1e}" if weights is not None else "",
    }


def machine() -> dict[str, object]:
    """What every row carries."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    commit = _git("rev-parse", "--short", "HEAD")
    dirty = _git("status", "--porcelain", "megallm")
    import torch

    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peers": " ".join(PEERS[1:5]),
        "commit": commit + ("+changes" if dirty else ""),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_without_place, sys.argv[1:])]),
    }


def _without_place(word: str) -> str:
    """Paths of one machine are of no use to others."""
    return Path(word).name if word.startswith("/") else word


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=HERE.parent).stdout.strip()


def peers_python(given: str | None, folder: Path) -> str:
    """An interpreter that has the peers; makes one in `folder` if needed (minutes, once)."""
    if given is not None:
        return given
    python, installed = folder / "bin" / "python", folder / ".installed"
    if not installed.exists() or installed.read_text() != " ".join(PEERS):
        print(f"installing the peers into {folder}: {', '.join(PEERS)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEERS], check=True)
        installed.write_text(" ".join(PEERS))
    return str(python)


def flags(description: str | None, *, out: str, rounds: int, steps: int, disturbed: float) -> argparse.ArgumentParser:
    """What cpu.py and zero.py are told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", help="interpreter of an environment that has the peers")
    parser.add_argument("--peers-dir", default=str(Path.home() / ".cache" / "megallm" / "bench-peers"))
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each worker")
    parser.add_argument("--steps", type=int, default=steps, help="steps of one turn")
    parser.add_argument("--only", default="", help="run the pairs whose name or peer contains this")
    parser.add_argument("--disturbed", type=float, default=disturbed, help="share of the CPUs; 0 keeps all rounds")
    parser.add_argument("--limit-s", type=float, default=600.0, help="time for one pair, when rounds are disturbed")
    parser.add_argument("--out", default=str(HERE / "results" / out))
    return parser


def run(pairs: Sequence[Pair], args: argparse.Namespace, python: str, *, weights: str | None = None) -> int:
    """Runs the pairs, prints a table, appends rows to a CSV file."""
    about, rows, started = machine(), 0, time.monotonic()
    print(f"{'what':32} {'peer':14} {'ours':>9} {'peer':>9}   ratio (20th - 80th percentile)", flush=True)
    for pair in pairs:
        if args.only not in f"{pair.name} {pair.peer}":
            continue
        row = compare(
            pair, peers_python=python, rounds=args.rounds, steps=args.steps, weights=weights, disturbed=args.disturbed,
            limit_s=args.limit_s,
        )  # fmt: skip
        append(Path(args.out), [row | about])
        rows += 1
        print(
            f"{row['what']:32} {row['peer']:14} {row['ours_ms']:>6} ms {row['peer_ms']:>6} ms   {row['ratio_p50']:.3f} "
            f"({row['ratio_p20']:.3f} - {row['ratio_p80']:.3f}), {row['rounds']} rounds",
            flush=True,
        )
    print(f"{rows} rows added to {args.out} in {time.monotonic() - started:.0f} s")
    return 0


def append(path: Path, rows: list[dict[str, object]]) -> None:
    """Adds rows to a CSV file: with a header if it is new, else what its header has columns for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    columns = list(rows[0])
    if not is_new:
        with path.open(newline="") as file:
            columns = next(csv.reader(file))
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns, extrasaction="ignore")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    """Training speed beside Hugging Face and megatron-core."""
    args = flags(__doc__, out="cpu.csv", rounds=8, steps=3, disturbed=0.0).parse_args()
    return run(PAIRS, args, peers_python(args.peers_python, Path(args.peers_dir)))


if __name__ == "__main__":
    sys.exit(main())
