"""Keeps the cores of a virtual machine awake while ranks on them talk to each other.

A message wakes the rank that waits for it. A virtual core with nothing to do has gone back to its host, and takes up to
milliseconds to return: longer than the message, and than most of what a rank of a small model computes in between. So
one process on each core spins in the scheduler's lowest class, which has the core only while nobody else wants it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_SPIN = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while os.getppid() == int(sys.argv[2]):
    for _ in range(1_000_000):
        pass
"""
_QUOTAS = ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
_FEW = 8


def is_worth_it(cpuinfo: str, quotas: list[str], cores: int) -> bool:
    """Whether to spin, from what /proc/cpuinfo says, what the control groups grant, and the number of cores: on a
    virtual machine of a few cores, all of whose time is ours. Under a quota spinning would be paid for."""
    is_virtual = any("hypervisor" in line.split() for line in cpuinfo.splitlines() if line.startswith("flags"))
    return is_virtual and cores <= _FEW and all(quota.split()[:1] in (["max"], ["-1"]) for quota in quotas)


@contextlib.contextmanager
def awake() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Spins as long as the block runs, and this process lives; gives the processes, none where it is not worth it."""
    spinning: list[subprocess.Popen[bytes]] = []
    if hasattr(os, "SCHED_IDLE") and hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if is_worth_it(_read("/proc/cpuinfo"), [text for path in _QUOTAS if (text := _read(path))], len(cores)):
            command = [sys.executable, "-I", "-S", "-c", _SPIN]
            spinning = [subprocess.Popen([*command, str(core), str(os.getpid())]) for core in cores]
    try:
        yield spinning
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
