"""Session-wide set-up: interpreted kernels, one torch thread in the test process, and no rank left behind.

`make test` runs two workers (pytest-xdist). Tests that start ranks take turns on one of them: ranks of two tests at a
time would only wait for each other's cores. What the ranks leave of the cores goes to the tests of the other worker.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is imported: triton decides then whether to interpret
    os.environ["TRITON_INTERPRET"] = "1"

from megallm.testing.pool import close_pools

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ


def pytest_configure(config: pytest.Config) -> None:
    """Ranks share the machine's few cores with the test process."""
    torch.set_num_threads(1)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the warm pools before the interpreter shuts down."""
    close_pools()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of a file stay together, and so do all files that start ranks."""
    for item in items if IS_WORKER else []:
        item.add_marker(pytest.mark.xdist_group("ranks" if starts_ranks(item.path) else item.path.name))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The worker without ranks steps back, for good, whenever one of them wants the core: a step waits for them all."""
    if IS_WORKER and not starts_ranks(item.path) and hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@functools.cache
def starts_ranks(path: Path) -> bool:
    return "run_ranks" in path.read_text(encoding="utf-8")
