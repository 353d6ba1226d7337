"""Whether what a program is to write can be written, asked before the work whose result it is.

What is asked is the file system itself, with a file that is gone at once: permissions do not tell of read-only mounts,
of /proc, nor what root may. Nothing is left, neither the target nor its directories.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_output_file(path: str | os.PathLike[str]) -> None:
    """ValueError unless a file can be put there, in place of another one or in directories that are made for it."""
    if not os.path.basename(path):
        raise ValueError(f"{os.fspath(path)!r} does not name a file: give the name of the file to write")
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a directory" if os.path.isdir(path) else "a device or pipe"
        raise ValueError(f"{os.fspath(path)} is {kind}: give the name of a file to write")
    _check_directory(Path(path).parent, path)


def check_output_directory(path: str | os.PathLike[str]) -> None:
    """ValueError unless files can be put into that directory, which may be one to be made."""
    _check_directory(Path(path), path)


def _check_directory(directory: Path, path: str | os.PathLike[str]) -> None:
    there = next(each for each in (directory, *directory.absolute().parents) if os.path.lexists(each))
    if not there.is_dir():
        is_it = "is" if there == Path(path) else f"cannot be written: {there} is"
        raise ValueError(f"{os.fspath(path)} {is_it} not a directory; choose another place")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(
            f"{os.fspath(path)} cannot be written: {there} takes no new files ({reason}); choose another place"
        ) from error
