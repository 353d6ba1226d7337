"""Masks: the ids of a conversation, and which of them are targets of the loss.

    text        <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    is_trained  0           0   00 0         0 0           0        0 1    1         0
    labels      at t the id of token t + 1 if that is trained, else -100

A mask belongs to the token that is the target. It is made from places in the text, never from the value of an id: a
pad or end id inside an answer is a token like any other. Where the answers are is found in one of three ways:

    Marked      {% generation %} blocks of the template: characters, turned into tokens by the tokenizer's offsets
    Prefixed    else: the conversation up to each answer and with it, rendered and tokenised again; refused where these
                are not what the whole begins with, in text and in ids
    TextPair    prompt and completion without a template: from where their ids leave those of the prompt alone

A token that straddles the beginning of an answer holds a piece of it and is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megallm.data.chat_template import ChatTemplate, Span
from megallm.data.conversation import Messages, Unusable
from megallm.data.dataset import IGNORE_INDEX, Ids
from megallm.data.tokenizer import Encoded, Tokenizer

TokenIds = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False, kw_only=True)
class Example:
    """A sequence to train on."""

    input_ids: TokenIds
    """[n]."""
    is_trained: Mask
    """[n]: token i is a target of the loss. Never the first one, which nothing predicts."""
    prompt_length: int
    """Tokens before the first one of an answer."""
    num_cut: int = 0
    """Tokens left out at the end for their number."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_trained(self) -> int:
        """Targets of the loss."""
        return int(self.is_trained.sum())


def labels(example: Example) -> Ids:
    """[n] int64: at t the id of token t + 1 if that is trained, else -100; -100 at the end."""
    following: Ids = np.full(len(example), IGNORE_INDEX, dtype=np.int64)
    following[:-1] = np.where(example.is_trained[1:], example.input_ids[1:], IGNORE_INDEX)
    return following


class Source(Protocol):
    """Text whose ids and mask are known once its `texts` have been tokenised."""

    @property
    def texts(self) -> Sequence[str]:
        """What to tokenise, without special tokens."""
        ...

    @property
    def where(self) -> str:
        """FILE:LINE."""
        ...

    def example(self, encoded: Sequence[Encoded]) -> Example:
        """The example, of the encoded `texts`. ValueError or Unusable where no mask can be told."""
        ...


@dataclass(frozen=True, kw_only=True)
class Marked:
    """A text whose answers are known by their characters."""

    texts: tuple[str]
    spans: tuple[Span, ...]
    where: str

    def example(self, encoded: Sequence[Encoded]) -> Example:
        """Trains every token that holds a character of a span."""
        mask = np.zeros(len(encoded[0].ids), dtype=np.bool_)
        for start, end in self.spans:
            mask |= encoded[0].overlapping(start, end)
        return _masked(encoded[0].ids, mask)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """An answer, by what is rendered before and with it."""

    number: int
    """Its place among the messages, from 1."""
    prompt: str
    """The conversation before it and the generation prompt."""
    text: str
    """The conversation with it."""
    end: int
    """Character of `text` behind what ends the turn."""


@dataclass(frozen=True, kw_only=True)
class Prefixed:
    """A text whose answers are known by the texts that it should begin with."""

    whole: str
    turns: tuple[Turn, ...]
    template_name: str
    where: str

    @property
    def texts(self) -> tuple[str, ...]:
        """The whole, then before and with each answer."""
        return (self.whole, *(text for turn in self.turns for text in (turn.prompt, turn.text)))

    def example(self, encoded: Sequence[Encoded]) -> Example:
        """Trains from the end of each prompt to the end of its turn. ValueError where the template renders these
        otherwise in the whole, Unusable where only tokens merge over their ends."""
        ids = encoded[0].ids
        mask = np.zeros(len(ids), dtype=np.bool_)
        for index, turn in enumerate(self.turns):
            before, upto = encoded[1 + 2 * index], encoded[2 + 2 * index]
            start, stop = len(before.ids), int(np.count_nonzero(upto.starts < turn.end))
            self._check(turn, "before it", turn.prompt, before.ids, ids)
            self._check(turn, "up to its end", turn.text[: turn.end], upto.ids[:stop], ids)
            mask[start:stop] = True
        return _masked(ids, mask)

    def _check(self, turn: Turn, part: str, text: str, prefix: TokenIds, ids: TokenIds) -> None:
        if np.array_equal(prefix, ids[: len(prefix)]):
            return
        same = common_prefix_length(prefix, ids)
        runs = (
            f"message {turn.number}: from token {same} on {prefix[same : same + 8].tolist()} alone, "
            f"{ids[same : same + 8].tolist()} in the whole"
        )
        if self.whole.startswith(text):
            raise Unusable("an answer whose tokens merge with its neighbours'", detail=runs)
        raise ValueError(
            f"{self.where}{': ' if self.where else ''}{self.template_name} renders the conversation {part} not as the "
            f"whole begins, so that this answer cannot be told from the rest. {runs[0].upper()}{runs[1:]}. Use a "
            "template with {% generation %} marks, or the construction split, or last-turn"
        )


