"""The optimizer step in CPU memory beside its peers, in one run.

    plain       fp32 gradients, fp32 parameters and moments: ours, torch.optim.AdamW(fused=True), DeepSpeedCPUAdam
    offloaded   bf16 gradients in, their norm, unscaling and clipping, fp32 update, bf16 parameters out: ours in two
                passes, torch in the five that it needs: grad.float(), norm, mul_, AdamW, copy_. Once as written, and
                once ("torch kept") with the fp32 gradients' memory kept from step to step

Every contender is a process of its own; they take turns, ours, peer, peer, ours ... The figure is the median over the
turns of ours / peer, with its 20th and 80th percentile; below 1, ours is faster. DeepSpeed takes part where it imports
in `--peers-python`; the first run builds its operator (a minute). If such a build was interrupted, remove the file
`lock` in the folder of torch's extensions, or the next one waits for it for ever.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cpu import append, machine
from protocol import serve, wait_for, write_json

HERE = Path(__file__).parent
PLAIN = ("ours", "torch", "deepspeed")
OFFLOADED = ("ours", "torch", "torch kept")
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, LOSS_SCALE, MAX_NORM = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1024.0, 1.0
BYTES = {"plain": 28, "offloaded": 30}
"""Per element, of ours: the step's 28, and the norm's 2."""


def ours(num_elements: int, *, is_offloaded: bool) -> Callable[[], None]:
    """A step of megallm_kernels.cpu_adamw, in memory as the engine takes it."""
    import torch

    from megallm_kernels.cpu_adamw import cpu_adamw_, squared_norm, why_absent
    from megallm_kernels.host_memory import host_zeros

    if why_absent():
        raise SystemExit(why_absent())
    p, m, v = (host_zeros(num_elements, torch.float32, pinned=False) for _ in range(3))
    p.copy_(torch.randn(num_elements))
    given = _gradient(num_elements, is_offloaded)
    grad = host_zeros(num_elements, given.dtype, pinned=False).copy_(given)
    copies = [host_zeros(num_elements, torch.bfloat16, pinned=False)] * is_offloaded
    del given
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        scale = 1.0
        if is_offloaded:
            scale = _factor(math.sqrt(squared_norm([grad])))
        cpu_adamw_(
            [p], [grad], [m], [v], copies, step=done, learning_rate=LEARNING_RATE, grad_scale=scale, beta1=BETAS[0],
            beta2=BETAS[1], eps=EPS, weight_decay=WEIGHT_DECAY,
        )  # fmt: skip

    return step


def torch_adamw(num_elements: int, *, is_offloaded: bool, keeps_buffer: bool = False) -> Callable[[], None]:
    """A step of torch's fused AdamW, with the passes around it."""
    import torch

    p = torch.nn.Parameter(torch.randn(num_elements))
    grad = _gradient(num_elements, is_offloaded)
    p.grad = None if is_offloaded else grad
    buffer = torch.empty_like(p.detach()) if keeps_buffer else None
    copy = torch.empty_like(grad)
    optimizer = torch.optim.AdamW(
        [p], lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )  # fmt: skip

    def step() -> None:
        if is_offloaded:
            p.grad = grad.float() if buffer is None else buffer.copy_(grad)
            p.grad.mul_(_factor(float(torch.linalg.vector_norm(p.grad))))
        optimizer.step()
        if is_offloaded:
            copy.copy_(p.detach())
            p.grad = None

    return step


def deepspeed_adamw(num_elements: int, *, is_offloaded: bool) -> Callable[[], None]:
    """A step of DeepSpeedCPUAdam."""
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    p = torch.nn.Parameter(torch.randn(num_elements))
    p.grad = _gradient(num_elements, is_offloaded)
    optimizer = DeepSpeedCPUAdam(
        [p], lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, adamw_mode=True
    )  # fmt: skip
    return optimizer.step


CONTENDERS: dict[str, Callable[..., Callable[[], None]]] = {
    "ours": ours, "torch": torch_adamw, "torch kept": partial(torch_adamw, keeps_buffer=True),
    "deepspeed": deepspeed_adamw,
}  # fmt: skip


def _gradient(num_elements: int, is_offloaded: bool) -> Any:
    import torch

    grad = torch.randn(num_elements) * 0.01
    return grad.mul_(LOSS_SCALE).bfloat16() if is_offloaded else grad


def _factor(scaled_norm: float) -> float:
    """Unscales and clips."""
    return min(1.0, MAX_NORM / (scaled_norm / LOSS_SCALE + 1e-6)) / LOSS_SCALE


