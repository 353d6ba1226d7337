"""Embedded fine-tuning data: records made of the source of the Python standard library that runs.

    instructions    a function's signature        -> the first line of its docstring          (alpaca)
    dialogues       a doctest session: input lines -> what the interpreter prints, turn by turn (messages)
    preferences     a signature: the first line, over the same words in another order           (preference)
    prompts         a signature                                                                 (prompt)
    arithmetic      7+8=, and the answer, which data/arithmetic.py makes                        (prompt)

Nothing is downloaded and nothing is run: sources are parsed. Modules are held out as a whole: of each package or module
either all records are `train` or all `valid` (about a tenth), so that validation is on code never seen. Records and
their order are a function of the Python version.
"""

from __future__ import annotations

import ast
import doctest
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

from megallm.data.arithmetic import arithmetic_prompts
from megallm.data.corpus import read_corpus

Split = Literal["train", "valid"]
INSTRUCTION = "Write the first line of the docstring of this Python function."
SYSTEM = "You are the Python interpreter. Answer with what the input prints."

_KEY = "megallm-embedded-1"
_VALID_PART = 10
"""One module of this many is held out."""
_SUMMARY_CHARACTERS = range(12, 121)
_SIGNATURE_CHARACTERS = 240
_MIN_ANSWERS = 2
_ORDERS = 16
"""Tried for a wrong text."""

_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class _Documented:
    """A function with a docstring."""

    module: str
    signature: str
    summary: str


@dataclass(frozen=True)
class _Session:
    """A dialogue with the interpreter."""

    module: str
    messages: list[dict[str, str]]


_Found = TypeVar("_Found", _Documented, _Session)


def embedded_instructions(split: Split = "train") -> list[dict[str, Any]]:
    """Alpaca records, thousands: instruction, input (a signature), output (the docstring's first line)."""
    return [
        {"instruction": INSTRUCTION, "input": each.signature, "output": each.summary}
        for each in _split(_read_library()[0], split)
    ]


def embedded_dialogues(split: Split = "train") -> list[dict[str, Any]]:
    """Messages records, over a hundred, of two and more answers each: the doctest sessions of docstrings."""
    return [{"messages": [dict(message) for message in each.messages]} for each in _split(_read_library()[1], split)]


def embedded_preferences(split: Split = "train") -> list[dict[str, Any]]:
    """Preference records, thousands: first and last word, length and all words are equal, so that only reading tells
    the right text from the wrong one."""
    records = []
    for each in _split(_read_library()[0], split):
        wrong = _disordered(each)
        if wrong is not None:
            records.append({"prompt": _prompt(each), "chosen": each.summary, "rejected": wrong})
    return records


def embedded_prompts(split: Split = "train") -> list[dict[str, Any]]:
    """Prompt records: those of `embedded_preferences`, and of functions whose first line has few words."""
    return [{"prompt": _prompt(each)} for each in _split(_read_library()[0], split)]


EMBEDDED: Mapping[str, Callable[[Split], list[dict[str, Any]]]] = {
    "instructions": embedded_instructions,
    "dialogues": embedded_dialogues,
    "preferences": embedded_preferences,
    "prompts": embedded_prompts,
    "arithmetic": arithmetic_prompts,
}


def _prompt(function: _Documented) -> str:
    return f"{INSTRUCTION}\n\n{function.signature}"


def _disordered(function: _Documented) -> str | None:
    """The summary with the words between the first and the last one in another order, in which as few as can be follow
    the word that they follow in the right one; None with fewer than three of them, or if all are the same."""
    first, *inner, last = function.summary.split(" ")
    if len(inner) < 3 or len(set(inner)) == 1:
        return None
    followed = set(itertools.pairwise([first, *inner, last]))

    def kept(words: list[str]) -> int:
        return sum(pair in followed for pair in itertools.pairwise([first, *words, last]))

    def order(number: int) -> list[str]:
        places = sorted(range(len(inner)), key=lambda place: _hash(f"{function.signature}:{number}:{place}"))
        return [inner[place] for place in places]

    found = min((order(number) for number in range(_ORDERS)), key=kept)
    return None if found == inner else " ".join([first, *found, last])