@dataclass(frozen=True, kw_only=True)
class TextPair:
    """A prompt and its completion, taken as they are."""

    prompt: str
    completion: str
    lead: tuple[int, ...]
    """Ids before the prompt: the start mark of tokenizers that put one."""
    end: tuple[int, ...]
    """Ids after the completion: the end mark."""
    where: str

    @property
    def texts(self) -> tuple[str, str]:
        """The prompt, and both."""
        return self.prompt, self.prompt + self.completion

    def example(self, encoded: Sequence[Encoded]) -> Example:
        """Trains the ids of both from where they differ from the prompt's own, and the end mark."""
        prompt_length = len(self.lead) + common_prefix_length(encoded[0].ids, encoded[1].ids)
        parts = [np.array(self.lead, dtype=np.int32), encoded[1].ids, np.array(self.end, dtype=np.int32)]
        ids = np.concatenate(parts)
        mask = np.arange(len(ids)) >= max(prompt_length, 1)
        return Example(input_ids=ids, is_trained=mask, prompt_length=prompt_length)


def template_source(
    messages: Messages, template: ChatTemplate, *, first: int = 0, where: str = ""
) -> Marked | Prefixed:
    """The conversation rendered by the template, its answers from message `first` on (counted from 0) to be trained."""
    turn_end, rest = template.answer_tail
    answers = [index for index, message in enumerate(messages) if message.role == "assistant" and index >= first]
    if not template.has_generation_marks:
        return Prefixed(
            whole=template.render(messages),
            turns=tuple(_turn(messages, index, template, rest) for index in answers),
            template_name=template.name,
            where=where,
        )
    text, spans = template.render_with_spans(messages)
    # An answer may have several blocks: those of earlier answers are as many as there are in what precedes `first`.
    before = messages[: answers[0]] if first else ()
    earlier = len(template.render_with_spans(before, add_generation_prompt=True)[1]) if before else 0
    if len(spans) - earlier < len(answers):
        raise ValueError(
            f"{where}{': ' if where else ''}{template.name} marks {len(spans) - earlier} generations for "
            f"{len(answers)} answers: {{% generation %}} must stand around each"
        )
    # What ends the turn is trained too where a template has it behind the block: else no answer ever ends.
    chosen = tuple(
        (start, end + len(turn_end) if text.startswith(turn_end, end) else end) for start, end in spans[earlier:]
    )
    return Marked(texts=(text,), spans=chosen, where=where)


def text_source(messages: Messages, tokenizer: Tokenizer, *, where: str = "") -> TextPair:
    """A lone answer, or a user message and an answer, without a template. ValueError for any other conversation, and
    if the tokenizer has no end mark: nothing would teach the model to stop."""
    if [message.role for message in messages] not in (["assistant"], ["user", "assistant"]):
        place = f"{where}: " if where else ""
        raise ValueError(
            f"{place}a conversation of {len(messages)} messages ({', '.join(m.role for m in messages)}) needs a chat "
            "template: choose one with --template, e.g. chatml; only a prompt and a completion do without"
        )
    if tokenizer.eos_id is None:
        raise ValueError(
            "the tokenizer has no end mark, so that a model would not learn to stop: use a tokenizer that has one, or "
            "a chat template that ends its turns"
        )
    prompt, completion = "".join(message.content for message in messages[:-1]), messages[-1].content
    has_end = completion.endswith(tokenizer.special_tokens().get("eos_token", "\0"))
    return TextPair(
        prompt=prompt,
        completion=completion,
        lead=leading_marks(tokenizer),
        end=() if has_end else (tokenizer.eos_id,),
        where=where,
    )


def leading_marks(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The start mark that the tokenizer itself puts before every text, if it does."""
    return tuple(token for token in tokenizer.encode("")[:1] if token == tokenizer.bos_id)


def common_prefix_length(first: TokenIds, second: TokenIds) -> int:
    """How many ids both begin with."""
    shorter = min(len(first), len(second))
    differing = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(differing[0]) if len(differing) else shorter


def _turn(messages: Messages, index: int, template: ChatTemplate, rest: str) -> Turn:
    text = template.render(messages[: index + 1])
    return Turn(
        number=index + 1,
        prompt=template.render(messages[:index], add_generation_prompt=True),
        text=text,
        end=len(text) - len(rest) if text.endswith(rest) else len(text),
    )


def _masked(ids: TokenIds, mask: Mask) -> Example:
    """The first trained token ends the prompt; token 0 is no target."""
    prompt_length = int(np.argmax(mask)) if mask.any() else len(ids)
    mask[:1] = False
    return Example(input_ids=ids, is_trained=mask, prompt_length=prompt_length)