def work(args: argparse.Namespace) -> None:
    """A worker's life."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    step = CONTENDERS[args.worker](args.elements, is_offloaded=args.what == "offloaded")
    for _ in range(2):
        step()
    serve(args.folder, rank=0, step=lambda: step(), barrier=lambda: None)


class Worker:
    """A contender's process, told when to run."""

    def __init__(self, python: str, name: str, what: str, threads: int, elements: int) -> None:
        self._folder, self._burst = Path(tempfile.mkdtemp(prefix="bench-")), 0
        self._log = (self._folder / "log").open("w")
        arguments = ["--worker", name, "--what", what, "--threads", threads, "--elements", elements]
        command = [python, __file__, *map(str, arguments), "--folder", str(self._folder)]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            wait_for(self._folder / "ready-0", timeout_s=300.0, is_alive=self._is_alive)
        except TimeoutError as error:
            self._process.kill()
            raise RuntimeError(f"{name} did not start:\n{(self._folder / 'log').read_text()[-3000:]}") from error

    def burst(self, steps: int) -> float:
        """Seconds per step."""
        write_json(self._folder / f"go-{self._burst}.json", {"steps": steps})
        done = wait_for(self._folder / f"done-{self._burst}.json", timeout_s=600.0, is_alive=self._is_alive)
        self._burst += 1
        return done["seconds"]

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


def compare(what: str, names: tuple[str, ...], threads: int, args: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each peer, from turns that all contenders share."""
    workers: dict[str, Worker] = {}
    times: dict[str, list[float]] = {name: [] for name in names}
    try:
        for name in names:
            python = args.peers_python if name == "deepspeed" else sys.executable
            workers[name] = Worker(python, name, what, threads, args.elements)
        for _ in range(args.rounds):
            for name, worker in workers.items():
                times[name].append(worker.burst(args.steps))
    finally:
        for worker in workers.values():
            worker.end()
    return [_row(what, peer, threads, times["ours"], times[peer], args) for peer in names[1:]]


def _row(
    what: str, peer: str, threads: int, own: list[float], theirs: list[float], args: argparse.Namespace
) -> dict[str, object]:  # fmt: skip
    ratios = sorted(a / b for a, b in zip(own, theirs, strict=True))
    return {
        "what": what,
        "peer": peer,
        "threads": threads,
        "ratio_p50": round(statistics.median(ratios), 4),
        "ratio_p20": round(ratios[int(0.2 * (len(ratios) - 1))], 4),
        "ratio_p80": round(ratios[int(0.8 * (len(ratios) - 1) + 0.999)], 4),
        "ours_ms": round(statistics.median(own) * 1e3, 2),
        "peer_ms": round(statistics.median(theirs) * 1e3, 2),
        "ours_gb_s": round(BYTES[what] * args.elements / statistics.median(own) / 1e9, 1),
        "elements": args.elements,
        "rounds": args.rounds,
        "steps_per_round": args.steps,
    }


def has_deepspeed(python: str | None) -> bool:
    """Whether that environment has it; says so where not."""
    if python is None:
        print("no DeepSpeed: name an environment that has it with --peers-python")
        return False
    done = subprocess.run([python, "-c", "import deepspeed.ops.adam"], capture_output=True, text=True)
    if done.returncode != 0:
        print(f"no DeepSpeed: {done.stderr.strip().splitlines()[-1]}")
    return done.returncode == 0


def main() -> int:
    """Runs the comparisons, prints a table, appends rows to benchmarks/results/cpu_adamw.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", help="interpreter of an environment that has deepspeed")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=3, help="steps of one turn")
    parser.add_argument("--elements", type=int, default=100_000_000)
    parser.add_argument("--threads-list", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", default=str(HERE / "results" / "cpu_adamw.csv"))
    parser.add_argument("--what", choices=["plain", "offloaded"], help="this comparison alone")
    for internal in ("--worker", "--folder"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return 0
    plain = PLAIN if has_deepspeed(args.peers_python) else PLAIN[:2]
    about = machine() | {"peers": " ".join(plain[1:])}
    rows = []
    print(f"{'what':10} {'peer':10} threads  {'ours':>9} {'peer':>9}   ratio (20th - 80th percentile)", flush=True)
    for what, names in (("plain", plain), ("offloaded", OFFLOADED)):
        for threads in args.threads_list if args.what in (None, what) else ():
            for row in compare(what, names, threads, args):
                rows.append(row | about)
                print(
                    f"{what:10} {row['peer']:10} {threads:>7} {row['ours_ms']:>7} ms {row['peer_ms']:>6} ms   "
                    f"{row['ratio_p50']:.3f} ({row['ratio_p20']:.3f} - {row['ratio_p80']:.3f})",
                    flush=True,
                )
    append(Path(args.out), rows)
    print(f"{len(rows)} rows added to {args.out}; goals: plain at most 1.02, offloaded at most 0.5")
    return 0


if __name__ == "__main__":
    sys.exit(main())
