"""Session-wide set-up: interpreted kernels, one torch thread in the test process, and no rank left behind.

`make test` runs two workers (pytest-xdist), each with its half of the cores, for its ranks too: ranks of two tests on
one core would wait for each other, and a virtual core that falls idle while a rank waits takes milliseconds to return.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is imported: triton decides then whether to interpret
    os.environ["TRITON_INTERPRET"] = "1"

from megallm.testing.pool import close_pools


def pytest_configure(config: pytest.Config) -> None:
    """Ranks share the machine's few cores with the test process."""
    torch.set_num_threads(1)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        number, workers = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        own = sorted(os.sched_getaffinity(0))[number::workers]
        if own:
            os.sched_setaffinity(0, own)


@pytest.fixture(scope="module", autouse=True)
def _fresh_pools() -> Iterator[None]:
    """Ends a file's pools with it: each of their process groups has a gloo thread that wakes 100 times a second. Those
    of a whole suite are over a thousand, and keep the cores busy with nothing."""
    yield
    close_pools()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the warm pools before the interpreter shuts down."""
    close_pools()
