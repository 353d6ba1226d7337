"""What tests see of other processes and of the work that a function does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType


def state(pid: int) -> str:
    """The process's state in a letter (proc(5)): R runs, S sleeps, T is stopped; nothing if there is no such one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def lives(pid: int) -> bool:
    """Whether the process exists and is more than a corpse that nobody has collected."""
    return state(pid) not in ("", "Z")


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """AssertionError if the condition has not come true in so long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def calls_made(function: Callable[[], object]) -> int:
    """Calls of Python and C functions inside function(): work that no load on the machine changes."""
    count = 0

    def on_event(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(on_event)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count
