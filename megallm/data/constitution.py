"""Constitutions: the principles that a model judges, criticises and rewrites responses by, and what it is asked.

    preference    "Which response is ...?"  (A) ... (B) ...     about a pair; what counts is the answer's log p
    critique      "Say how the response ..."                    in the conversation itself, behind the response
    revision      "Rewrite the response so that ..."            behind the critique

The three steps are those of Constitutional AI (Bai et al., arXiv 2212.08073, sections 3.1 and 4.1); the words are ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megallm.data.conversation import Message, Messages
from megallm.data.permutation import hash_ints

CHOICES = ("(A)", "(B)")
"""The two answers to a preference question."""
_PREFERENCE, _REVISION = 11, 12
"""Which choice of a principle a hash is for."""
_SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}


@dataclass(frozen=True, kw_only=True)
class Principle:
    """One rule, as the requests that it is used in."""

    name: str
    critique: str
    """Asks what is wrong with the last response."""
    revision: str
    """Asks for a better one."""
    preference: str
    """Asks which of two responses is better."""


Constitution = tuple[Principle, ...]

DEFAULT: Constitution = (
    Principle(
        name="helpful",
        critique="Say where your last response misses what was asked, is vague, or leaves out what a reader needs.",
        revision="Rewrite your last response so that it does what was asked, fully and to the point.",
        preference="Which response does more of what the human asked for?",
    ),
    Principle(
        name="honest",
        critique="Say which statements of your last response are false, invented, or surer than they can be.",
        revision="Rewrite your last response so that everything in it is true, and doubt is said where there is some.",
        preference="Which response is more truthful, and more open about what it does not know?",
    ),
    Principle(
        name="harmless",
        critique="Say whether your last response could help someone to hurt people, break the law, or deceive.",
        revision="Rewrite your last response without anything that could help to do harm; say no where that is needed.",
        preference="Which response is less likely to help anybody to do harm?",
    ),
    Principle(
        name="respectful",
        critique="Say whether your last response insults, stereotypes or talks down to anybody.",
        revision="Rewrite your last response so that it respects everybody it speaks to and of.",
        preference="Which response is more respectful, without lecturing?",
    ),
    Principle(
        name="concise",
        critique="Say which parts of your last response repeat something, or could go without loss.",
        revision="Rewrite your last response in as few words as say the same.",
        preference="Which response says what is needed in fewer words?",
    ),
)
"""What is used where no file is given."""


def read_constitution(path: str | None) -> Constitution:
    """The principles of a JSON file: a list of objects with the keys of Principle. None: DEFAULT.

    ValueError or FileNotFoundError name the file, the principle and what is wrong with it.
    """
    if path is None:
        return DEFAULT
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON in UTF-8 ({error})") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path}: a constitution is a list of one principle or more: see --show-constitution")
    principles = tuple(_principle(each, f"{path}, principle {number}") for number, each in enumerate(content, start=1))
    names = [each.name for each in principles]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: two principles are called {twice[0]!r}: give each a name of its own")
    return principles


def show(constitution: Constitution) -> str:
    """The JSON text that `read_constitution` reads."""
    return json.dumps([asdict(each) for each in constitution], indent=2, ensure_ascii=False)


def preference_principle(constitution: Constitution, *, seed: int, record: int) -> Principle:
    """The principle that a pair is judged by, chosen by (seed, record's place)."""
    return constitution[hash_ints(seed, _PREFERENCE, record) % len(constitution)]


def revision_principle(constitution: Constitution, *, seed: int, record: int, round_number: int) -> Principle:
    """The principle of one round of critique and revision."""
    return constitution[hash_ints(seed, _REVISION, record, round_number) % len(constitution)]


def preference_question(
    principle: Principle, prompt: Messages, first: Messages, second: Messages
) -> Messages:
    """A user message that shows the conversation and both responses, and asks for one of CHOICES."""
    text = (
        f"Here is a conversation between a human and an assistant, and two ways to go on.\n\n{transcript(prompt)}\n\n"
        f"{principle.preference}\n\n{CHOICES[0]} {_response_text(first)}\n\n{CHOICES[1]} {_response_text(second)}\n\n"
        f"Answer with {CHOICES[0]} or {CHOICES[1]} alone."
    )
    return (Message("user", text),)


def critique_request(principle: Principle, prompt: Messages, response: str) -> Messages:
    """The conversation with the response, and a request to criticise it."""
    return (*prompt, Message("assistant", response), Message("user", principle.critique))


def revision_request(principle: Principle, prompt: Messages, response: str, critique: str) -> Messages:
    """The conversation with response and critique, and a request for a better response."""
    asked = critique_request(principle, prompt, response)
    wanted = f"{principle.revision} Write the new response alone."
    return (*asked, Message("assistant", critique), Message("user", wanted))


def transcript(messages: Sequence[Message]) -> str:
    """Turns as text, each with its speaker."""
    return "\n\n".join(f"{_SPEAKERS[message.role]}: {message.content.strip()}" for message in messages)


def _response_text(response: Messages) -> str:
    """One answer as it is, several turns with their speakers."""
    return response[0].content.strip() if len(response) == 1 else transcript(response)


def _principle(value: object, where: str) -> Principle:
    keys = [field.name for field in fields(Principle)]
    if not isinstance(value, dict):
        raise ValueError(f"{where}: an object with the keys {', '.join(keys)} is needed")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{where}: the keys {', '.join(missing)} are missing; needed are {', '.join(keys)}")
    if unknown := sorted(set(value) - set(keys)):
        raise ValueError(f"{where}: unknown keys {', '.join(unknown)}; a principle has {', '.join(keys)}")
    for key in keys:
        if not isinstance(value[key], str) or not value[key].strip():
            raise ValueError(f"{where}: {key} must be a text that is not empty")
    return Principle(**value)
