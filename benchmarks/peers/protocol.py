"""What every worker of the CPU benchmark shares: the model's shape, the data, the clock, and how a driver talks to it.

A worker is one way of training one model: ours, or a peer's. It builds, warms up, and then trains only when asked, so
that a driver can alternate short bursts of two workers on one machine and both see the same neighbours and the same
clock speed. Between bursts a worker blocks on a read (rank 0) or in a broadcast (other ranks) and uses no processor.

    driver                         worker: rank 0                other ranks
    DIR/commands  "go 5\\n"   --->  read       -- broadcast 5 -->  wait
                                   5 steps                        5 steps
    DIR/answers   {"times_s": [...], "losses": [...]}  <---  write

DIR/commands and DIR/answers are named pipes that the driver makes. The first answer is {"ready": ...}, sent when the
worker has warmed up. "stop", or the end of the pipe (the driver is gone), ends the worker. Without --serve a worker
trains --steps steps and prints the same two answers on standard output.

Only the standard library is needed to import this file; torch is imported where a worker needs it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    import torch

DISTINCT_STEPS = 4
"""Steps after which the data repeat: enough that no step sees the batch before, few enough to be made in advance."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One model, one batch and one layout: what both sides of a comparison are told. fp32, no dropout, no biases."""

    hidden_size: int = 256
    intermediate_size: int = 688
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    vocab_size: int = 4096
    seq_length: int = 256
    micro_batch_size: int = 2
    num_microbatches: int = 4
    """Microbatches of one optimizer step over the whole job; each of dp ranks takes num_microbatches / dp."""
    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    zero: int = 0
    """0, or 1: optimizer state is sharded over dp."""
    threads: int = 1
    """Threads of one rank."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 1234
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of one worker's own, e.g. {"attention": "eager"}; its docstring lists them."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def tokens_per_step(self) -> int:
        return self.num_microbatches * self.micro_batch_size * self.seq_length

    @property
    def num_parameters(self) -> int:
        """Of the Llama model that every worker must build: untied, RMSNorm, SwiGLU, GQA."""
        hidden, head_dim = self.hidden_size, self.hidden_size // self.num_attention_heads
        attention = 2 * hidden * head_dim * (self.num_attention_heads + self.num_key_value_heads)
        block = attention + 3 * hidden * self.intermediate_size + 2 * hidden
        return self.num_hidden_layers * block + 2 * self.vocab_size * hidden + hidden

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        return cls(**json.loads(text))


class Worker(Protocol):
    """What a worker's `build(spec)` returns, on every rank, with torch.distributed initialised if there are several."""

    def train_step(self, step: int) -> float | None:
        """One whole optimizer step on `microbatches(spec, step, ...)`: forward, loss, backward, clip, AdamW, gradients
        dropped. Returns the loss of this rank's microbatches (their mean), None on ranks that have none.
        """

    def num_parameters(self) -> int:
        """Parameters of the whole model, to be compared with the spec's."""

    def describe(self) -> dict[str, Any]:
        """The engine's name and version and the settings it runs with."""