def _split(found: Sequence[_Found], split: Split) -> list[_Found]:
    """Those of the modules of one side."""
    if split not in ("train", "valid"):
        raise ValueError(f"split {split!r} is not known: use train or valid")
    return [each for each in found if (_hash(each.module)[0] % _VALID_PART == 0) == (split == "valid")]


@lru_cache(maxsize=1)
def _read_library() -> tuple[tuple[_Documented, ...], tuple[_Session, ...]]:
    """Every documented function and every doctest session with two answers and more, each once, in a fixed order that
    is by chance. Takes some seconds, once a process."""
    functions: dict[str, _Documented] = {}  # by signature: no prompt is on both sides, with two answers
    sessions: dict[str, _Session] = {}
    for module, tree in _modules():
        for owner, node in _walk(tree, ""):
            summary, signature = _summary(node), _signature(node, owner)
            if summary and len(signature) <= _SIGNATURE_CHARACTERS:
                functions.setdefault(signature, _Documented(module, signature, summary))
        for each in ast.walk(tree):
            if isinstance(each, ast.Module | ast.ClassDef | _Function):
                messages = _dialogue(ast.get_docstring(each) or "")
                if sum(message["role"] == "assistant" for message in messages) >= _MIN_ANSWERS:
                    sessions.setdefault(repr(messages), _Session(module, messages))
    return (
        tuple(sorted(functions.values(), key=lambda each: _hash(f"{each.module}:{each.signature}:{each.summary}"))),
        tuple(sorted(sessions.values(), key=lambda each: _hash(f"{each.module}:{each.messages}"))),
    )


def _dialogue(docstring: str) -> list[dict[str, str]]:
    """The session of a docstring as messages; inputs that print nothing stand before the next that does."""
    if ">>>" not in docstring:
        return []
    try:
        steps = doctest.DocTestParser().get_examples(docstring)
    except ValueError:  # not written as doctest wants it
        return []
    messages = [{"role": "system", "content": SYSTEM}]
    typed: list[str] = []
    for step in steps:
        first, *others = step.source.rstrip("\n").split("\n")
        typed += [f">>> {first}", *(f"... {line}".rstrip() for line in others)]
        if printed := step.want.replace("<BLANKLINE>", "").rstrip("\n"):
            messages.append({"role": "user", "content": "\n".join(typed)})
            messages.append({"role": "assistant", "content": printed})
            typed = []
    return messages


def _modules() -> Iterator[tuple[str, ast.Module]]:
    """(package or module, syntax tree) of every source of the corpus that this Python parses."""
    for name, text in read_corpus():
        if name.startswith("lib/") and '"""' in text:
            try:
                yield re.split(r"[/.]", name)[1], ast.parse(text)
            except SyntaxError:  # a template, or a file of another Python
                continue


def _walk(node: ast.AST, owner: str) -> Iterator[tuple[str, _Function]]:
    """(class, function) of every function that is not inside another."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _walk(child, child.name)
        elif isinstance(child, _Function):
            yield owner, child
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from _walk(child, owner)


def _signature(node: _Function, owner: str) -> str:
    kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{kind} {node.name}({ast.unparse(node.args)}){returns}:"
    return f"class {owner}:\n    {line}" if owner else line


def _summary(node: _Function) -> str:
    """The first line of the docstring, empty if it has none or one that says little or much."""
    first = (ast.get_docstring(node) or "").strip().split("\n")[0].strip()
    return first if len(first) in _SUMMARY_CHARACTERS and " " in first else ""


def _hash(text: str) -> bytes:
    return hashlib.sha256(f"{_KEY}:{text}".encode()).digest()
