"""The process that a reward function runs in: `python -m megallm.data.reward_worker`, started by reward_workers.py.

    stdin   {"spec": ..., "start_limit_s": 60, "limit_s": 10}, then {"prompt": ..., "completion": ..., "record": {...}}
    stdout  {"ready": true, "columns": [...]} or {"refused": why}, then for each
            {"score": 1.0} or {"kind": "raised", "detail": ...}

A line each, in JSON. What the function prints goes to stderr, and there is nothing for it to read. The process ends
when stdin does; in the middle of a call a timer of the kernel ends it a little after its limit, whatever holds the
interpreter's lock, so that it does not outlive a caller that was killed.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from typing import Any

from megallm.data.reward_functions import Score, describe, load

MARGIN_S = 5.0
"""From the end of the caller's patience to the end of this process."""


def main() -> None:
    """Serves calls until there are no more."""
    calls, replies = _take_pipes()
    start = json.loads(calls.readline())
    _end_after(start["start_limit_s"])
    try:
        loaded = load(start["spec"])
    except (ValueError, OSError) as error:
        _send(replies, {"refused": str(error)})
        os._exit(0)
    _end_after(None)
    _send(replies, {"ready": True, "columns": loaded.columns})
    for line in calls:
        call = json.loads(line)
        _end_after(start["limit_s"])
        reply = _reply(loaded.score, call)
        _end_after(None)
        _send(replies, reply)
    os._exit(0)  # threads that the function may have left are not waited for


def _reply(function: Score, call: dict[str, Any]) -> dict[str, Any]:
    try:
        found = function(call["prompt"], call["completion"], call["record"])
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        return {"kind": "raised", "detail": describe(error)}
    if not hasattr(type(found), "__float__"):
        return {"kind": "not a number", "detail": f"returned {_shown(found)}"}
    try:
        score = float(found)
    except Exception as error:
        return {"kind": "not a number", "detail": f"returned {_shown(found)}, of which {describe(error)}"}
    if not math.isfinite(score):
        return {"kind": "not a number", "detail": f"returned {score}"}
    return {"score": score}


def _shown(value: Any) -> str:
    try:
        return f"{repr(value)[:80]} ({type(value).__name__})"
    except Exception:
        return f"a {type(value).__name__}"


def _take_pipes() -> tuple[Any, int]:
    """(lines of calls, descriptor for replies), both under numbers that nobody else knows."""
    calls, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    return calls, replies


def _send(replies: int, reply: dict[str, Any]) -> None:
    left = memoryview((json.dumps(reply) + "\n").encode())
    while left:
        left = left[os.write(replies, left) :]


def _end_after(limit_s: float | None) -> None:
    """The kernel ends this process after so long and MARGIN_S; None = not."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0.0 if limit_s is None else limit_s + MARGIN_S)


if __name__ == "__main__":
    main()
