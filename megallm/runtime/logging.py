"""A log that speaks with one voice: rank 0 prints, every other rank is silent."""

from __future__ import annotations

import sys
from typing import TextIO


class Log:
    """Prints lines on rank 0 of whatever the caller counts ranks in (the job, or one mesh); flushed at once."""

    def __init__(self, rank: int, *, stream: TextIO | None = None) -> None:
        """`stream`: None = standard output, as it is when a line is printed."""
        self._is_printing = rank == 0
        self._stream = stream
        self._said: set[str] = set()

    def info(self, text: str) -> None:
        """Prints one line."""
        if self._is_printing:
            print(text, file=self._stream or sys.stdout, flush=True)

    def warning(self, text: str) -> None:
        """Prints one line that begins with `warning: `."""
        self.info(f"warning: {text}")

    def once(self, text: str) -> None:
        """Prints one line the first time it is given: for the reason of a fallback, inside a loop."""
        if text not in self._said:
            self._said.add(text)
            self.info(text)
