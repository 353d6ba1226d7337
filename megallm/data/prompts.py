"""Prompts to answer: records to the ids that a model is asked with, endless, in an order that is a function of (seed,
number of the prompt).

A record needs a prompt only (`prompt`: a text or messages); of conversations and preferences it is what comes before
the answer. All its other columns go along, for whoever rewards the answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megallm.data.chat_model import ChatModel
from megallm.data.conversation import Dropped, Messages, Unusable
from megallm.data.convert import prompts as prompts_of
from megallm.data.embedded import EMBEDDED, Split
from megallm.data.permutation import hash_ints, permute
from megallm.data.records import place, read_records

_ORDER = 3
"""Which of the random orders of an epoch a hash is for; data/finetune.py has 1 and 2."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is asked."""

    ids: list[int]
    """As the model reads it, template included."""
    text: str
    """Its messages without a template, a blank line between two."""
    record: dict[str, Any] = field(repr=False)
    """The record that it is from, with all its columns."""


def read_prompts(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None = None,
    *,
    embedded: str = "prompts",
    split: Split = "train",
) -> list[dict[str, Any]]:
    """The records of .jsonl and .json files, in order; of None or no files, those of data/embedded.py of this name.

    ValueError or FileNotFoundError for what cannot be read."""
    if paths is not None:
        listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        if listed:
            return read_records(listed)
    if embedded not in EMBEDDED:
        raise ValueError(f"embedded records {embedded!r} are not known: use one of {', '.join(EMBEDDED)}")
    return EMBEDDED[embedded](split)


def plain_prompts(records: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    """The prompts of `records` before a model reads them, all lengths, without ids. ValueError if there are none."""
    found: list[Prompt] = []
    dropped = Dropped()
    for record in records:
        made, left_out = prompts_of([record])
        dropped.update(left_out)
        found += [Prompt(ids=[], text=_text(messages), record=dict(record)) for messages in made]
    dropped.require(len(found), "prompt")
    return found


class PromptDataset:
    """Prompts that fit, each once an epoch."""

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        chat: ChatModel,
        *,
        max_prompt_tokens: int,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        """The prompts of `records` that have at most `max_prompt_tokens` tokens, as `chat` writes them. Without
        `shuffle` every epoch has the order of the records. ValueError if there are none."""
        if max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens ({max_prompt_tokens}) must be at least 1")
        self.dropped = Dropped()
        """What was left out, by reason."""
        self._seed, self._shuffle = seed, shuffle
        self._prompts: list[Prompt] = []
        for record in records:
            try:
                self._prompts += self._made(record, chat, max_prompt_tokens)
            except Unusable as reason:
                self.dropped.add_row(reason, _where(record))
        self.dropped.require(len(self._prompts), "prompt")

    @property
    def num_prompts(self) -> int:
        """Prompts of an epoch."""
        return len(self._prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.ids) for prompt in self._prompts)

    @property
    def prompts(self) -> Sequence[Prompt]:
        """Those of an epoch, in the records' order."""
        return self._prompts

    def summary(self) -> str:
        """A line: how many prompts, their lengths, what was left out."""
        lengths = sorted(len(prompt.ids) for prompt in self._prompts)
        middle = lengths[len(lengths) // 2]
        return (
            f"{len(lengths):,} prompts of {lengths[0]:,} to {lengths[-1]:,} tokens (median {middle:,}); {self.dropped}"
        )

    def member(self, index: int) -> int:
        """Which of the prompts `index` is, by its place among those that fit, in the records' order."""
        if index < 0:
            raise IndexError(f"prompt {index}: prompts count from 0")
        epoch, at = divmod(index, self.num_prompts)
        return permute(at, self.num_prompts, hash_ints(self._seed, epoch, _ORDER)) if self._shuffle else at

    def prompt(self, index: int) -> Prompt:
        """Prompt number `index`, from 0, without end."""
        return self._prompts[self.member(index)]

    def _made(self, record: Mapping[str, Any], chat: ChatModel, max_prompt_tokens: int) -> list[Prompt]:
        """The prompt of the record, or none, counted."""
        found, left_out = prompts_of([record])
        self.dropped.update(left_out)
        made = []
        for messages in found:
            ids = chat.prompt(messages, new_tokens=0)
            if not ids:
                raise Unusable("a prompt without tokens")
            if len(ids) > max_prompt_tokens:
                reason = f"longer than max_prompt_tokens ({max_prompt_tokens}), what seq_length leaves beside answers"
                raise Unusable(reason, detail=f"{len(ids)} tokens")
            made.append(Prompt(ids=ids, text=_text(messages), record=dict(record)))
        return made


def _text(messages: Messages) -> str:
    return "\n\n".join(message.content for message in messages)


def _where(record: Mapping[str, Any]) -> str:
    where = place(record)
    return "" if where == "a record" else where
