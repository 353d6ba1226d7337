"""Keeps the cores of a virtual machine awake while ranks on them talk to each other.

A message wakes the rank that waits for it. A virtual core with nothing to do has gone back to its host, and takes up to
milliseconds to return: longer than the message, and than most of what a rank of a small model computes in between. So
one process on each core spins in the scheduler's lowest class, which has the core only while nobody else wants it.

That holds within a session: Linux shares time between sessions first (autogroup), whatever their classes. So this is
for ranks that are this process's own children; programs that are started in sessions of their own would lose half.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_SPIN = """
import ctypes, os, signal, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with its parent, stopped or not
while os.getppid() == int(sys.argv[2]):
    for _ in range(1_000_000):
        pass
"""
_QUOTAS = ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
_FEW = 8
_SPINNING: list[subprocess.Popen[bytes]] = []
"""One for each core, stopped outside of `awake`. Owned by this file."""


def is_worth_it(cpuinfo: str, quotas: list[str], cores: int) -> bool:
    """Whether to spin, from what /proc/cpuinfo says, what the control groups grant, and the number of cores: on a
    virtual machine of a few cores, all of whose time is ours. Under a quota spinning would be paid for."""
    is_virtual = any("hypervisor" in line.split() for line in cpuinfo.splitlines() if line.startswith("flags"))
    return is_virtual and cores <= _FEW and all(quota.split()[:1] in (["max"], ["-1"]) for quota in quotas)


@contextlib.contextmanager
def awake() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Spins as long as the block runs, and this process lives; gives the processes, none where it is not worth it."""
    if not _SPINNING:
        _SPINNING.extend(_begin())
    for process in _SPINNING:
        process.send_signal(signal.SIGCONT)
    try:
        yield list(_SPINNING)
    finally:
        for process in _SPINNING:
            process.send_signal(signal.SIGSTOP)


def fall_asleep() -> None:
    """Ends the processes; `awake` starts new ones."""
    while _SPINNING:
        process = _SPINNING.pop()
        process.kill()
        process.wait()


def _begin() -> list[subprocess.Popen[bytes]]:
    if not (sys.platform == "linux" and hasattr(os, "SCHED_IDLE")):
        return []
    cores = sorted(os.sched_getaffinity(0))
    if not is_worth_it(_read("/proc/cpuinfo"), [text for path in _QUOTAS if (text := _read(path))], len(cores)):
        return []
    command = [sys.executable, "-I", "-S", "-c", _SPIN]
    return [subprocess.Popen([*command, str(core), str(os.getpid())]) for core in cores]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
