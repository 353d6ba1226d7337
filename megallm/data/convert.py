"""Records of every format to conversations, preferences, rankings and prompts.

Each function takes records of any mix of formats that hold what it needs, tells each one's format from its keys (or
reads all as `data_format`), and returns what it made with the count of what it left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from megallm.data.conversation import (
    Conversation,
    Dropped,
    Message,
    Messages,
    Preference,
    Ranking,
    Unusable,
    check_conversation,
    check_prompt,
    check_response,
    check_text,
)
from megallm.data.records import Record, check_format, place

INPUT_HEADING = "\n\n### Input:\n"
"""Between an alpaca record's instruction and its input, in one user message: the template `alpaca` knows it and then
words its preamble as the Stanford project does. Others may want a blank line only."""

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
_HUMAN_ASSISTANT = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ ]?")
"""The turns of the texts of hh-rlhf."""
_LARGEST = 3.4e38
"""That fp32 holds, which margins are kept in."""

Row = Mapping[str, Any]
Made = TypeVar("Made")


def conversations(
    records: Iterable[Row], *, data_format: str | None = None, input_heading: str = INPUT_HEADING
) -> tuple[list[Conversation], Dropped]:
    """The conversations of alpaca, sharegpt, messages, prompt_completion and text records. A prompt and a completion
    that are texts become a user and an assistant message."""

    def convert(record: Row) -> Conversation:
        chosen = check_format(record, data_format)
        if chosen not in _TO_MESSAGES:
            raise ValueError(
                f"{place(record)}: a {chosen} record is no conversation; supervised fine-tuning takes "
                f"{', '.join(_TO_MESSAGES)}: give other data, or say with --data-format which keys to read"
            )
        messages = _TO_MESSAGES[chosen](record, input_heading)
        if chosen != "text":
            check_conversation(messages)
        return Conversation(messages, where=_where(record))

    return _convert_all(records, convert)


def preferences(records: Iterable[Row], *, data_format: str | None = None) -> tuple[list[Preference], Dropped]:
    """The preferences of preference records. Without a `prompt`, it is what the two conversations begin with."""

    def convert(record: Row) -> Preference:
        if (chosen := check_format(record, data_format)) != "preference":
            raise ValueError(f"{place(record)}: preferences are needed (chosen and rejected), this is {chosen}")
        return _preference(record)

    return _convert_all(records, convert)


def rankings(records: Iterable[Row], *, data_format: str | None = None) -> tuple[list[Ranking], Dropped]:
    """The rankings of ranking records, sorted by their scores if they have them."""

    def convert(record: Row) -> Ranking:
        if (chosen := check_format(record, data_format)) != "ranking":
            raise ValueError(f"{place(record)}: rankings are needed (prompt and responses), this is {chosen}")
        return _ranking(record)

    return _convert_all(records, convert)


def prompts(
    records: Iterable[Row], *, data_format: str | None = None, input_heading: str = INPUT_HEADING
) -> tuple[list[Messages], Dropped]:
    """The prompts of records: the `prompt` where there is one, else the conversation up to its last answer."""

    def convert(record: Row) -> Messages:
        if "prompt" in record and data_format in (None, "prompt_completion", "preference", "ranking"):
            return check_prompt(_prompt_messages(record))
        try:
            chosen = check_format(record, data_format)
        except ValueError as error:
            if data_format is not None:
                raise
            raise ValueError(
                f"{place(record)}: no prompt is found under the keys {sorted(record)}: give the key prompt (a text or "
                "a list of messages), or conversations in one of the formats that answers are learned from"
            ) from error
        if chosen == "preference":
            return _preference(record).prompt
        if chosen == "text":
            raise ValueError(f"{place(record)}: a text has no prompt: give conversations, or the key prompt")
        messages = _TO_MESSAGES[chosen](record, input_heading)
        while messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        return check_prompt(messages)

    return _convert_all(records, convert)


def _convert_all(records: Iterable[Row], convert: Callable[[Row], Made]) -> tuple[list[Made], Dropped]:
    made: list[Made] = []
    dropped = Dropped()
    for record in records:
        try:
            made.append(convert(record))
        except Unusable as reason:
            dropped.add_row(reason, _where(record))
    return made, dropped


def _where(record: Row) -> str:
    return record.where if isinstance(record, Record) else ""


def _alpaca(record: Row, input_heading: str) -> Messages:
    messages = _system(record)
    for number, turn in enumerate(_items(record, "history", optional=True)):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise ValueError(f"{place(record)}: history[{number}] must be a pair [instruction, output] of strings")
        messages += (Message("user", turn[0]), Message("assistant", turn[1]))
    given = _text(record, "input") if record.get("input") is not None else ""
    asked = _text(record, "instruction") + (input_heading + given if given.strip() else "")
    return (*messages, Message("user", asked), Message("assistant", _text(record, "output")))


def _sharegpt(record: Row, _: str) -> Messages:
    return _system(record) + _message_list(record, "conversations", role_key="from", content_key="value")


def _openai(record: Row, _: str) -> Messages:
    return _message_list(record, "messages")


def _prompt_completion(record: Row, _: str) -> Messages:
    completion = record["completion"]
    if isinstance(completion, str):
        return (*_prompt_messages(record), Message("assistant", completion))
    return _prompt_messages(record) + _message_list(record, "completion")


def _plain_text(record: Row, _: str) -> Messages:
    text = check_text(_text(record, "text"))
    if not text.strip():
        raise Unusable("empty text")
    return (Message("assistant", text),)


_TO_MESSAGES: Mapping[str, Callable[[Row, str], Messages]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _openai,
    "prompt_completion": _prompt_completion,
    "text": _plain_text,
}


def _preference(record: Row) -> Preference:
    chosen, rejected = _response(record, "chosen"), _response(record, "rejected")
    if not chosen or not rejected:
        raise Unusable("empty response")
    if chosen == rejected:
        raise Unusable("chosen equals rejected")
    shared = _common_prompt(chosen, rejected)
    prompt = _prompt_messages(record) if "prompt" in record else shared
    if "prompt" in record and chosen[0].role == rejected[0].role == "assistant":
        start = 0
    elif prompt and chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        start = len(prompt)
    elif prompt and shared and shared[-1] == prompt[-1]:  # the conversations alone have the turns before
        prompt, start = shared, len(shared)
    else:
        raise Unusable("chosen and rejected do not begin with one prompt")
    return Preference(
        check_prompt(prompt),
        check_response(chosen[start:]),
        check_response(rejected[start:]),
        margin=_margin(record),
        where=_where(record),
    )


def _ranking(record: Row) -> Ranking:
    responses = []
    for number, value in enumerate(_items(record, "responses")):
        responses.append(check_response(_as_messages(value, record, f"responses[{number}]", role="assistant")))
    if len(responses) < 2:
        raise Unusable("fewer than two responses")
    if len(set(responses)) < len(responses):
        raise Unusable("two equal responses")
    scores, order = None, None
    if record.get("scores") is not None:
        given = [_number(value, record, "scores") for value in _items(record, "scores")]
        if len(given) != len(responses):
            raise ValueError(f"{place(record)}: {len(responses)} responses but {len(given)} scores: give one each")
        if len(set(given)) == 1:
            raise Unusable("all responses scored alike")
        order = tuple(sorted(range(len(given)), key=lambda index: -given[index]))
        responses, scores = [responses[index] for index in order], tuple(given[index] for index in order)
    return Ranking(
        check_prompt(_prompt_messages(record)),
        tuple(responses),
        scores=scores,
        order=order,
        where=_where(record),
    )


def _margin(record: Row) -> float | None:
    if record.get("margin") is None:
        return None
    margin = _number(record["margin"], record, "margin")
    if margin < 0:
        raise Unusable("rejected scored above chosen")
    return margin


def _response(record: Row, key: str) -> Messages:
    value = record[key]
    if isinstance(value, str) and "prompt" not in record:
        turns = _HUMAN_ASSISTANT.split(value)
        if len(turns) < 3 or turns[0].strip():
            raise ValueError(
                f"{place(record)}: without a prompt, {key} must be a list of messages, or a text of turns that begin "
                "with 'Human:' and 'Assistant:'"
            )
        roles = {"Human": "user", "Assistant": "assistant"}
        return tuple(
            Message(roles[name], text.strip()) for name, text in zip(turns[1::2], turns[2::2], strict=True)
        )
    return _as_messages(value, record, key, role="assistant")


def _common_prompt(first: Messages, second: Messages) -> Messages:
    """The messages that both begin with, up to a user's."""
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    while length and first[length - 1].role != "user":
        length -= 1
    return first[:length]


