"""Spinning on idle cores: only where it helps, in the way of nobody, and not for longer than it is wanted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from watching import lives, state, wait_until

from megallm.testing.awake import awake, fall_asleep, is_worth_it

VIRTUAL, REAL = "model name: x\nflags\t\t: fpu hypervisor avx\n", "model name: hypervisor\nflags\t\t: fpu avx\n"


@pytest.mark.parametrize(
    ("cpuinfo", "quotas", "cores", "expected"),
    [
        (VIRTUAL, [], 2, True),
        (VIRTUAL, ["max 100000\n"], 8, True),
        (VIRTUAL, ["-1\n"], 2, True),
        (VIRTUAL, ["200000 100000\n"], 2, False),
        (VIRTUAL, ["max 100000\n", "50000\n"], 2, False),
        (VIRTUAL, [], 9, False),
        (REAL, [], 2, False),
        ("", [], 2, False),
    ],
)
def test_it_spins_on_small_virtual_machines_without_a_quota(
    cpuinfo: str, quotas: list[str], cores: int, expected: bool
) -> None:
    assert is_worth_it(cpuinfo, quotas, cores) == expected


def test_its_processes_have_the_lowest_class_and_stop_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "SCHED_IDLE"):
        pytest.skip("this system has no SCHED_IDLE")
    monkeypatch.setattr("megallm.testing.awake.is_worth_it", lambda *_: True)
    fall_asleep()
    for _ in range(2):
        with awake() as spinning:
            assert len(spinning) == len(os.sched_getaffinity(0))
            for process in spinning:
                wait_until(lambda process=process: os.sched_getscheduler(process.pid) == os.SCHED_IDLE)
                wait_until(lambda process=process: state(process.pid) == "R")
        for process in spinning:
            wait_until(lambda process=process: state(process.pid) == "T")
    fall_asleep()
    assert all(process.returncode is not None for process in spinning)


def test_they_end_when_their_parent_is_killed() -> None:
    if not hasattr(os, "SCHED_IDLE"):
        pytest.skip("this system has no SCHED_IDLE")
    code = """
import time
import megallm.testing.awake as a
a.is_worth_it = lambda *_: True
with a.awake() as spinning:
    time.sleep(1)
print(*(process.pid for process in spinning), flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert pids
    wait_until(lambda: not any(map(lives, pids)))
