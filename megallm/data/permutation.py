"""A random permutation of 0..n-1 without a list: each value is computed from its index alone.

An index is written as (left, right) in a grid of a x b >= n cells, a about sqrt(n). A Feistel network adds to one
half a hash of the other, in turns, modulo a or b: each step can be undone, so the whole is one-to-one on the grid. A
result outside 0..n-1 is sent through again until it falls inside, which keeps it one-to-one ("cycle walking", Black
and Rogaway 2002); the grid has fewer than n + a cells, so that is rare.

Of a handful of elements not all orders are equally likely, which does not matter for samples.
Integer arithmetic only: the order is the same on every machine and with every version of every library.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_HALF_ROUNDS = 4
"""Rounds on each half. With four, fixed points and neighbours that stay neighbours are as frequent as by chance (600
permutations of 100, 1,000 and 5,000 elements, within 2 sigma); with two, neighbours are not (over 20 sigma)."""


def hash_ints(*values: int) -> int:
    """A 64-bit hash of a sequence of integers, each taken modulo 2^64 (splitmix64's finaliser, chained)."""
    state = _GOLDEN
    for value in values:
        state = _finalise((state + (value & _MASK) * _GOLDEN + _GOLDEN) & _MASK)
    return state


def permute(index: int, size: int, key: int) -> int:
    """The image of `index` under a permutation of range(size) that `key` chooses. Takes tens of microseconds."""
    if not 0 <= index < size:
        raise ValueError(f"index {index} is not in a permutation of {size}")
    columns = isqrt(size - 1) + 1
    rows = -(-size // columns)
    keys = [_finalise((key + step * _GOLDEN) & _MASK) for step in range(1, 2 * _HALF_ROUNDS + 1)]
    while True:
        row, column = divmod(index, columns)
        for step in range(0, 2 * _HALF_ROUNDS, 2):
            row = (row + _finalise((keys[step] + column * _GOLDEN) & _MASK)) % rows
            column = (column + _finalise((keys[step + 1] + row * _GOLDEN) & _MASK)) % columns
        index = row * columns + column
        if index < size:
            return index


def permutation(size: int, key: int) -> npt.NDArray[np.int64]:
    """[size]: `permute` of every index at once, about a microsecond each."""
    if size < 1:
        raise ValueError(f"a permutation of {size} elements: at least 1 is needed")
    columns = np.uint64(isqrt(size - 1) + 1)
    rows = np.uint64(-(-size // int(columns)))
    keys = [_finalise((key + step * _GOLDEN) & _MASK) for step in range(1, 2 * _HALF_ROUNDS + 1)]
    images = np.arange(size, dtype=np.uint64)
    outside = np.arange(size)
    while outside.size:
        row, column = np.divmod(images[outside], columns)
        for step in range(0, 2 * _HALF_ROUNDS, 2):
            row = (row + _finalise_all(keys[step], column) % rows) % rows  # no sum leaves 64 bits
            column = (column + _finalise_all(keys[step + 1], row) % columns) % columns
        images[outside] = row * columns + column
        outside = outside[images[outside] >= size]
    return images.astype(np.int64)


def _finalise_all(key: int, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`_finalise(key + value * _GOLDEN)` of each value, modulo 2^64."""
    state = values * np.uint64(_GOLDEN) + np.uint64(key)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _finalise(state: int) -> int:
    """splitmix64's output function (Steele, Lea, Flood 2014)."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
