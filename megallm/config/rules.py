"""What the checks of configs have in common: ranges, and words for the way out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any


def positive(config: Any, *names: str) -> None:
    """ValueError unless the named fields are finite and above 0."""
    for name in names:
        value = getattr(config, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} ({value}) must be {'at least 1' if isinstance(value, int) else 'above 0'}")


def not_negative(config: Any, *names: str) -> None:
    """ValueError unless the named fields are finite and at least 0."""
    for name in names:
        value = getattr(config, name)
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} ({value}) must be 0 or more")


def fraction(config: Any, *names: str) -> None:
    """ValueError unless the named fields are in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} ({value}) must be at least 0 and below 1")


def whole(config: Any, *names: str) -> None:
    """ValueError unless the named fields are whole numbers: for what a program sets, without a command line's types."""
    for name in names:
        if not is_whole(getattr(config, name)):
            raise ValueError(f"{name} ({getattr(config, name)!r}) must be a whole number")


def is_whole(value: object) -> bool:
    """Whether it is an integer, of numpy's as well, and not True or False."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def is_positive_number(text: str) -> bool:
    """Whether `text` writes a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        return False
    return value > 0.0 and math.isfinite(value)


def divisors(number: int) -> list[int]:
    """All divisors of `number`, in order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is not below `number`."""
    return -(-number // multiple) * multiple


def nearest_multiples(number: int, unit: int) -> str:
    """The multiples of `unit` around `number`: "4 or 8"."""
    below = number // unit * unit
    return either([size for size in (below, below + unit) if size > 0])


def either(choices: Iterable[object]) -> str:
    """2, 3, 5 or 6."""
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
