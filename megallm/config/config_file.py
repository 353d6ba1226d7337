"""Reads a `--config` file: YAML (JSON is YAML) with the names of the flags.

A key is a field's name with dashes or underscores, at the top or under its section. Values are read as the flags' text
would be, because YAML's own reading is not what a user means: `3e-4` is a string to YAML 1.1, `no` is false.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import yaml

from megallm.config.fields import ConfigField, did_you_mean, parse_text


def read_config_file(
    path: str, fields: Mapping[str, ConfigField], *, extra_names: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of `fields` (by name) that the file `path` sets, and the raw values of `extra_names` it holds.

    ValueError names the file and the key: an unknown name, a name given twice, a value of another type.
    """
    return field_values(load_yaml(path), fields, where=path, extra_names=extra_names)


def field_values(
    content: Mapping[str, Any], fields: Mapping[str, ConfigField], *, where: str, extra_names: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `read_config_file` returns, of a file's content, or of a part of it; messages begin with `where`."""
    path = where
    values: dict[str, Any] = {}
    extras: dict[str, Any] = {}
    for section, key, value in _entries(content, fields):
        name = key.replace("-", "_")
        if name in values or name in extras:
            raise ValueError(f"{path}: {name} is given twice")
        if name in extra_names and not section:
            extras[name] = value
            continue
        field = fields.get(name)
        if field is None:
            sections = {other.section for other in fields.values() if other.section and not section}
            known = {*fields, *extra_names, *sections}
            raise ValueError(f"{path}: unknown name {key!r}{did_you_mean(name, known)}")
        if section and field.section != section:
            raise ValueError(f"{path}: {name} is not in the section {section!r}: it is {field.path}")
        try:
            values[name] = _value(field, value)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
    return values, extras


def load_yaml(path: str) -> dict[str, Any]:
    """The file's names and values, as YAML has them; ValueError if it is not YAML, or holds something else."""
    with open(path, encoding="utf-8") as file:
        try:
            content = yaml.load(file, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{path}: expected `name: value` lines, got {content!r}")
    return content or {}


def _entries(content: Mapping[str, Any], fields: Mapping[str, ConfigField]) -> list[tuple[str, str, Any]]:
    """(section, key, value) of the content, in order; section is "" at the top."""
    sections = {field.section for field in fields.values() if field.section}
    entries: list[tuple[str, str, Any]] = []
    for key, value in content.items():
        if key in sections and isinstance(value, dict):
            entries += [(str(key), str(name), item) for name, item in value.items()]
        else:
            entries.append(("", str(key), value))
    return entries


def _value(field: ConfigField, value: Any) -> Any:
    """What YAML read, as a value of `field`."""
    if value is None:
        if not field.type.is_optional:
            raise ValueError("a value is missing")
        return None
    if not field.type.is_tuple:
        return _item(field, value)
    if isinstance(value, list):
        return tuple(_item(field, item) for item in value)
    if isinstance(value, str) and field.type.base is not str:
        parts = [_item(field, part.strip()) for part in value.split(",")]
        return None if parts == [None] else tuple(parts)
    return None if (item := _item(field, value)) is None else (item,)


def _item(field: ConfigField, value: Any) -> Any:
    """One scalar, through the text that a flag would have had."""
    if isinstance(value, bool) != (field.type.base is bool) and not isinstance(value, str):
        hint = ": put it in quotes" if field.type.base is str else ""
        raise ValueError(f"{value!r} is not {'true or false' if field.type.base is bool else 'a value for it'}{hint}")
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"{value!r} is not a single value")
    return parse_text(dataclasses.replace(field.type, is_tuple=False), str(value))


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML libraries silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)
