"""Text of tokens as they come: whole characters only, and the strings that end an answer.

A token may be a part of a character, and how it reads may depend on the one before it (the blanks of sentencepiece): a
few tokens before the new one are decoded with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megallm.data.tokenizer import Tokenizer
from megallm.generate.sampling import Sampling

_UNFINISHED = "\ufffd"


class TextStream:
    """The text of one answer."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stop_strings
        self._ids: list[int] = []
        self._shown = self._known = 0
        self._longest = max(map(len, stop_strings), default=0)
        self.text = ""
        """What there is so far, up to the first stop string."""
        self.is_stopped = False
        """Whether a stop string is complete."""

    def push(self, token: int) -> str:
        """The text that the token adds: empty within a character, or where a special token is not shown."""
        self._ids.append(token)
        known = self._tokenizer.decode(self._ids[self._shown : self._known])
        text = self._tokenizer.decode(self._ids[self._shown :])
        if len(text) <= len(known) or text.endswith(_UNFINISHED):
            return ""
        self._shown, self._known = self._known, len(self._ids)
        return self._extend(text[len(known) :])

    def _extend(self, new: str) -> str:
        before = len(self.text)
        self.text += new
        first = max(0, before - self._longest + 1)
        found = [at for stop in self._stops if (at := self.text.find(stop, first)) >= 0]
        if found:
            self.is_stopped = True
            self.text = self.text[: min(found)]
        return self.text[before:]


def with_special_stops(sampling: Sampling, tokenizer: Tokenizer | None) -> Sampling:
    """The sampling with the ids of special tokens in place of stop strings that spell them: no text shows such a token.
    ValueError for a string with such a token and more."""
    marks = () if tokenizer is None else tokenizer.control_tokens
    for stop in sampling.stop_strings:
        mark = next((mark for mark in marks if mark in stop), None)
        if mark is not None and stop not in marks:
            raise ValueError(
                f"the stop string {stop!r} holds the special token {mark}, which no text of an answer shows: use "
                f"{mark} alone"
            )
    named = [tokenizer.token_to_id(stop) for stop in sampling.stop_strings if stop in marks] if tokenizer else []
    return replace(
        sampling,
        stop_ids=(*sampling.stop_ids, *(token_id for token_id in named if token_id is not None)),
        stop_strings=tuple(stop for stop in sampling.stop_strings if stop not in marks),
    )


def cut_text(tokenizer: Tokenizer, ids: Sequence[int], stop_strings: Sequence[str] = ()) -> str:
    """The text of an answer, up to the first stop string."""
    text = tokenizer.decode(ids)
    return text[: min((at for stop in stop_strings if (at := text.find(stop)) >= 0), default=len(text))]
