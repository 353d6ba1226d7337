"""Gloo's threads step back behind those that compute.

Who sends holds the lock of its connection. What it sends wakes gloo's thread in the receiver, which the scheduler may
run at once, in the sender's place; the answer then wakes gloo's thread in the sender, which needs that lock, and asks
for it in a loop (Pair::handleEvents of gloo/transport/tcp/pair.cc) until its share of the core is over: milliseconds,
for messages of microseconds. A thread of the class SCHED_BATCH (sched(7)) takes the core from nobody when it is woken,
and one that is nice has a small share to waste.
`python benchmarks/gloo_threads.py` measures it: ARCHITECTURE.md, D40.
"""

from __future__ import annotations

import os
from pathlib import Path

LOOP = "gloo_tcp_loop"
"""The name gloo gives to its threads that wait for messages; under any other name they stay as they are."""
NICE = 19


def let_gloo_step_back() -> None:
    """Makes this process's threads of gloo SCHED_BATCH and nice. Does nothing where there are none, or no Linux."""
    for thread in loop_threads():
        try:
            os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, thread, NICE)
        except OSError:  # it has ended, or is not ours to change
            continue


def loop_threads() -> list[int]:
    """Thread ids of this process's gloo threads."""
    found = []
    for task in Path("/proc/self/task").glob("*"):
        try:
            if (task / "comm").read_text().strip() == LOOP:
                found.append(int(task.name))
        except OSError:  # it has ended
            continue
    return found
