"""Records: rows of fine-tuning data as they stand in files, and which of the usual formats each one is in.

    alpaca              instruction, output (input, system, history)
    sharegpt            conversations: a list of {from, value} (system)
    messages            messages: a list of {role, content}
    prompt_completion   prompt, completion: texts, or lists of messages
    preference          chosen, rejected: texts or lists of messages (prompt, margin)
    ranking             prompt, responses: best first (scores)
    text                text: taken as it is, no template

Keys in brackets may be left out; others are not looked at. A record is a dict that knows its file and line, so that
whatever is wrong with it later is said with both. What records mean is conversation.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FORMATS: Mapping[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("chosen", "rejected"),
    "ranking": ("prompt", "responses"),
    "text": ("text",),
}
"""The keys that a record of each format must have."""
COMPARED = ("preference", "ranking")
"""Formats of several responses to one prompt."""


class Record(dict[str, Any]):
    """One row: the JSON object, and the place that it came from."""

    def __init__(self, content: Mapping[str, Any], *, where: str) -> None:
        super().__init__(content)
        self.where = where
        """FILE:LINE."""


def place(record: Mapping[str, Any]) -> str:
    """FILE:LINE of a record that was read from a file, else `a record`."""
    return record.where if isinstance(record, Record) else "a record"


def read_records(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """The records of files, in order: .jsonl with an object a line (blank lines left out), or .json with a list of
    objects. ValueError or FileNotFoundError name the file, and the line of what cannot be read."""
    listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not listed:
        raise ValueError("no files of records: give at least one .jsonl or .json file")
    records: list[dict[str, Any]] = []
    for path in listed:
        records += _read_file(Path(path))
    return records


def read_json_lines(file: str | os.PathLike[str]) -> list[Record]:
    """The objects of a file that has one a line, blank lines left out. ValueError names the line that is none.

    Lines end with a newline only: JSON may hold other characters that end lines elsewhere, such as U+2028.
    """
    records: list[Record] = []
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{os.fspath(file)}:{number}"
                records.append(_as_record(_parse(line, where=where, hint=""), where=where))
    return records


def detect_format(record: Mapping[str, Any]) -> str:
    """The format of a record, one of FORMATS, from its keys. `text` beside another format's keys (many data sets keep
    the rendered text too) does not count. ValueError says which keys were found and what to do."""
    if isinstance(record, Mapping) and (found := _matching(record)):
        if len(found) == 1:
            return found[0]
        raise ValueError(
            f"{place(record)}: the keys {sorted(record)} fit {_listed(found)}: choose one with --data-format"
        )
    keys = sorted(record) if isinstance(record, Mapping) else type(record).__name__
    raise ValueError(
        f"{place(record) if isinstance(record, Mapping) else 'a record'}: the keys {keys} fit no format; expected "
        f"{'; '.join(f'{name}: {_listed(needed)}' for name, needed in FORMATS.items())}: rename the keys, or choose "
        "the format with --data-format to see what it lacks"
    )


def check_format(record: Mapping[str, Any], data_format: str | None) -> str:
    """The format to read a record in: the one asked for, whose keys must be there, else the one detected."""
    if data_format is None:
        return detect_format(record)
    if data_format not in FORMATS:
        raise ValueError(f"--data-format {data_format!r} is not known: use one of {', '.join(FORMATS)}")
    missing = [key for key in FORMATS[data_format] if key not in record]
    if missing:
        fitting = _matching(record)
        way_out = f"the keys fit {_listed(fitting)}" if fitting else "rename the keys"
        raise ValueError(
            f"{place(record)}: --data-format {data_format} needs the keys {_listed(FORMATS[data_format])}; "
            f"{_listed(missing)} not among {sorted(record)}: {way_out}"
        )
    return data_format


def kind_of(records: Sequence[Mapping[str, Any]], data_format: str | None) -> str:
    """The format of records that are compared, all of one, or that of the first of others. ValueError for records that
    compare responses beside others, with the place of both."""
    first = check_format(records[0], data_format)
    for record in records if data_format is None else ():
        if first in COMPARED and all(key in record for key in FORMATS[first]):
            continue
        own = detect_format(record)
        if own != first and (own in COMPARED or first in COMPARED):
            raise ValueError(
                f"{place(record)} is a {own} record, {place(records[0])} is a {first} record: give one kind at a time"
            )
    return first


def _matching(record: Mapping[str, Any]) -> list[str]:
    found = [name for name, needed in FORMATS.items() if all(key in record for key in needed)]
    return [name for name in found if name != "text"] or found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


def _read_file(file: Path) -> list[Record]:
    if file.suffix.lower() not in (".jsonl", ".json"):
        raise ValueError(f"{file}: records are read from .jsonl (an object a line) or .json (a list of objects) files")
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist" if not file.exists() else f"{file} is not a file")
    records = _read_json_list(file) if file.suffix.lower() == ".json" else read_json_lines(file)
    if not records:
        raise ValueError(f"{file} holds no records")
    return records


def _read_json_list(file: Path) -> list[Record]:
    content = _parse(file.read_bytes(), where=str(file), hint="; a file with an object a line is named .jsonl")
    if not isinstance(content, list):
        raise ValueError(
            f"{file}: a .json file must hold a list of objects, this is {_json_type(content)}: name a file with an "
            "object a line .jsonl"
        )
    # A value in a list has no line of its own that json would tell: it is named by its place in the list.
    return [_as_record(value, where=f"{file}:item {number}") for number, value in enumerate(content, start=1)]


def _parse(raw: bytes, *, where: str, hint: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if hint else ""
        raise ValueError(f"{where}{line}: not JSON ({error.msg}, column {error.colno}){hint}") from error
    except ValueError as error:  # a whole number of thousands of digits
        raise ValueError(f"{where}: a number that cannot be read ({error})") from error
    except RecursionError as error:
        raise ValueError(f"{where}: JSON nested too deeply") from error


def _as_record(value: Any, *, where: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a JSON object is needed, this is {_json_type(value)}")
    return Record(value, where=where)


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
