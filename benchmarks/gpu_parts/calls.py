"""Contenders: who is timed, in which directions, and why one is absent.

A contender is a small function from a case's buffers to `Directions`: named calls that take the number of a buffer set.
What is differentiable gets its three directions from `autograd_directions`.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from gpu_parts.clock import Call
from gpu_parts.place import L2_BYTES, Place

OURS = "triton"
"""Name of our kernels among the contenders; other back ends of megallm have their names too: cuda, torch, apex."""


@dataclass(frozen=True, kw_only=True)
class Direction:
    """One call to time."""

    call: Call
    setup: Callable[[], None] | None = None
    """Run before, on the same stream; not timed."""
    teardown: Callable[[], None] | None = None
    graph: bool = True
    note: str = ""


Directions = Mapping[str, Direction]
"""fwd, bwd, both (or step)."""


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """One set of a case's tensors."""

    inputs: tuple[torch.Tensor, ...]
    """Those that want gradients have requires_grad set."""
    grads: tuple[torch.Tensor, ...] = ()
    """Of the outputs."""
    constants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Somebody to be timed on a case."""

    name: str
    build: Callable[[Sequence[Buffers]], Directions]
    why_absent: Callable[[], str | None] = lambda: None
    compiles: bool = False
    """Its first call counts against the compile-time budget."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one shape."""

    section: str
    op: str
    """A key of the tables of back ends, or another name."""
    name: str
    size: int
    """As in ops/measured.csv; -1: no row there."""
    make: Callable[[Place, torch.Generator, int], list[Buffers]]
    """Buffer sets; the last argument says how many."""
    contenders: tuple[Contender, ...]
    bytes_moved: Mapping[str, float] = field(default_factory=dict)
    """By direction: the fewest bytes that must be read and written."""
    flops: Mapping[str, float] = field(default_factory=dict)
    set_bytes: float = 0.0
    """Of one buffer set; decides how many sets are rotated."""
    returned_bytes: float = 0.0
    """Outputs that the caller asked for (gradients), which are no extra memory."""
    launches: bool = False
    """Count kernel launches of `step`."""
    mutates: bool = False
    """Some contender overwrites its inputs: each gets fresh ones."""

    @property
    def key(self) -> str:
        """Unique in a run."""
        return f"{self.section}/{self.op}/{self.name}"

    def num_sets(self, place: Place) -> int:
        """Enough sets to exceed the second-level cache three times, at most 16; two where one already does."""
        if place.tiny:
            return 2
        if self.set_bytes > 1.5e9:
            return 1
        return int(min(16, max(2, -(-3 * L2_BYTES // max(self.set_bytes, 1)))))


def autograd_directions(
    function: Callable[..., Any], sets: Sequence[Buffers], *, graph: bool = True, retain: bool = True
) -> Directions:
    """fwd, bwd and both of `function(*inputs, **constants)`; `retain=False`: no bwd, since it runs only once."""
    saved: list[Any] = []

    def forward(i: int) -> tuple[torch.Tensor, ...]:
        out = function(*sets[i].inputs, **sets[i].constants)
        return out if isinstance(out, tuple) else (out,)

    def gradients(i: int, outputs: tuple[torch.Tensor, ...], retain: bool) -> object:
        wanted = [tensor for tensor in sets[i].inputs if tensor.requires_grad]
        return torch.autograd.grad(outputs, wanted, sets[i].grads, retain_graph=retain)

    def setup() -> None:
        saved[:] = [forward(i) for i in range(len(sets))]

    directions = {
        "fwd": Direction(call=forward, graph=graph),
        "both": Direction(call=lambda i: gradients(i, forward(i), False), graph=graph),
    }
    if retain:
        backward = Direction(
            call=lambda i: gradients(i, saved[i], True), setup=setup, teardown=saved.clear, graph=graph
        )
        directions = {"fwd": directions["fwd"], "bwd": backward, "both": directions["both"]}
    return directions


def differentiable(
    name: str, function: Callable[..., Any], *, why_absent: Callable[[], str | None] = lambda: None, note: str = "",
    retain: bool = True, graph: bool = True,
) -> Contender:  # fmt: skip
    """A contender that is one differentiable function."""
    build = partial(autograd_directions, function, retain=retain, graph=graph)
    return Contender(name=name, build=build, why_absent=why_absent, note=note)


def compiled(
    function: Callable[..., Any], *, mode: str | None = "max-autotune-no-cudagraphs", name: str = "torch.compile"
) -> Contender:
    """The plain formula through torch.compile, static shapes."""

    def build(sets: Sequence[Buffers]) -> Directions:
        import torch._functorch.config as functorch_config

        functorch_config.donated_buffer = False  # or a backward could not be repeated on one forward
        torch._dynamo.reset()
        return autograd_directions(torch.compile(function, dynamic=False, mode=mode), sets)

    return Contender(name=name, build=build, why_absent=needs_cuda, compiles=True, note=mode or "default mode")


def needs_cuda() -> str | None:
    """A reason on a machine without a GPU."""
    return None if torch.cuda.is_available() else "needs a GPU"


def needs(*modules: str, cuda: bool = True) -> Callable[[], str | None]:
    """A function that says which of the modules does not import, and why."""

    def why_absent() -> str | None:
        if cuda and not torch.cuda.is_available():
            return "needs a GPU"
        for module in modules:
            top = module.partition(".")[0]
            if importlib.util.find_spec(top) is None:
                return f"{top} is not installed"
            try:
                importlib.import_module(module)
            except Exception as error:  # a package that is there and does not load: its reason is the answer
                return f"{module} does not import: {type(error).__name__}: {error}"
        return None

    return why_absent


def backend_absent(op: str, name: str, place: Place, size: int) -> Callable[[], str | None]:
    """A function that says why megallm's back end cannot run here."""

    def why_absent() -> str | None:
        from megallm.ops.backends import Case as BackendCase
        from megallm.ops.backends import refusal

        case = BackendCase(op=op, device=place.device, dtype=place.dtype, size=size)
        try:
            return refusal(case, name)
        except Exception as error:  # such as a kernel file that is not there
            return f"{type(error).__name__}: {error}"

    return why_absent


def forced(op: str, name: str) -> Any:
    """megallm's choice of back ends with one forced, silent."""
    from megallm.ops.backends import Backends

    return Backends({op: name}, announce=logging.getLogger("bench").debug)


class CompileBudget:
    """Seconds that compiled peers may still spend on their first calls."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    def spend(self, started: float) -> None:
        """Charges the time since `started`, of time.perf_counter."""
        self.left -= time.perf_counter() - started
