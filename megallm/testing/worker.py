"""One rank of a pool: joins a gloo group once, then runs the functions it is told by name until told to stop.

Whatever it is doing, it ends when its parent does.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT_S = 600
"""A collective that waits longer raises; tests take seconds."""
_this_call = [0]


def call_number() -> int:
    """Which of the pool's calls this process is in, the same on all its ranks; 0 outside a pool."""
    return _this_call[0]


@dataclass(frozen=True, kw_only=True)
class Call:
    """A function by name with its arguments, as sent to every rank."""

    module: str
    qualname: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: tuple[str, ...]
    """The caller's sys.path, so that its test modules import here too."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What became of a call on one rank."""

    result: bytes | None = None
    """The function's result, pickled by value: a tensor must outlive this process."""
    error: str | None = None
    """The traceback's text, if the function raised."""


def serve(rank: int, world_size: int, folder: str, connection: Connection) -> None:
    """Body of a rank's process. Replies once after start-up and once a call; None as a call, or no caller, ends it."""
    threading.Thread(target=_end_with_parent, args=(rank, folder), daemon=True).start()
    stacks = stacks_path(folder, rank).open("w", encoding="utf-8")
    faulthandler.enable(file=stacks, all_threads=True)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends
    torch.set_num_threads(1)
    connection.send_bytes(pickle.dumps(_start(rank, world_size, folder)))
    gc.freeze()  # what exists now stays, so that a collection after each call takes little time
    while True:
        try:
            call = pickle.loads(connection.recv_bytes())
        except EOFError:
            break
        if call is None:
            break
        connection.send_bytes(pickle.dumps(_run(rank, world_size, call)))
    os._exit(0)


def stacks_path(folder: str, rank: int) -> Path:
    """Where the rank writes the stacks of its threads on SIGUSR1 and on a crash."""
    return Path(folder) / f"stacks-{rank}.txt"


def _start(rank: int, world_size: int, folder: str) -> Reply:
    """Joins the group; a pool of one rank has none, as a job of one rank has none."""
    try:
        if world_size > 1:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(str(Path(folder) / "store"), world_size),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
            )
            dist.barrier()
    except Exception:
        return Reply(error=traceback.format_exc())
    return Reply()


def _run(rank: int, world_size: int, call: Call) -> Reply:
    """Runs one call from a fresh state: seed 0, fp32, and afterwards none of the groups that it created."""
    _this_call[0] += 1
    try:
        sys.path[:] = call.path
        function: Any = importlib.import_module(call.module)
        for name in call.qualname.split("."):
            function = getattr(function, name)
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        result = pickle.dumps(function(rank, world_size, *call.args, **call.kwargs))
        if world_size > 1:
            dist.barrier()  # nobody closes a group that another rank still reads from
            _destroy_new_groups()
    except Exception as error:
        return Reply(error=_without_own_frames(error))
    return Reply(result=result)


def _destroy_new_groups() -> None:
    """Destroys all groups but the first: each holds threads and sockets, and a pool serves hundreds of tests."""
    world = dist.group.WORLD
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not world:
            dist.destroy_process_group(group)
    gc.collect()


def _without_own_frames(error: BaseException) -> str:
    """The traceback from the called function on, as text."""
    frames = error.__traceback__.tb_next if error.__traceback__ is not None else None
    shown = frames if frames is not None else error.__traceback__
    return "".join(traceback.format_exception(type(error), error, shown)).rstrip("\n")


def _end_with_parent(rank: int, folder: str) -> None:
    """Ends this process, busy or not, as soon as the parent has gone, however it went."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)
