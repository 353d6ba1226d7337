"""Session-wide set-up: interpreted kernels, one torch thread in the test process, cores that stay awake, and no rank
left behind."""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is imported: triton decides then whether to interpret
    os.environ["TRITON_INTERPRET"] = "1"

from megallm.testing.awake import awake
from megallm.testing.pool import close_pools

_SESSION = ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    """Ranks share the machine's few cores with the test process."""
    torch.set_num_threads(1)
    if not config.option.collectonly:
        _SESSION.enter_context(awake())


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the warm pools before the interpreter shuts down."""
    close_pools()
    _SESSION.close()
