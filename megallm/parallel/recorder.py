"""Counts what moves between ranks, so that a test can assert "bytes moved == bytes predicted".

Counted is what one rank sends with ring algorithms, in elements and bytes: an all-reduce of n elements over t ranks
sends 2 n (t-1)/t, an all-gather to n or a reduce-scatter from n elements n (t-1)/t, a broadcast n (t-1)/t, a
point-to-point send n (a receive 0), an all-to-all what it has for others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

_SHARE = {  # elements sent by one rank, in units of n (t-1)/t
    "all_reduce": 2,
    "all_gather": 1,
    "reduce_scatter": 1,
    "broadcast": 1,
}
_DIRECT = ("send", "all_to_all")
"""Counted as they are told."""


class Recorder:
    """Tallies transfers by (axis, operation) while enabled; costs one attribute test otherwise."""

    def __init__(self) -> None:
        self.enabled = False
        self._elements: dict[tuple[str, str], Fraction] = defaultdict(Fraction)
        self._bytes: dict[tuple[str, str], Fraction] = defaultdict(Fraction)
        self._calls: dict[tuple[str, str], int] = defaultdict(int)

    def add(self, axis: str, operation: str, num_elements: int, element_size: int, axis_size: int) -> None:
        """Counts one operation on a tensor of `num_elements` (the full size: gathered, unscattered or sent)."""
        if not self.enabled:
            return
        share = Fraction(1) if operation in _DIRECT else Fraction(_SHARE[operation] * (axis_size - 1), axis_size)
        key = (axis, operation)
        self._elements[key] += share * num_elements
        self._bytes[key] += share * num_elements * element_size
        self._calls[key] += 1

    def elements(self, axis: str, operation: str | None = None) -> int:
        """Elements this rank sent over `axis`, all operations or one."""
        return int(_total(self._elements, axis, operation))

    def bytes(self, axis: str, operation: str | None = None) -> int:
        """Bytes this rank sent over `axis`, all operations or one."""
        return int(_total(self._bytes, axis, operation))

    def calls(self, axis: str, operation: str | None = None) -> int:
        """Number of operations on `axis`."""
        return int(_total(self._calls, axis, operation))

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Starts from zero and counts inside the block."""
        for tally in (self._elements, self._bytes, self._calls):
            tally.clear()
        self.enabled = True
        try:
            yield self
        finally:
            self.enabled = False


def _total(tally: dict, axis: str, operation: str | None) -> Fraction:  # type: ignore[type-arg]
    return sum((v for (a, o), v in tally.items() if a == axis and operation in (None, o)), Fraction(0))
