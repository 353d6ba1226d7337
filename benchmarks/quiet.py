"""Whether other programs computed while a worker was timed: a turn that they disturbed can be left out (Linux only).

What all CPUs did comes from /proc/stat, what this program and its descendants did from /proc/PID/stat; the rest is
others', time that a hypervisor took included.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

_PROC = Path("/proc")


class Others:
    """Measures the share of this machine's CPU time that other programs use."""

    def __init__(self) -> None:
        self.is_known = sys.platform == "linux"
        self.start()

    def start(self) -> None:
        """Begins to measure."""
        self._at = self._now() if self.is_known else (0, 0)

    def share(self) -> float:
        """Of all CPUs' time since the start, what others used; 0 where it is not known."""
        if not self.is_known:
            return 0.0
        others, total = (now - then for now, then in zip(self._now(), self._at, strict=True))
        return max(0.0, others / max(1, total))

    def wait_until_idle(self, share: float, *, timeout_s: float) -> bool:
        """Returns True as soon as others used less than `share` for half a second, or False in the end."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.start()
            time.sleep(0.5)
            if self.share() < share:
                return True
        return False

    def _now(self) -> tuple[int, int]:
        """(clock ticks that others computed, all ticks of all CPUs)."""
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, (_PROC / "stat").read_text().split()[1:9])
        own = sum(_own_ticks())
        return user + nice + system + steal - own, user + nice + system + idle + iowait + irq + softirq + steal


def _own_ticks() -> list[int]:
    """Ticks that this process and each of its descendants computed so far."""
    parent, ticks = {}, {}
    for folder in _PROC.iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parent[int(folder.name)] = int(fields[1])
            ticks[int(folder.name)] = int(fields[11]) + int(fields[12])
    own = {os.getpid()}
    while more := {pid for pid, above in parent.items() if above in own} - own:
        own |= more
    return [ticks[pid] for pid in own if pid in ticks]
