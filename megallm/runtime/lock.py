"""One run at a time writes into a directory: two would replace each other's checkpoints and cut off metrics."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megallm.runtime.launch import UsageError


@contextmanager
def sole_writer(directory: str | Path | None) -> Iterator[None]:
    """Holds the directory, which it makes; UsageError if another process does. None: nothing is held.

    The lock ends with the process, however that ends, and leaves no file. A file system without locks has none.
    """
    if directory is None:
        yield
        return
    Path(directory).mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another run is writing into {directory}: wait until it has ended, end it, or give another --save"
            ) from error
        except OSError:
            pass  # a file system without locks: the run is worth more than the guard
        yield
    finally:
        os.close(handle)
