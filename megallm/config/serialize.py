"""Config dataclasses to plain JSON data and back, strictly.

`from_plain(type(config), to_plain(config)) == config` for every config. An unknown key, a missing key without default
or a value of another type is refused: a checkpoint's config is never read half.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from megallm.config.fields import ValueType, did_you_mean, not_one_of, value_types

ConfigT = TypeVar("ConfigT")


def to_plain(config: Any) -> dict[str, Any]:
    """A dict of str, int, float, bool, None, lists and dicts that says all of the dataclass `config`."""
    return {field.name: _to_plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_plain(config: type[ConfigT], data: object, *, where: str = "") -> ConfigT:
    """The `config` dataclass that `to_plain` turned into `data`. Fields that `data` leaves out take their default.

    ValueError names the key by its dotted path, which starts with `where`.
    """
    label = where or config.__name__
    if not isinstance(data, Mapping):
        raise ValueError(f"{label}: expected a dict of {config.__name__} fields, got {data!r}")
    known = value_types(config)
    for key in data:
        if key not in known:
            raise ValueError(f"{label}: unknown key {key!r}{did_you_mean(str(key), known)}")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if field.name in data:
            path = f"{where}.{field.name}" if where else field.name
            values[field.name] = _from_plain(known[field.name], data[field.name], path)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{label}: {field.name} is missing and has no default")
    return config(**values)


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_plain(value)
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]
    return value


def _from_plain(value_type: ValueType, value: Any, path: str) -> Any:
    """`value` checked against `value_type`; lists become tuples, dicts dataclasses, whole numbers floats if asked."""
    if value is None:
        if value_type.is_optional:
            return None
        raise ValueError(f"{path}: null is not allowed here")
    if value_type.is_tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{path}: expected a list, got {value!r}")
        item_type = dataclasses.replace(value_type, is_tuple=False, is_optional=False)
        return tuple(_from_plain(item_type, item, f"{path}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(value_type.base):
        return from_plain(value_type.base, value, where=path)
    if value_type.base is float and type(value) is int:
        value = float(value)
    if type(value) is not value_type.base:
        raise ValueError(f"{path}: expected {value_type.base.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path}: {value!r} is not a finite number")
    if value_type.choices and value not in value_type.choices:
        raise ValueError(f"{path}: {not_one_of(value, value_type.choices)}")
    return value
