"""Session-wide set-up: interpreted kernels, one torch thread in the test process, and no rank left behind."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is imported: triton decides then whether to interpret
    os.environ["TRITON_INTERPRET"] = "1"

from megallm.testing.pool import close_pools


def pytest_configure(config: pytest.Config) -> None:
    """Ranks share the machine's few cores with the test process."""
    torch.set_num_threads(1)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the warm pools before the interpreter shuts down."""
    close_pools()
