"""Examples: rows of fine-tuning data to sequences of at most `max_length` tokens, all that is left out counted.

Constructions of a conversation with several answers:

    all-turns   one example, every answer trained
    last-turn   one example, the last answer trained
    split       an example an answer: the conversation up to it, it alone trained

`all-turns` and `split` train the same (context, target) pairs exactly if the template is prefix-stable: if it renders a
conversation's beginning as the beginning of the whole. Their summed losses are then equal, at O(n) against O(n^2)
tokens; means weigh them differently, token by token against answer by answer.

A group is the answers to one prompt that a preference or a ranking compares, an example each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, Protocol, TypeVar

import numpy as np

from megallm.data.chat_template import ChatTemplate, TemplateRefusal
from megallm.data.conversation import Conversation, Dropped, Message, Messages, Preference, Ranking, Unusable
from megallm.data.masks import (
    Example,
    Source,
    TokenIds,
    leading_marks,
    template_source,
    text_source,
)
from megallm.data.tokenizer import Encoded, Tokenizer

Construction = Literal["all-turns", "last-turn", "split"]
CONSTRUCTIONS: tuple[Construction, ...] = ("all-turns", "last-turn", "split")
TrainOn = Literal["answers", "full"]
TRAIN_ON: tuple[TrainOn, ...] = ("answers", "full")
Overflow = Literal["truncate", "drop", "refuse"]
OVERFLOWS: tuple[Overflow, ...] = ("truncate", "drop", "refuse")
_ROWS_AT_ONCE = 512


class _HasPlace(Protocol):
    @property
    def where(self) -> str: ...


Row = TypeVar("Row", bound=_HasPlace)
Item = TypeVar("Item")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class Group:
    """The answers to one prompt, to be compared."""

    examples: tuple[Example, ...]
    """An answer each, best first: (chosen, rejected) of a preference. They end where the answer ends."""
    ranks: tuple[int, ...]
    """Their places, 0 the best; equal ones are not compared."""
    margin: float | None = None
    """How much better the first one is, where the data say it."""
    order: tuple[int, ...] | None = None
    """The place of each example's answer in the record; None = they stand as there."""


def conversation_examples(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    max_length: int,
    construction: Construction = "all-turns",
    train_on: TrainOn = "answers",
    overflow: Overflow = "truncate",
    dropped: Dropped | None = None,
) -> tuple[list[Example], Dropped]:
    """The examples of conversations, in order, and what was left out.

    Without a template a conversation is a prompt and a completion, taken as they are; a text alone is so with a
    template too. `train_on` full: every token is a target. `overflow`: what becomes of longer examples; cut at the end
    they keep the labels of what is left, and no end mark is put where nothing ended. `dropped`: what was left out
    before, counted on."""
    _check_choice("construction", construction, CONSTRUCTIONS)
    _check_choice("train_on", train_on, TRAIN_ON)
    _check_fit(max_length, overflow)
    _say_if_nothing_ends(template)
    examples: list[Example] = []
    left_out = Dropped() if dropped is None else dropped

    def sources(conversation: Conversation) -> list[Source]:
        return _conversation_sources(conversation, tokenizer, template, construction)

    for conversation, made in _encode(conversations, sources, tokenizer, left_out):
        for example in made:
            if train_on == "full":
                example = replace(example, is_trained=np.arange(len(example)) > 0)
            try:
                examples.append(fit(example, max_length, overflow=overflow, where=conversation.where))
            except Unusable as reason:
                left_out.add_row(reason, conversation.where)
    left_out.require(len(examples), "conversation")
    return examples, left_out


def comparison_groups(
    rows: Iterable[Preference | Ranking],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    max_length: int,
    overflow: Overflow = "truncate",
    dropped: Dropped | None = None,
) -> tuple[list[Group], Dropped]:
    """The answers of each preference or ranking, each trained from the end of the prompt to its own end, and what was
    left out: a row goes as a whole. `dropped`: what was left out before, counted on."""
    _check_fit(max_length, overflow)
    _say_if_nothing_ends(template)
    groups: list[Group] = []
    left_out = Dropped() if dropped is None else dropped

    def sources(row: Preference | Ranking) -> list[Source]:
        start = len(row.prompt)
        return [_source(row.prompt + answer, start, row.where, tokenizer, template) for answer in _answers(row)]

    for row, made in _encode(rows, sources, tokenizer, left_out):
        try:
            fitted = [fit(ended(each), max_length, overflow=overflow, where=row.where) for each in made]
            if len({example.input_ids.tobytes() for example in fitted}) < len(fitted):
                raise Unusable("two answers equal within max_length")
        except Unusable as reason:
            left_out.add_row(reason, row.where)
            continue
        if isinstance(row, Ranking):
            groups.append(Group(examples=tuple(fitted), ranks=row.ranks, order=row.order))
        else:
            groups.append(Group(examples=tuple(fitted), ranks=(0, 1), margin=row.margin))
    left_out.require(len(groups), "comparison")
    return groups, left_out


def prompt_ids(
    prompts: Iterable[Messages], tokenizer: Tokenizer, template: ChatTemplate | None, *, max_length: int
) -> tuple[list[TokenIds], Dropped]:
    """The ids that an answer is generated after, of each prompt that has at most `max_length`: those that training on
    the same prompt begins with."""
    _check_fit(max_length, "drop")
    made: list[TokenIds] = []
    dropped = Dropped()
    for batch in _batches(prompts):
        texts = []
        for messages in batch:
            try:
                texts.append(prompt_text(messages, tokenizer, template))
            except (Unusable, TemplateRefusal) as reason:
                dropped.add(str(reason))
        lead = np.array(leading_marks(tokenizer) if template is None else (), dtype=np.int32)
        for encoded in tokenizer.encode_batch_with_offsets(texts, add_special_tokens=False):
            ids = np.concatenate([lead, encoded.ids])
            if len(ids) > max_length:
                dropped.add(f"prompts longer than max_length ({max_length})")
            else:
                made.append(ids)
    dropped.require(len(made), "prompt")
    return made, dropped


