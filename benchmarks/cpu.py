"""Training speed on one CPU, beside peers, in one run: `make bench-cpu`.

Every pair of workers (ours, a peer) is built at equal shape, precision, threads and batch, and then takes turns:
ours, peer, ours, peer ... The figure is the median over the turns of ours / peer, with its 20th and 80th percentile;
a ratio below 1 means that ours is faster. Absolute times depend on the machine and are given for orientation.

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
from dataclasses import dataclass
from pathlib import Path

from protocol import wait_for, write_json

HERE = Path(__file__).parent
PEERS = ("torch==2.13.0", "transformers==5.23.0", "megatron-core==0.16.1", "psutil", "numpy")
SMALL = {"layers": 4, "hidden": 256, "intermediate": 688, "heads": 8, "kv_heads": 4, "vocab": 4096, "seq": 256,
         "micro_batch": 2, "microbatches": 4}  # fmt: skip
LARGE = SMALL | {"hidden": 512, "intermediate": 1376, "layers": 6}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One comparison."""

    name: str
    peer: str
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

    def __init__(self, script: Path, python: str, pair: Pair, layout: dict[str, object]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="bench-"))
        self._burst = 0
        arguments = [str(script), "--folder", str(self._folder), "--shape", json.dumps(pair.shape)]
        arguments += ["--threads", str(pair.threads)]
        if script.name != "hf.py":
            arguments += ["--layout", json.dumps(layout)]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(pair.ranks)]
        command = [python, *(launcher if pair.ranks > 1 else []), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": str(pair.threads), "PYTHONWARNINGS": "ignore"}
        self._log = (self._folder / "log").open("w")
        self._process = subprocess.Popen(command, env=environment, stdout=self._log, stderr=subprocess.STDOUT)
        self._num_ranks = pair.ranks

    def wait_ready(self) -> None:
        """Returns after warm-up."""
        try:
            for rank in range(self._num_ranks):
                wait_for(self._folder / f"ready-{rank}", timeout_s=300.0, is_alive=self._is_alive)
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


def compare(pair: Pair, *, peers_python: str, rounds: int, steps: int) -> dict[str, object]:
    """One row of results."""
    peer_layout = pair.layout if pair.peer_layout is None else pair.peer_layout
    own_times, peer_times = [], []
    workers: list[Worker] = []
    try:
        workers.append(ours := Worker(HERE / "ours.py", sys.executable, pair, pair.layout))
        ours.wait_ready()
        workers.append(peer := Worker(HERE / "peers" / f"{pair.peer}.py", peers_python, pair, peer_layout))
        peer.wait_ready()
        for _ in range(rounds):
            seconds, own_losses = ours.burst(steps)
            own_times.append(seconds)
            seconds, peer_losses = peer.burst(steps)
            peer_times.append(seconds)
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
        "rounds": rounds,
        "steps_per_round": steps,
        "shape": json.dumps(pair.shape),
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
        "peers": " ".join(PEERS[1:3]),
        "commit": commit + ("+changes" if dirty else ""),
        "command": "python benchmarks/cpu.py " + " ".join(sys.argv[1:]),
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=HERE.parent).stdout.strip()


def peers_python(given: str | None, folder: Path) -> str:
    """An interpreter that has the peers; makes one in `folder` if needed (minutes, once)."""
    if given is not None:
        return given
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        print(f"installing the peers into {folder}: {', '.join(PEERS)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEERS], check=True)
        (folder / ".installed").touch()
    return str(python)


def main() -> int:
    """Runs the pairs, prints a table, appends rows to benchmarks/results/cpu.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", help="interpreter of an environment that has the peers")
    parser.add_argument("--peers-dir", default=str(Path.home() / ".cache" / "megallm" / "bench-peers"))
    parser.add_argument("--rounds", type=int, default=8, help="turns of each worker")
    parser.add_argument("--steps", type=int, default=3, help="steps of one turn")
    parser.add_argument("--only", default="", help="run the pairs whose name or peer contains this")
    parser.add_argument("--out", default=str(HERE / "results" / "cpu.csv"))
    args = parser.parse_args()
    python = peers_python(args.peers_python, Path(args.peers_dir))
    about, rows, started = machine(), [], time.monotonic()
    print(f"{'what':28} {'peer':14} {'ours':>9} {'peer':>9}   ratio (20th - 80th percentile)", flush=True)
    for pair in PAIRS:
        if args.only not in f"{pair.name} {pair.peer}":
            continue
        row = compare(pair, peers_python=python, rounds=args.rounds, steps=args.steps)
        rows.append(row | about)
        print(
            f"{row['what']:28} {row['peer']:14} {row['ours_ms']:>6} ms {row['peer_ms']:>6} ms   {row['ratio_p50']:.3f} "
            f"({row['ratio_p20']:.3f} - {row['ratio_p80']:.3f})",
            flush=True,
        )
    if rows:
        append(Path(args.out), rows)
    print(f"{len(rows)} rows added to {args.out} in {time.monotonic() - started:.0f} s")
    return 0


def append(path: Path, rows: list[dict[str, object]]) -> None:
    """Adds rows to a CSV file, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