def microbatches(
    spec: Spec, step: int, *, dp_rank: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:  # each (tokens, labels) [B, S] int64
    """This dp rank's microbatches of a step: the same on every worker, repeating after DISTINCT_STEPS steps.

    labels[b, s] is the token after tokens[b, s]; all of them count in the loss.
    """
    import torch

    generator = torch.Generator().manual_seed(spec.seed + step % DISTINCT_STEPS)
    shape = (spec.num_microbatches, spec.micro_batch_size, spec.seq_length + 1)
    tokens = torch.randint(spec.vocab_size, shape, generator=generator)
    share = spec.num_microbatches // spec.dp
    mine = tokens[dp_rank * share : (dp_rank + 1) * share]
    return [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in mine]


def main(build: Callable[[Spec], Worker]) -> None:
    """Run a worker's command line: --spec JSON, then --serve DIR or --steps N, and --warmup N."""
    parser = argparse.ArgumentParser(description="Trains one model and reports the time of each step.")
    parser.add_argument("--spec", default="{}", help="JSON with fields of protocol.Spec")
    parser.add_argument("--serve", metavar="DIR", help="take commands from DIR/commands, answer in DIR/answers")
    parser.add_argument("--steps", type=int, default=10, help="steps to time without --serve")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first timed one")
    args = parser.parse_args()
    spec = Spec.from_json(args.spec)

    import torch

    torch.set_num_threads(spec.threads)
    worker = build(spec)
    if worker.num_parameters() != spec.num_parameters:
        raise RuntimeError(f"the worker's model has {worker.num_parameters():,} parameters, not {spec.num_parameters:,}")
    ranks = _Ranks()
    bursts = _Bursts(worker, ranks)
    warmup = bursts.run(args.warmup)
    ready = {
        "ready": True,
        **worker.describe(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pid": os.getpid(),
        "warmup": warmup,
    }
    with ExitStack() as stack:
        answers: TextIO | None = None
        commands: Iterator[str] = iter([f"go {args.steps}", "stop"])
        if ranks.rank == 0 and args.serve:
            commands = stack.enter_context(open(Path(args.serve) / "commands", encoding="utf-8"))
            answers = stack.enter_context(open(Path(args.serve) / "answers", "w", encoding="utf-8"))
        ranks.say(ready, answers)
        while steps := ranks.from_first(_steps_of(next(commands, "stop")) if ranks.rank == 0 else 0):
            ranks.say(bursts.run(steps), answers)
    ranks.end()


def _steps_of(command: str) -> int:
    words = command.split()
    if words == ["stop"]:
        return 0
    if len(words) != 2 or words[0] != "go" or not words[1].isdigit() or int(words[1]) < 1:
        raise ValueError(f"the worker was told {command!r}: it understands 'go N' with N >= 1, and 'stop'")
    return int(words[1])


class _Bursts:
    """Counts the steps trained so far, so that a burst goes on where the last one ended."""

    def __init__(self, worker: Worker, ranks: _Ranks) -> None:
        self._worker = worker
        self._ranks = ranks
        self._step = 0

    def run(self, steps: int) -> dict[str, list[float]]:
        """Train `steps` steps from a common start. times_s: of each step, on the slowest rank."""
        losses: list[float | None] = []
        self._ranks.barrier()
        marks = [time.perf_counter()]
        for step in range(self._step, self._step + steps):
            losses.append(self._worker.train_step(step))
            marks.append(time.perf_counter())
        self._step += steps
        times = [after - before for before, after in zip(marks, marks[1:], strict=False)]
        return {"times_s": self._ranks.slowest(times), "losses": self._ranks.mean(losses)}


class _Ranks:
    """The few exchanges a worker's ranks need; with one rank, none."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self._dist = dist if dist.is_available() and dist.is_initialized() else None
        self.rank = self._dist.get_rank() if self._dist else 0

    def barrier(self) -> None:
        if self._dist:
            self._dist.barrier()

    def from_first(self, number: int) -> int:
        """Rank 0's number; the other ranks sleep in the receive until it comes."""
        import torch

        tensor = torch.tensor([number])
        if self._dist:
            self._dist.broadcast(tensor, src=0)
        return int(tensor.item())

    def slowest(self, times: list[float]) -> list[float]:
        import torch

        tensor = torch.tensor(times, dtype=torch.float64)
        if self._dist:
            self._dist.all_reduce(tensor, op=self._dist.ReduceOp.MAX)
        return tensor.tolist()

    def mean(self, losses: list[float | None]) -> list[float]:
        """The mean over the ranks that have a loss."""
        import torch

        known = [[loss, 1.0] if loss is not None else [0.0, 0.0] for loss in losses]
        tensor = torch.tensor(known, dtype=torch.float64).reshape(-1, 2)
        if self._dist:
            self._dist.all_reduce(tensor)
        return (tensor[:, 0] / tensor[:, 1]).tolist()

    def say(self, answer: dict[str, Any], answers: TextIO | None) -> None:
        if self.rank == 0:
            print(json.dumps(answer), file=answers, flush=True)

    def end(self) -> None:
        if self._dist:
            self._dist.barrier()
            self._dist.destroy_process_group()
