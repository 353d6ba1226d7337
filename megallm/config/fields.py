"""The fields of a config dataclass as data: section, name, type, default, doc.

Flags, the config file, the printed config and the JSON in a checkpoint are all views of this one list, so that a field
is written once (with its docstring) and appears everywhere. A config field is one of

    bool, int, float, str, Literal[...], tuple[one of those, ...], each also `| None`

or another dataclass, which is a section: `RunConfig.parallel.tp` is the field `tp` of the section `parallel`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NONE_WORDS = ("auto", "none")
"""What a user writes for None."""


@dataclass(frozen=True, kw_only=True)
class ValueType:
    """What a field may hold."""

    base: type
    """bool, int, float, str or a dataclass."""
    choices: tuple[Any, ...] = ()
    """The values of a Literal; empty = any."""
    is_optional: bool = False
    """None is allowed."""
    is_tuple: bool = False
    """A tuple of such values, of any length."""


@dataclass(frozen=True, kw_only=True)
class ConfigField:
    """One knob."""

    section: str
    """Dotted path of the dataclass that holds it, "" at the root."""
    name: str
    """Field name."""
    type: ValueType
    """What it may hold."""
    default: Any
    """Its default; `dataclasses.MISSING` where it must be given."""
    doc: str
    """The string literal under the field, on one line."""

    @property
    def path(self) -> str:
        """`section.name`."""
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def none_word(self) -> str:
        """How None is shown: `auto` where the doc says how that is decided, else `none`."""
        return "auto" if "auto" in self.doc else "none"


def leaf_fields(config: type, *, section: str = "") -> tuple[ConfigField, ...]:
    """Every field of `config` that is not itself a section, depth first, in the order of the source."""
    docs = field_docs(config)
    leaves: list[ConfigField] = []
    for name, value_type in value_types(config).items():
        path = f"{section}.{name}" if section else name
        if dataclasses.is_dataclass(value_type.base) and not value_type.is_optional:
            leaves.extend(leaf_fields(value_type.base, section=path))
            continue
        field = config.__dataclass_fields__[name]  # type: ignore[attr-defined]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        doc = docs.get(name, "")
        leaves.append(ConfigField(section=section, name=name, type=value_type, default=default, doc=doc))
    return tuple(leaves)


def value_types(config: type) -> dict[str, ValueType]:
    """The type of each field of the dataclass `config`, in order."""
    hints = typing.get_type_hints(config)
    return {f.name: _value_type(hints[f.name]) for f in dataclasses.fields(config)}


def field_docs(config: type) -> dict[str, str]:
    """The string literal under each field of `config` and of its base classes, whitespace folded.

    Read from the source through `ast`; empty where there is no source (a frozen application).
    """
    docs: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError):
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for field, below in itertools.pairwise(body):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def parse_text(value_type: ValueType, text: str) -> Any:
    """The value that `text` writes for one item of `value_type` (its elements, where that is a tuple).

    ValueError says what was expected. `auto` and `none` write None where None is allowed.
    """
    if value_type.is_optional and text in NONE_WORDS and text not in value_type.choices:
        return None
    if value_type.base is bool:
        word = text.lower()
        if word not in ("true", "false"):
            raise ValueError(f"{text!r} is neither true nor false")
        return word == "true"
    try:
        value = value_type.base(text)
    except ValueError:
        expected = {int: "a whole number", float: "a number"}.get(value_type.base, value_type.base.__name__)
        raise ValueError(f"{text!r} is not {expected}") from None
    if value_type.base is float and not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    if value_type.choices and value not in value_type.choices:
        raise ValueError(not_one_of(text, value_type.choices))
    return value


def not_one_of(value: object, choices: Iterable[object]) -> str:
    """`'bf17' is not one of fp32, bf16: did you mean bf16?`"""
    words = [str(choice) for choice in choices]
    return f"{value!r} is not one of {', '.join(words)}{did_you_mean(str(value), words)}"


def did_you_mean(word: str, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> str:
    """`: did you mean tp?` for the nearest of `known` (or for what `aliases` calls `word`), or nothing."""
    if aliases and word in aliases:
        return f": did you mean {aliases[word]}?"
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f": did you mean {near[0]}?" if near else ""


def _value_type(hint: Any) -> ValueType:
    """The ValueType of a type hint; TypeError for one that a config may not use."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [arg for arg in args if arg is not type(None)]
        if len(inner) == 1 and len(args) == 2:
            return dataclasses.replace(_value_type(inner[0]), is_optional=True)
    elif origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return dataclasses.replace(_value_type(args[0]), is_tuple=True)
    elif origin is typing.Literal and len({type(arg) for arg in args}) == 1:
        return ValueType(base=type(args[0]), choices=args)
    elif hint in (bool, int, float, str) or dataclasses.is_dataclass(hint):
        return ValueType(base=hint)
    raise TypeError(f"a config field cannot have type {hint}: use bool, int, float, str, Literal, tuple[..., ...] or a "
                    "dataclass, or one of those | None")
