"""ROUGE-L: how much of two texts' words is in the same order (Lin, 2004).

    F = 2 L / (m + n)        L: longest common subsequence of the m and n words

Words are runs of letters and digits in lower case, as in Google's rouge_score (on ASCII: equal), without stemming.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """Those that ROUGE compares."""
    return _WORD.findall(text.lower())


def common_subsequence(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence: one addition of len(first) bits for each element of `second`.

    The zeros of `row` are where the length grows along `first` (Hyyro 2004, "Bit-parallel LCS-length computation
    revisited").
    """
    places: dict[Hashable, int] = {}
    for index, element in enumerate(first):
        places[element] = places.get(element, 0) | 1 << index
    every = (1 << len(first)) - 1
    row = every
    for element in second:
        matched = row & places.get(element, 0)
        row = (row + matched | row - matched) & every
    return len(first) - row.bit_count()


def rouge_l(first: Sequence[str], second: Sequence[str]) -> float:
    """F of two lists of words; 0 if one is empty."""
    if not first or not second:
        return 0.0
    return 2.0 * common_subsequence(first, second) / (len(first) + len(second))


def is_similar(text: Sequence[str], others: Sequence[Sequence[str]], *, threshold: float) -> bool:
    """Whether F with any of the others reaches `threshold`."""
    return any(
        2.0 * min(len(text), len(other)) >= threshold * (len(text) + len(other)) and rouge_l(text, other) >= threshold
        for other in others
    )
