"""Conversations, preferences and rankings, checked; rows that cannot be trained on are counted by reason.

    Conversation    system? (user assistant)+          a lone assistant message is text taken as it is
    Preference      prompt | chosen | rejected         prompt: system? (user assistant)* user
    Ranking         prompt | responses, best first     each response: assistant (user assistant)*

A record whose keys or types are wrong is an error that names file and line. A record that is well formed but of no use
(an empty answer, a role that no template knows) is left out and counted in `Dropped`: never silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    """One of ROLES."""
    content: str


Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Conversation:
    """What one row of supervised fine-tuning says."""

    messages: Messages
    where: str = field(default="", compare=False)
    """FILE:LINE of the record, if it came from a file."""

    @property
    def is_plain_text(self) -> bool:
        """Whether this is text taken as it is, without a template: a lone assistant message."""
        return len(self.messages) == 1


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, one better than the other."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float | None = None
    """How much better, in the data set's own unit; None = not said."""
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Ranking:
    """Several answers to one prompt."""

    prompt: Messages
    responses: tuple[Messages, ...]
    """Best first."""
    scores: tuple[float, ...] | None = None
    """Descending, one a response; equal ones say nothing about which is better. None = no two are equally good."""
    order: tuple[int, ...] | None = None
    """The place of each of `responses` in the record; None = they stand as there."""
    where: str = field(default="", compare=False)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The place of each response, 0 the best; equal scores share a place."""
        if self.scores is None:
            return tuple(range(len(self.responses)))
        return tuple(self.scores.index(score) for score in self.scores)


@dataclass
class Dropped:
    """Rows that were left out."""

    counts: dict[str, int] = field(default_factory=dict)
    """Reason: how many."""
    first: dict[str, str] = field(default_factory=dict)
    """Reason: where the first one was."""

    @property
    def total(self) -> int:
        """Rows left out in all."""
        return sum(self.counts.values())

    def add(self, reason: str, where: str = "", *, count: int = 1) -> None:
        """Count rows."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.first.setdefault(reason, where)

    def add_row(self, reason: Exception, where: str) -> None:
        """Count a row for which `reason` was raised."""
        detail = reason.detail if isinstance(reason, Unusable) else ""
        self.add(str(reason), ": ".join(part for part in (where, detail) if part))

    def update(self, other: Dropped) -> None:
        """Count the rows of `other` too."""
        for reason, count in other.counts.items():
            self.add(reason, other.first[reason], count=count)

    def require(self, kept: int, what: str) -> None:
        """ValueError if nothing is left."""
        if not kept:
            raise ValueError(f"no {what} left to use: {self}")

    def __str__(self) -> str:
        if not self.counts:
            return "no row left out"
        parts = []
        for reason, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            where = self.first[reason]
            parts.append(f"{count} {reason}" + (f" (first: {where})" if where else ""))
        return f"{self.total} row{'' if self.total == 1 else 's'} left out: " + ", ".join(parts)


class Unusable(Exception):
    """A well-formed row that cannot be trained on; the message is the reason it is counted under."""

    def __init__(self, reason: str, *, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail
        """What to say of the first such row."""


def check_conversation(messages: Messages) -> Messages:
    """The messages of a conversation that ends with an answer. Unusable says what is wrong."""
    if not any(message.role == "assistant" for message in messages):
        raise Unusable("no assistant message")
    if messages[-1].role != "assistant":
        raise Unusable("the last message is not the assistant's")
    _check_turns(_without_system(messages), first="user")
    return messages


def check_prompt(messages: Messages) -> Messages:
    """The messages of a prompt: a conversation that waits for an answer."""
    body = _without_system(messages)
    if not body:
        raise Unusable("empty prompt")
    if body[-1].role != "user":
        raise Unusable("the prompt does not end with a user message")
    _check_turns(body, first="user")
    return messages


def check_response(messages: Messages) -> Messages:
    """The messages that follow a prompt, from one of the assistant to one of the assistant."""
    if not messages:
        raise Unusable("empty response")
    if messages[-1].role != "assistant":
        raise Unusable("the last message is not the assistant's")
    _check_turns(messages, first="assistant")
    return messages


def check_text(text: str) -> str:
    """The text, if it can be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Unusable("half of a surrogate pair in the text") from None
    return text


def _without_system(messages: Messages) -> Messages:
    """Without the system message at the start."""
    return messages[1:] if messages and messages[0].role == "system" else messages


def _check_turns(messages: Sequence[Message], *, first: str) -> None:
    expected = first
    for index, message in enumerate(messages):
        check_text(message.content)
        if message.role == "system":
            raise Unusable("a system message that is not the first")
        if message.role != expected:
            raise Unusable(f"the first message is not the {first}'s" if index == 0 else "two messages of one role")
        if not message.content.strip():
            raise Unusable("empty response" if message.role == "assistant" else "empty user message")
        expected = "user" if expected == "assistant" else "assistant"
