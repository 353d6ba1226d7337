"""Records for a judge: a prompt with no response yet, with one to be revised, or with two to be compared.

    prompt alone                                          responses are sampled
    a conversation (alpaca, messages, sharegpt, ...)      its last answer is the one response
    preference, or ranking of two                         both; which one was said to be better is not looked at
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megallm.data.conversation import Dropped, Messages
from megallm.data.convert import conversations, preferences, prompts, rankings
from megallm.data.records import FORMATS, Record, check_format, place

_OLD_LABELS = ("margin", "scores")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A prompt and up to two responses."""

    number: int
    """Place among the records, from 0: what is drawn for it depends on that."""
    prompt: Messages
    responses: tuple[Messages, ...] = ()
    where: str = field(default="", compare=False)


def judged(
    records: Sequence[Mapping[str, Any]], *, data_format: str | None, num_responses: int
) -> tuple[list[Judged], Dropped]:
    """What records of any mix of formats hold, and what was left out (empty or equal responses and the like).

    num_responses: how many those that are no prompts alone must have, 1 or 2; ValueError for others.
    """
    found: list[Judged] = []
    dropped = Dropped()
    for number, record in enumerate(records):
        kind = "prompt" if data_format is None and _is_prompt(record) else check_format(record, data_format)
        row = Record({key: value for key, value in record.items() if key not in _OLD_LABELS}, where=place(record))
        made, left_out = _read(row, kind)
        dropped.update(left_out)
        for prompt, responses in made:
            if responses and len(responses) != num_responses:
                wanted = "give two (preference, or ranking), or a prompt alone" if num_responses == 2 else (
                    "--revise takes one (a conversation), or a prompt alone"
                )
                raise ValueError(f"{row.where}: {len(responses)} response(s) in a {kind} record: {wanted}")
            found.append(Judged(number=number, prompt=prompt, responses=responses, where=row.where))
    dropped.require(len(found), "record")
    return found, dropped


def as_content(messages: Messages) -> str | list[dict[str, str]]:
    """What a record holds under `prompt`, `chosen` or `rejected`: one message as its text, several as a list."""
    if len(messages) == 1:
        return messages[0].content
    return [{"role": message.role, "content": message.content} for message in messages]


def _is_prompt(record: Mapping[str, Any]) -> bool:
    others = [needed for name, needed in FORMATS.items() if name != "text"]
    return "prompt" in record and not any(all(key in record for key in needed) for needed in others)


def _read(row: Record, kind: str) -> tuple[list[tuple[Messages, tuple[Messages, ...]]], Dropped]:
    """[(prompt, responses)], or nothing and the reason."""
    if kind == "prompt":
        asked, dropped = prompts([row])
        return [(each, ()) for each in asked], dropped
    if kind == "preference":
        pairs, dropped = preferences([row], data_format=kind)
        return [(each.prompt, (each.chosen, each.rejected)) for each in pairs], dropped
    if kind == "ranking":
        ranked, dropped = rankings([row], data_format=kind)
        return [(each.prompt, each.responses) for each in ranked], dropped
    if kind == "text":
        raise ValueError(f"{row.where}: a text has no prompt: give prompts, conversations or preferences")
    talks, dropped = conversations([row], data_format=kind)
    return [(each.messages[:-1], (each.messages[-1:],)) for each in talks], dropped
