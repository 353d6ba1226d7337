"""Arithmetic as a task whose answers can be checked: problems in text, and examples that are mostly wrong.

    arithmetic_prompts      {"prompt": "7+8=", "answer": "15"}       each problem once
    arithmetic_examples     {"prompt": "7+8=", "completion": "16"}   a warm start: the form is right, most answers not

A model that was trained on the examples writes an answer and stops, is right as seldom as they are, and reinforcement
learning has something to do. Problems, their order and which ones are held out are a function of the arguments alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from megallm.data.permutation import hash_ints, permutation, permute

OPERATORS: Mapping[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
CHARACTERS = "0123456789+-*="
"""All that problems and answers are written with."""
MISSES = (1, 2, 3, 4)
"""Added to the right answer for a wrong one, each as often. With 17 of 20 wrong, each is more frequent than the right
answer, so that the most likely answer is wrong, too. All to one side: a model that is not trained to the end takes the
middle of what it saw, and of misses to both sides that is the right answer (greedily 57 % right after 280 steps)."""
_VALID_PART = 10
"""One problem of this many is held out."""
_MOST = 1_000_000
"""Problems made without being asked for by number."""
_PROBLEMS, _ROWS = 1, 2
"""Which order a hash is for."""


def arithmetic_prompts(
    split: Literal["train", "valid"] = "train",
    *,
    digits: int = 1,
    operators: str = "+",
    num_prompts: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """`num_prompts` different problems of one side: of numbers with up to `digits` digits, and each of `operators`.

    None = all, of which 1 digit and 1 operator have 100 on both sides. `seed` draws the order and the sides. ValueError
    for more than there are.
    """
    problems = _problems(split, digits, operators, num_prompts, seed)
    return [{"prompt": asked, "answer": str(right)} for asked, right in problems]


def arithmetic_examples(
    split: Literal["train", "valid"] = "train",
    *,
    digits: int = 1,
    operators: str = "+",
    num_prompts: int | None = None,
    num_examples: int | None = None,
    wrong: float = 0.85,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Prompt_completion records of the problems that `arithmetic_prompts` with the same arguments has, each problem as
    often as any other up to one; the answers of round(wrong * num_examples) are wrong, spread evenly over the problems.

    None = 20 examples a problem, so that a problem comes with different answers and no single one is learned.
    """
    if not 0.0 <= wrong <= 1.0:
        raise ValueError(f"wrong ({wrong}) is the share of wrong answers: give a number from 0 to 1")
    problems = list(_problems(split, digits, operators, num_prompts, seed))
    number = 20 * len(problems) if num_examples is None else num_examples
    if number < 1:
        raise ValueError(f"num_examples ({number}) must be at least 1")
    num_wrong, (copies, rest) = round(wrong * number), divmod(number, len(problems))
    records = []
    for row in permutation(number, hash_ints(seed, _ROWS)).tolist():
        copy, problem = divmod(row, len(problems))
        asked, answer = problems[problem]
        place = problem * copies + min(problem, rest) + copy  # all examples of one problem beside one another
        wrong_before = place * num_wrong // number
        if (place + 1) * num_wrong // number > wrong_before:
            answer += MISSES[wrong_before % len(MISSES)]
        records.append({"prompt": asked, "completion": str(answer)})
    return records


def _problems(
    split: str, digits: int, operators: str, num_prompts: int | None, seed: int
) -> Iterator[tuple[str, int]]:
    """(text, answer) of the problems of one side, in their order."""
    if split not in ("train", "valid"):
        raise ValueError(f"split {split!r} is not known: use train or valid")
    if digits < 1:
        raise ValueError(f"digits ({digits}) must be at least 1")
    if not operators or len(set(operators)) < len(operators) or set(operators) - set(OPERATORS):
        raise ValueError(f"operators {operators!r}: give some of {''.join(OPERATORS)}, each once")
    numbers = 10**digits
    total = len(operators) * numbers * numbers
    num_train = total - total // _VALID_PART
    begin, end = (0, num_train) if split == "train" else (num_train, total)
    count = end - begin if num_prompts is None else num_prompts
    if not 1 <= count <= end - begin:
        raise ValueError(
            f"num_prompts ({count}): there are {end - begin} {split} problems of {digits} digit(s) with {operators!r}: "
            "give 1 to as many, or more digits or operators"
        )
    if num_prompts is None and count > _MOST:
        raise ValueError(f"there are {count:,} {split} problems of {digits} digits: say with num_prompts how many")
    key = hash_ints(seed, _PROBLEMS)
    order = permutation(total, key)[begin : begin + count].tolist() if 4 * count > total else (
        permute(place, total, key) for place in range(begin, begin + count)
    )  # fmt: skip
    for problem in order:
        rest, right_hand = divmod(problem, numbers)
        which, left_hand = divmod(rest, numbers)
        sign = operators[which]
        yield f"{left_hand}{sign}{right_hand}=", OPERATORS[sign](left_hand, right_hand)