def _prompt_messages(record: Row) -> Messages:
    return _system(record) + _as_messages(record["prompt"], record, "prompt", role="user")


def _as_messages(value: Any, record: Row, key: str, *, role: str) -> Messages:
    """A text as one message of `role`, a list as its messages."""
    if isinstance(value, str):
        if not value.strip():
            raise Unusable("empty prompt" if role == "user" else "empty response")
        return (Message(role, value),)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{place(record)}: {key} must be a text or a list of messages, this is {_kind(value)}")
    return _messages(value, record, key, role_key="role", content_key="content")


def _message_list(record: Row, key: str, *, role_key: str = "role", content_key: str = "content") -> Messages:
    return _messages(_items(record, key), record, key, role_key=role_key, content_key=content_key)


def _messages(values: list[Any], record: Row, key: str, *, role_key: str, content_key: str) -> Messages:
    messages = []
    for number, value in enumerate(values):
        spot = f"{place(record)}: {key}[{number}]"
        if not isinstance(value, dict):
            raise ValueError(f"{spot} must be an object with {role_key} and {content_key}, this is {_kind(value)}")
        if role_key not in value or (content_key not in value and not value.get("tool_calls")):
            other = "sharegpt" if role_key == "role" else "messages"
            raise ValueError(
                f"{spot} has the keys {sorted(value)}, it needs {role_key} and {content_key} (the format {other} "
                "has other ones: see --data-format)"
            )
        role = value[role_key]
        if role not in _ROLES:
            raise Unusable(f"role {role!r}")
        if value.get("tool_calls") or value.get("function_call"):
            raise Unusable("tool calls")
        messages.append(Message(_ROLES[role], _content(value[content_key], f"{spot}.{content_key}")))
    return tuple(messages)


def _content(value: Any, spot: str) -> str:
    """A message's text; of a list of parts, the texts one after the other."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in value):
            raise Unusable("content that is not text")
        return "".join(part["text"] for part in value)
    if value is None:
        return ""
    raise ValueError(f"{spot} must be a string, this is {_kind(value)}")


def _system(record: Row) -> Messages:
    """The message of the key `system`, if it has any text."""
    text = _text(record, "system") if record.get("system") is not None else ""
    return (Message("system", text),) if text.strip() else ()


def _text(record: Row, key: str) -> str:
    if not isinstance(record[key], str):
        raise ValueError(f"{place(record)}: {key} must be a string, this is {_kind(record[key])}")
    return str(record[key])


def _items(record: Row, key: str, *, optional: bool = False) -> list[Any]:
    value = record.get(key)
    if value is None and optional:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{place(record)}: {key} must be a list, this is {_kind(value)}")
    return value


def _number(value: Any, record: Row, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{place(record)}: {key} must hold numbers, this is {value!r}")
    if not abs(value) <= _LARGEST:  # NaN too
        raise ValueError(f"{place(record)}: {key} must hold finite numbers of at most {_LARGEST:g}, this is {value!r}")
    return float(value)


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(type(value), repr(value))