def prompt_text(messages: Messages, tokenizer: Tokenizer, template: ChatTemplate | None) -> str:
    """The text that an answer is generated after. Unusable if a message holds a special token."""
    if template is None:
        return text_source((*messages, Message("assistant", "-")), tokenizer).prompt
    _check_marks(messages, tokenizer, template)
    return template.render(messages, add_generation_prompt=True)


def fit(example: Example, max_length: int, *, overflow: Overflow = "truncate", where: str = "") -> Example:
    """The example in at most `max_length` tokens. Unusable if nothing of it is trained then, ValueError if it is longer
    and `overflow` is refuse."""
    too_long = len(example) - max_length
    if too_long > 0:
        if overflow == "refuse":
            place = f"{where}: " if where else ""
            raise ValueError(
                f"{place}{len(example)} tokens are more than max_length ({max_length}): raise it, or choose the "
                "overflow truncate (cut at the end) or drop"
            )
        if overflow == "drop":
            raise Unusable(f"longer than max_length ({max_length})")
        example = replace(
            example,
            input_ids=example.input_ids[:max_length].copy(),
            is_trained=example.is_trained[:max_length].copy(),
            prompt_length=min(example.prompt_length, max_length),
            num_cut=example.num_cut + too_long,
        )
    if not example.is_trained.any():
        raise Unusable(f"no answer within max_length ({max_length})" if too_long > 0 else "nothing to train on")
    return example


def _conversation_sources(
    conversation: Conversation, tokenizer: Tokenizer, template: ChatTemplate | None, construction: Construction
) -> list[Source]:
    messages, where = conversation.messages, conversation.where
    if template is None or conversation.is_plain_text:
        return [text_source(messages, tokenizer, where=where)]
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if construction == "all-turns":
        return [_source(messages, 0, where, tokenizer, template)]
    if construction == "last-turn":
        return [_source(messages, answers[-1], where, tokenizer, template)]
    return [_source(messages[: index + 1], index, where, tokenizer, template) for index in answers]


def _source(
    messages: Messages, first: int, where: str, tokenizer: Tokenizer, template: ChatTemplate | None
) -> Source:
    """The conversation, trained on its answers from message `first` on."""
    if template is None:
        return text_source(messages, tokenizer, where=where)
    _check_marks(messages, tokenizer, template)
    return template_source(messages, template, first=first, where=where)


def _answers(row: Preference | Ranking) -> tuple[Messages, ...]:
    return row.responses if isinstance(row, Ranking) else (row.chosen, row.rejected)


def ended(example: Example) -> Example:
    """Without what a template writes behind the last answer: a score is read at the token that ends it, as it will be
    of a generated one."""
    end = int(np.flatnonzero(example.is_trained)[-1]) + 1 if example.is_trained.any() else len(example)
    return replace(example, input_ids=example.input_ids[:end], is_trained=example.is_trained[:end])


def _check_marks(messages: Messages, tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """A special token or a turn's end inside a message would be read as the template's own."""
    turn_end = template.answer_tail[0].strip()
    for message in messages:
        for mark in (*tokenizer.control_tokens, turn_end):
            if mark and mark in message.content:
                raise Unusable(f"the special token {mark} in a message")


def _encode(
    rows: Iterable[Row], sources_of: Callable[[Row], list[Source]], tokenizer: Tokenizer, dropped: Dropped
) -> Iterator[tuple[Row, list[Example]]]:
    """Each row that is of use, with the examples of its sources; tokenised many rows at a time."""
    for batch in _batches(rows):
        planned: list[tuple[Row, list[Source]]] = []
        for row in batch:
            try:
                planned.append((row, sources_of(row)))
            except (Unusable, TemplateRefusal) as reason:
                dropped.add_row(reason, row.where)
        sources = [source for _, each in planned for source in each]
        encoded = iter(_encode_texts(sources, tokenizer))
        for row, each in planned:
            inputs = [[next(encoded) for _ in source.texts] for source in each]
            try:
                made = [source.example(own) for source, own in zip(each, inputs, strict=True)]
            except Unusable as reason:
                dropped.add_row(reason, row.where)
                continue
            yield row, made


def _encode_texts(sources: Sequence[Source], tokenizer: Tokenizer) -> list[Encoded]:
    texts = [text for source in sources for text in source.texts]
    try:
        return tokenizer.encode_batch_with_offsets(texts, add_special_tokens=False)
    except ValueError as error:
        for source in sources:  # which one?
            try:
                tokenizer.encode_batch_with_offsets(source.texts, add_special_tokens=False)
            except ValueError as own:
                raise ValueError(f"{source.where}: {own}" if source.where else str(own)) from error
        raise


def _batches(rows: Iterable[Item]) -> Iterator[list[Item]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, _ROWS_AT_ONCE)):
        yield batch


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not known: use one of {', '.join(choices)}")


def _check_fit(max_length: int, overflow: str) -> None:
    _check_choice("overflow", overflow, OVERFLOWS)
    if max_length < 2:
        raise ValueError(f"max_length ({max_length}) must be at least 2: a token, and one that follows it")


def _say_if_nothing_ends(template: ChatTemplate | None) -> None:
    if template is not None and not template.answer_tail[0]:
        _logger.warning("%s puts nothing behind an answer: a model trained with it never stops", template.name)
