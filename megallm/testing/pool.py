"""N ranks on this machine's CPU for a test: `run_ranks(function, 4, ...)` calls function(rank, 4, ...) on each.

Starting processes that import torch takes longer than most tests. So the ranks are forked from one server process that
has imported it already, join a gloo group once, and are kept: one pool for each world size, from its first use to the
end of the session. A pool in which anything went wrong is thrown away, and the next use starts a new one.

    pytest --- forkserver (torch imported, nothing else)
       |           |  fork
       +--pipe-- rank 0, rank 1, ...         calls and results pickled; these are all our own processes
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

from megallm.testing.worker import Call, Reply, serve, stacks_path

_PRELOAD = [
    "torch", "torch.distributed", "torch.testing", "torch.fx.experimental.symbolic_shapes", "numpy", "pytest",
    "megallm.testing.worker",
]  # fmt: skip
"""With what torch itself imports in the first backward of a pipeline."""
_START_TIMEOUT_S = 600.0
_DUMP_TIMEOUT_S = 2.0
_DEATH_TIMEOUT_S = 0.2
_POOLS: dict[int, Pool] = {}
"""The warm pools by world size: the only state, owned by this file."""


class RankError(Exception):
    """A rank raised, died or hung. `rank` is the first that did; the message has its traceback or its stacks."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 1800.0, **kwargs: Any
) -> list[Any]:
    """The results of function(rank, world_size, *args, **kwargs), in order of rank, each called in its own process.

    `function` is of a module's top level. Arguments and results are pickled; tensors arrive as copies. On every rank
    the default process group is a gloo group of all ranks (none when world_size is 1), the seed is 0 and torch has one
    thread. Groups that the function creates are destroyed after it. `timeout`: seconds for the call, start-up aside.

    Raises RankError with the first failing rank's traceback (what other ranks then raise is left out), or, after
    `timeout`, with the stacks of all ranks.
    """
    if "<" in function.__qualname__ or function.__module__ == "__main__":
        raise ValueError(f"{function.__qualname__} cannot be imported by name: define it at the top of a test module")
    call = Call(
        module=function.__module__, qualname=function.__qualname__, args=args, kwargs=kwargs, path=tuple(sys.path)
    )
    pool = _POOLS.get(world_size)
    if pool is None:
        pool = _POOLS[world_size] = Pool(world_size)
    try:
        return pool.run(call, timeout)
    except BaseException:
        close_pool(world_size)
        raise


def close_pool(world_size: int) -> None:
    """Ends the pool of this size, if there is one."""
    pool = _POOLS.pop(world_size, None)
    if pool is not None:
        pool.close()


def close_pools() -> None:
    """Ends all pools; also called at exit."""
    for world_size in list(_POOLS):
        close_pool(world_size)


class Pool:
    """`world_size` processes that wait for calls."""

    def __init__(self, world_size: int) -> None:
        """Starts them; their first reply, awaited with the first call, says whether they could join the group."""
        if world_size < 1:
            raise ValueError(f"world_size is {world_size}: a pool has 1 rank or more")
        self._folder = tempfile.mkdtemp(prefix="megallm-ranks-")
        self._processes: list[ForkServerProcess] = []
        self._connections: list[Connection] = []
        self._is_started = False
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(rank, world_size, self._folder, theirs), name=f"rank-{rank}", daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def run(self, call: Call, timeout: float) -> list[Any]:
        """The call's results, in order of rank. Raises RankError, after which only `close` may be called."""
        if not self._is_started:
            self._replies("start-up", _START_TIMEOUT_S)
            self._is_started = True
        message = pickle.dumps(call)
        for rank, connection in enumerate(self._connections):
            try:
                connection.send_bytes(message)
            except OSError:
                raise self._death(rank, call.qualname) from None
        replies = self._replies(call.qualname, timeout)
        return [pickle.loads(reply.result) for reply in replies if reply.result is not None]

    def close(self) -> None:
        """Kills the processes and removes their files. Nothing of theirs is worth a goodbye."""
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            connection.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _replies(self, what: str, timeout: float) -> list[Reply]:
        """One reply of each rank, in order of rank; raises RankError at the first that is bad, or when time is up."""
        deadline = time.monotonic() + timeout
        replies: dict[int, Reply] = {}
        while len(replies) < len(self._connections):
            waiting = {id(each): rank for rank, each in enumerate(self._connections) if rank not in replies}
            open_connections = [self._connections[rank] for rank in waiting.values()]
            ready = wait(open_connections, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._hang(what, timeout, sorted(waiting.values()))
            for connection in ready:
                rank = waiting[id(connection)]
                replies[rank] = self._reply(rank, what)
        return [replies[rank] for rank in range(len(self._connections))]

    def _reply(self, rank: int, what: str) -> Reply:
        try:
            reply: Reply = pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, OSError):
            raise self._death(rank, what) from None
        if reply.error is not None:
            self._raise_if_one_died(what)
            raise RankError(rank, f"rank {rank} of {len(self._processes)} failed in {what}:\n{reply.error}")
        return reply

    def _raise_if_one_died(self, what: str) -> None:
        """A rank's error may be that its peer is gone: then the peer is the cause, and known here a moment later."""
        gone = wait([process.sentinel for process in self._processes], _DEATH_TIMEOUT_S)
        for rank, process in enumerate(self._processes):
            if process.sentinel in gone:
                raise self._death(rank, what)

    def _death(self, rank: int, what: str) -> RankError:
        """The error for a rank whose process is gone, with what its fault handler wrote."""
        self._processes[rank].join(5.0)
        code = self._processes[rank].exitcode
        cause = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        stacks = self._stacks(rank)
        return RankError(rank, f"rank {rank} of {len(self._processes)} died in {what} ({cause})\n{stacks}".rstrip())

    def _hang(self, what: str, timeout: float, ranks: list[int]) -> RankError:
        """The error for ranks that did not reply in time, with the stacks of each."""
        for rank in ranks:
            pid = self._processes[rank].pid
            if pid is not None and self._processes[rank].is_alive():
                os.kill(pid, signal.SIGUSR1)
        deadline = time.monotonic() + _DUMP_TIMEOUT_S
        while time.monotonic() < deadline and not all(self._stacks(rank) for rank in ranks):
            time.sleep(0.05)
        time.sleep(0.1)  # a dump that has begun is written in well under this
        dumps = "\n".join(f"--- rank {rank}\n{self._stacks(rank)}" for rank in ranks)
        total = len(self._processes)
        return RankError(
            ranks[0], f"ranks {ranks} of {total} did not finish {what} in {timeout:g} s; their stacks:\n{dumps}"
        )

    def _stacks(self, rank: int) -> str:
        path = stacks_path(self._folder, rank)
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""


atexit.register(close_pools)
