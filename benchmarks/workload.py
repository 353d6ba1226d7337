"""Prompts and answer lengths of generation.py, the same in each of its processes."""

from __future__ import annotations

import math
import random

PROMPTS, ANSWERS = (16, 128), (8, 256)
"""Shortest and longest, in tokens."""


def workload(num_prompts: int, vocab: int) -> tuple[list[list[int]], list[int]]:
    """(prompts as token ids, new tokens of each)."""
    draw = random.Random(7)

    def length(limits: tuple[int, int]) -> int:
        return round(math.exp(draw.uniform(*map(math.log, limits))))

    lengths = [(length(PROMPTS), length(ANSWERS)) for _ in range(num_prompts)]
    prompts = [[draw.randrange(3, vocab) for _ in range(prompt)] for prompt, _ in lengths]
    return prompts, [answer for _, answer in lengths]


def answer_tokens(num_prompts: int) -> int:
    """New tokens of all answers."""
    return sum(workload(num_prompts, 100)[1])


def checksum(answers: list[list[int]]) -> float:
    """A number in [0, 1) that another answer changes by about 1e-3."""
    total = sum((at + 1) * token for answer in answers for at, token in enumerate(answer))
    return total % 9973 / 9973
