"""The cache of tokenised data: folders named by what they hold, each built whole or not there.

    CACHE/tokens/<key>/        tokens.bin, tokens.idx, tokens.info.json
    CACHE/tokenizers/<key>/    tokenizer.json

A folder is built under a temporary name and renamed: a reader never sees half of one, and of two builders one wins.
The lock only saves the others the work; without locks (some network file systems) the rename alone is enough.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_ABANDONED_S = 24 * 3600.0
"""A temporary folder in which nothing was written for this long is of a builder that died."""

_logger = logging.getLogger(__name__)


def default_cache_dir(environment: Mapping[str, str], home: Path) -> Path:
    """`megallm` in the user's cache directory: $XDG_CACHE_HOME if it is set, else ~/.cache."""
    base = environment.get("XDG_CACHE_HOME")
    return (Path(base) if base else home / ".cache") / "megallm"


def cache_key(*parts: object) -> str:
    """A folder name: 24 hex digits of a hash of the parts, JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def cached_folder(parent: Path, key: str, build: Callable[[Path], None]) -> Path:
    """The folder `parent/key`, made by `build(temporary folder)` unless it is there. Any number of processes may ask
    at once: one builds, the others wait and then find it. If `build` raises, nothing stays."""
    folder = parent / key
    if folder.is_dir():
        return folder
    try:
        parent.mkdir(parents=True, exist_ok=True)
        probe = parent / f"{key}.lock"
        probe.touch()
    except OSError as error:
        raise ValueError(f"the cache directory {parent} cannot be written ({error}): set another cache_dir") from error
    with _locked(probe):
        if not folder.is_dir():
            _remove_abandoned(parent, key)
            _build(folder, build)
    return folder


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        build(temporary)
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():  # not another builder's folder in our way: a real failure
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, waiting for it; freed by the system if the process dies."""
    if fcntl is None:
        yield
        return
    with open(file, "ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _logger.info("waiting for another process that is preparing the same data in %s", file.parent)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            _logger.info("no locks in %s (%s): several processes may prepare the same data", file.parent, error)
        yield


def _remove_abandoned(parent: Path, key: str) -> None:
    for folder in parent.glob(f"{key}.tmp-*"):
        newest = max((path.stat().st_mtime for path in [folder, *folder.iterdir()]), default=0.0)
        if time.time() - newest > _ABANDONED_S:
            shutil.rmtree(folder, ignore_errors=True)
