"""Steps that are run again and again on the same buffers: launched op by op, or recorded once as CUDA graphs.

    record(run)     runs it, and gives what runs it again
        Direct          by calling it
        CudaGraphs      by one launch of all its kernels, with the addresses and sizes that they had

What is recorded reads and writes tensors made before, at the same places every time, and never waits for the device.
Python's part of it (which slices, which layers) happens once: a caller records anew for every number of rows and every
number of cells, which `bucket` keeps few.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch

from megallm.parallel.mesh import Mesh

Run = Callable[[], None]


class Recorder(Protocol):
    """Makes steps repeatable."""

    @property
    def is_recording(self) -> bool:
        """Whether sizes must be few, since each is recorded for itself."""
        ...

    def record(self, run: Run) -> Run:
        """Runs it once; what runs it again, on what its buffers hold then."""
        ...


class Direct:
    """Runs Python every time."""

    is_recording = False

    def record(self, run: Run) -> Run:
        """Runs it once; `run` itself."""
        run()
        return run


class CudaGraphs:
    """A CUDA graph for everything recorded. All share one pool of memory: none of them runs beside another, and what
    they leave behind lies in buffers of the caller."""

    is_recording = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()

    def record(self, run: Run) -> Run:
        """Runs it once as it is, which makes libraries and kernels ready, and captures it then; the graph's launch.

        Other threads may use the GPU meanwhile (thread_local): NCCL's watchdog does.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay  # type: ignore[no-any-return]


def make_recorder(mesh: Mesh, *, wanted: bool) -> Recorder:
    """CUDA graphs where they can be and are wanted. Why they cannot on a GPU is logged, once."""
    if not wanted or mesh.device.type != "cuda":
        return Direct()
    why_not = refusal(mesh)
    if why_not is None:
        return CudaGraphs(mesh.device)
    _say_once(f"decoding without CUDA graphs: {why_not}")
    return Direct()


def refusal(mesh: Mesh) -> str | None:
    """Why a step on this mesh cannot be one CUDA graph; None if it can."""
    if mesh.pp.size > 1:
        return f"a step passes through pp {mesh.pp.size} stages, whose ranks wait for each other in between"
    if mesh.tp.size > 1 and mesh.tp.backend != "nccl":
        return f"tp's collectives run on {mesh.tp.backend}, on the host; NCCL's can be captured"
    return None


def bucket(needed: int, *, least: int, most: int) -> int:
    """least * 2^n, the first that is `needed` or more; `most` where that is less. needed <= most."""
    size = least
    while size < needed:
        size *= 2
    return min(size, most)


@cache
def _say_once(line: str) -> None:
    logging.getLogger("megallm.generate").info(line)
