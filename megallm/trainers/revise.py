"""Responses of a language model: sampled ones, and revisions of them by its own critiques.

    prompt, response -> critique by a principle -> revision -> critique by another one -> ...

The supervised half of Constitutional AI (Bai et al., arXiv 2212.08073, section 3.1). Principles and samples are
functions of the seed; the functions here are collectives, with their results on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from megallm.data.chat_model import ChatModel
from megallm.data.constitution import Constitution, Principle, critique_request, revision_principle, revision_request
from megallm.data.conversation import Dropped, Message, Messages, Unusable
from megallm.data.judged import Judged, as_content
from megallm.data.permutation import hash_ints
from megallm.generate.sampling import Sampling
from megallm.trainers.engine import Engine

_RESPONSE, _CRITIQUE, _REVISION = 1, 2, 3
"""Purposes of samples: each has a seed of its own."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are generated."""

    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Revised:
    """A response and what became of it."""

    item: Judged
    response: str
    """The newest."""
    steps: tuple[dict[str, str], ...] = ()
    """`principle`, `critique` and `revision` of each round."""

    @property
    def original(self) -> str:
        """The response that was there at first."""
        return self.item.responses[0][0].content

    @property
    def where(self) -> str:
        """FILE:LINE."""
        return self.item.where

    def record(self, *, sft: bool) -> dict[str, Any]:
        """A preference record, the revision over the original; `sft`: prompt and completion."""
        texts = {"completion": self.response} if sft else {"chosen": self.response, "rejected": self.original}
        return {"prompt": as_content(self.item.prompt), **texts, "steps": list(self.steps)}


Row = TypeVar("Row", Judged, Revised)


def respond(
    engine: Engine, chat: ChatModel, items: Sequence[Judged], decoding: Decoding, *, count: int
) -> tuple[list[Judged], Dropped]:
    """The items in order, those without a response with `count` sampled ones. A collective.

    Left out: prompts that are too long, and those that get an empty response or two equal ones.
    """
    dropped = Dropped()
    lacking = [(item, item.prompt) for item in items if not item.responses]
    found: dict[int, tuple[Messages, ...]] = {}
    for item, texts in _answers(engine, chat, lacking, decoding, (_RESPONSE,), dropped, count=count):
        if len(set(texts)) < count:
            dropped.add("two equal sampled responses", item.where)
        else:
            found[item.number] = tuple((Message("assistant", text),) for text in texts)
    complete = [replace(item, responses=item.responses or found.get(item.number, ())) for item in items]
    return [item for item in complete if item.responses], dropped


def revise(
    engine: Engine,
    chat: ChatModel,
    items: Sequence[Judged],
    constitution: Constitution,
    decoding: Decoding,
    *,
    rounds: int,
) -> tuple[list[Revised], Dropped]:
    """`rounds` times a critique and a revision of each item's response. A collective.

    Left out: what grows too long, and where the model answers nothing or changes nothing.
    """
    dropped = Dropped()
    rows = [Revised(item=item, response=item.responses[0][0].content) for item in items]
    for number in range(rounds):

        def principle(row: Revised, number: int = number) -> Principle:
            return revision_principle(constitution, seed=decoding.seed, record=row.item.number, round_number=number)

        wanted = [(row, critique_request(principle(row), row.item.prompt, row.response)) for row in rows]
        rows = [
            replace(row, steps=(*row.steps, {"principle": principle(row).name, "critique": critique}))
            for row, (critique,) in _answers(engine, chat, wanted, decoding, (_CRITIQUE, number), dropped)
        ]
        wanted = [
            (row, revision_request(principle(row), row.item.prompt, row.response, row.steps[-1]["critique"]))
            for row in rows
        ]
        rows = [
            replace(row, response=text, steps=(*row.steps[:-1], row.steps[-1] | {"revision": text}))
            for row, (text,) in _answers(engine, chat, wanted, decoding, (_REVISION, number), dropped)
        ]
    for row in rows:
        if row.response == row.original:
            dropped.add("revision equal to the original", row.where)
    return [row for row in rows if row.response != row.original], dropped


def _answers(
    engine: Engine,
    chat: ChatModel,
    wanted: Sequence[tuple[Row, Messages]],
    decoding: Decoding,
    purpose: tuple[int, ...],
    dropped: Dropped,
    *,
    count: int = 1,
) -> list[tuple[Row, list[str]]]:
    """Rows with the `count` texts that the model answers their messages with; too long prompts and empty answers are
    left out. A collective."""
    asked: list[tuple[Row, list[int]]] = []
    for row, messages in wanted:
        try:
            asked.append((row, chat.prompt(messages, new_tokens=decoding.max_new_tokens)))
        except Unusable as reason:
            dropped.add_row(reason, row.where)
    sampling = Sampling(
        temperature=decoding.temperature, seed=hash_ints(decoding.seed, *purpose), stop_ids=chat.stop_ids
    )
    prompts = [ids for _, ids in asked for _ in range(count)]
    new = engine.generate(prompts, max_new_tokens=decoding.max_new_tokens, sampling=sampling) if prompts else []
    texts = [chat.answer(ids) for ids in new]
    found = []
    for index, (row, _) in enumerate(asked):
        own = texts[index * count : (index + 1) * count]
        if all(own):
            found.append((row, own))
        else:
            dropped.add("empty answer of the model", row.where)
    return found
