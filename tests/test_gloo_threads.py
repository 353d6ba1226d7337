"""Gloo's threads wait behind those that compute, and nobody else does."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from megallm.parallel.gloo_threads import NICE, let_gloo_step_back, loop_threads
from megallm.parallel.mesh import Mesh
from megallm.testing.pool import run_ranks

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="a class of Linux's scheduler")


def classes(rank: int, world_size: int) -> tuple[set[tuple[int, int]], set[int], int, float]:
    """(class, niceness) of gloo's threads after a mesh of two axes, classes of all others, groups, and a sum."""
    mesh = Mesh.build(tp=2)
    own = set(loop_threads())
    others = {int(each) for each in os.listdir("/proc/self/task")} - own
    total = torch.ones(3)
    dist.all_reduce(total, group=mesh.dp.group)
    return (
        {(os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread)) for thread in own},
        {os.sched_getscheduler(thread) for thread in others},
        len(own),
        float(total.sum()),
    )


def test_threads_of_every_group_step_back_and_no_other() -> None:
    for gloo, others, count, total in run_ranks(classes, 4):
        assert gloo == {(os.SCHED_BATCH, NICE)}
        assert others == {os.SCHED_OTHER}
        assert count >= 3  # the world's, tp's and dp's
        assert total == 6.0


def test_a_process_without_gloo_has_nothing_to_change() -> None:
    assert loop_threads() == []
    let_gloo_step_back()


def test_threads_that_may_not_be_changed_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError

    own = os.getpid()
    before = os.sched_getscheduler(own), os.getpriority(os.PRIO_PROCESS, own)
    monkeypatch.setattr("megallm.parallel.gloo_threads.loop_threads", lambda: [own])
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    let_gloo_step_back()
    assert (os.sched_getscheduler(own), os.getpriority(os.PRIO_PROCESS, own)) == before
