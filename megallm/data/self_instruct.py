"""Self-Instruct: new instructions with answers from a few seed tasks (Wang et al., arXiv 2212.10560), as text.

    6 seeds + 2 kept ones -> "Task 9:" -> new instructions -> filters -> an input and an output each -> filters -> kept

A round is a function of (seed, its number, what is kept), so that a run that was interrupted between rounds goes on as
if it had not been. Who completes texts is a function that is passed in. Unlike in the paper, classification tasks are
asked as all others are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megallm.data.permutation import hash_ints, permutation
from megallm.data.rouge import is_similar, words

NO_INPUT = "(none)"
"""Stands for an empty input in prompts."""
_IMPOSSIBLE = re.compile(r"\b(images?|graphs?|pictures?|photos?|files?|maps?|draw|plot|videos?|audio|go to)\b", re.I)
"""What a model of text cannot see, make or do (the paper's words and a few more)."""
_NUM_WORDS = range(4, 151)
_NEXT_TASK = re.compile(r"\n\s*Task(?:\s+\d+)?\s*:")
_EXAMPLES_SHOWN = 3
"""Whole tasks in the prompt that asks for an input and an output."""


@dataclass(frozen=True)
class Task:
    """One instruction with its answer."""

    instruction: str
    input: str
    output: str

    def record(self) -> dict[str, str]:
        """An alpaca record."""
        return {"instruction": self.instruction, "input": self.input, "output": self.output}


@dataclass(frozen=True)
class Completion:
    """What a model wrote behind a prompt."""

    text: str
    has_ended: bool
    """By itself, and not for its length."""


Complete = Callable[[Sequence[str], int, bool], Sequence[Completion | None]]
"""(prompts, a seed, whether to sample) -> completions; None for a prompt that is too long."""


@dataclass(frozen=True, kw_only=True)
class SelfInstruct:
    """How tasks are asked for and which are kept."""

    num: int
    seed: int = 0
    prompts_per_round: int = 8
    seeds_shown: int = 6
    kept_shown: int = 2
    threshold: float = 0.7
    """ROUGE-L with any seed or kept instruction, from which on a new one is left out."""


@dataclass
class Progress:
    """What a run has found so far."""

    rounds: int = 0
    kept: list[Task] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason: candidates."""

    def drop(self, reason: str) -> None:
        """Count one."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def line(self) -> str:
        """Counts of kept and dropped."""
        reasons = "   ".join(f"{reason} {count}" for reason, count in sorted(self.dropped.items()))
        total = sum(self.dropped.values())
        return f"round {self.rounds}   kept {len(self.kept)}   dropped {total}{': ' if total else ''}{reasons}"


def run_round(progress: Progress, seeds: Sequence[Task], options: SelfInstruct, complete: Complete) -> None:
    """One round: asks for instructions, then for an input and an output of each new one; adds what is kept."""
    number = progress.rounds
    key = hash_ints(options.seed, number)
    prompts = [
        instruction_prompt(shown_tasks(seeds, progress.kept, options, hash_ints(key, place)))
        for place in range(options.prompts_per_round)
    ]
    known = [words(task.instruction) for task in (*seeds, *progress.kept)]
    new: list[str] = []
    for completion in complete(prompts, hash_ints(key, 1), True):
        for text, has_ended in [(None, False)] if completion is None else split_instructions(completion):
            if text is None:
                reason: str | None = "prompt too long"
            else:
                reason = why_not_instruction(text, known, threshold=options.threshold) if has_ended else "not ended"
            if reason is None and text is not None:
                known.append(words(text))
                new.append(text)
            else:
                progress.drop(str(reason))
    asked = [instance_prompt(_some(seeds, _EXAMPLES_SHOWN, hash_ints(key, 2, i)), text) for i, text in enumerate(new)]
    for text, completion in zip(new, complete(asked, hash_ints(key, 3), False) if asked else (), strict=True):
        task = "prompt too long" if completion is None else read_instance(text, completion)
        if isinstance(task, str):
            progress.drop(task)
        elif len(progress.kept) < options.num:
            progress.kept.append(task)
    progress.rounds += 1


def shown_tasks(seeds: Sequence[Task], kept: Sequence[Task], options: SelfInstruct, key: int) -> list[Task]:
    """Tasks for one prompt in a random order; seeds stand in for kept ones where there are too few."""
    own = _some(kept, options.kept_shown, hash_ints(key, 1))
    shown = _some(seeds, options.seeds_shown + options.kept_shown - len(own), hash_ints(key, 2)) + own
    return _some(shown, len(shown), hash_ints(key, 3))


def instruction_prompt(shown: Sequence[Task]) -> str:
    """A numbered list of tasks that breaks off before a new one."""
    lines = [f"Task {number}: {_one_line(task.instruction)}" for number, task in enumerate(shown, start=1)]
    return "\n".join(["Come up with a series of tasks:", "", *lines, f"Task {len(shown) + 1}:"])


def instance_prompt(shown: Sequence[Task], instruction: str) -> str:
    """Whole tasks, then the instruction, broken off before its input."""
    parts = [
        f"Task: {_one_line(task.instruction)}\nInput: {task.input or NO_INPUT}\nOutput: {task.output}\n\n"
        for task in shown
    ]
    return f"{''.join(parts)}Task: {instruction}\nInput:"


def split_instructions(completion: Completion) -> list[tuple[str, bool]]:
    """(instruction, whether it is whole): all but the last are ended by the next task."""
    pieces = [_one_line(piece).rstrip(":").rstrip() for piece in _NEXT_TASK.split(completion.text)]
    if len(pieces) > 1 and not pieces[-1]:
        pieces.pop()
        return [(piece, True) for piece in pieces]
    return [(piece, completion.has_ended or place < len(pieces) - 1) for place, piece in enumerate(pieces)]


def why_not_instruction(text: str, known: Sequence[Sequence[str]], *, threshold: float) -> str | None:
    """The filter that an instruction does not pass; None if it passes all."""
    if len(text.split()) not in _NUM_WORDS:
        return "length"
    if _IMPOSSIBLE.search(text):
        return "keyword"
    if not (text[0].isascii() and text[0].isalnum()):
        return "first character"
    if is_similar(words(text), known, threshold=threshold):
        return "similar"
    return None


def read_instance(instruction: str, completion: Completion) -> Task | str:
    """The task with the first input and output of a completion, or the filter that they do not pass."""
    pieces = _NEXT_TASK.split(completion.text)
    if len(pieces) == 1 and not completion.has_ended:
        return "not ended"
    found: dict[str, str] = {}
    for block in re.split(r"\n\s*Input:", pieces[0]):
        given, _, output = (part.strip() for part in block.partition("\nOutput:"))
        given = "" if given == NO_INPUT else given
        if not output:
            return "empty output"
        if output == given:
            return "output equals input"
        if found.setdefault(given, output) != output:
            return "one input, two outputs"
    given, output = next(iter(found.items()))
    return Task(instruction, given, output)


def read_seeds(records: Sequence[dict[str, Any]], *, where: str) -> list[Task]:
    """Tasks of alpaca records. ValueError names the first that is none, and if none is there."""
    tasks = []
    for number, record in enumerate(records, start=1):
        texts = [record.get("instruction"), record.get("input") or "", record.get("output")]
        if not all(isinstance(text, str) for text in texts) or not str(texts[0]).strip() or not str(texts[2]).strip():
            raise ValueError(f"{where}, record {number}: a seed task has instruction and output (and input): texts")
        tasks.append(Task(*(str(text).strip() for text in texts)))
    if not tasks:
        raise ValueError(f"{where}: no seed tasks")
    return tasks


def _some(tasks: Sequence[Task], count: int, key: int) -> list[Task]:
    """`count` of them, or all if there are fewer, in a random order."""
    return [tasks[i] for i in permutation(len(tasks), key)[:count].tolist()] if tasks else []


def _one_line(text: str) -> str:
    return " ".join(text.split())
