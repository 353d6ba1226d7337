"""A language model as somebody to talk to: messages to the ids it is asked with, and its ids to an answer's text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megallm.data.chat_template import ChatTemplate, TemplateRefusal
from megallm.data.conversation import Message, Messages, Unusable
from megallm.data.examples import prompt_text
from megallm.data.masks import common_prefix_length, leading_marks
from megallm.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Continuation:
    """Ids whose end is to be scored."""

    ids: list[int]
    start: int
    """The first one that counts."""


@dataclass(frozen=True, kw_only=True)
class ChatModel:
    """What is known of a model without its weights."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    """None: texts as they are."""
    max_length: int
    """Tokens of prompt and answer together."""

    @property
    def turn_end(self) -> str:
        """The text behind an answer; empty if only the tokenizer's end mark ends it."""
        return "" if self.template is None else self.template.answer_tail[0].strip()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that each end an answer. A turn's end that the tokenizer spells out is none: `answer` cuts there."""
        ends = [] if self.template is None else self.template.stop_ids(self.tokenizer)
        eos = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        return tuple(dict.fromkeys([*(ends if len(ends) == 1 else []), *eos]))

    def prompt(self, messages: Messages, *, new_tokens: int) -> list[int]:
        """The ids that an answer is generated after. Unusable if they and `new_tokens` are too many."""
        ids = self._encode(_rendered(messages, self.tokenizer, self.template))
        self._check_length(len(ids) + new_tokens)
        return ids

    def choices(self, messages: Messages, answers: Sequence[str]) -> list[Continuation]:
        """The conversation up to the end of each answer, scored from the first token in which they differ: what is
        before has the same probability for all of them."""
        texts = [self._answered(messages, answer) for answer in answers]
        encoded = [self._encode(text) for text in texts]
        first = np.array(encoded[0])
        start = min(common_prefix_length(first, np.array(other)) for other in encoded[1:])
        for ids in encoded:
            self._check_length(len(ids))
        if start == 0 or start >= min(map(len, encoded)):
            raise Unusable("answers that the tokenizer does not tell apart")
        return [Continuation(ids, start) for ids in encoded]

    def answer(self, ids: Sequence[int]) -> str:
        """The text of generated ids, up to the end of the turn."""
        text = self.tokenizer.decode(ids)
        return (text.partition(self.turn_end)[0] if self.turn_end else text).strip()

    def _answered(self, messages: Messages, answer: str) -> str:
        prompt = _rendered(messages, self.tokenizer, self.template)
        if self.template is None:
            return prompt + answer
        whole = self.template.render((*messages, Message("assistant", answer)))
        return whole[: whole.rindex(answer) + len(answer)]

    def _encode(self, text: str) -> list[int]:
        lead = leading_marks(self.tokenizer) if self.template is None else ()
        return [*lead, *self.tokenizer.encode(text, add_special_tokens=False)]

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise Unusable(f"longer than seq_length ({self.max_length})", detail=f"{length} tokens")


def _rendered(messages: Messages, tokenizer: Tokenizer, template: ChatTemplate | None) -> str:
    try:
        return prompt_text(messages, tokenizer, template)
    except TemplateRefusal as reason:
        raise Unusable(str(reason)) from reason
