"""The command line of every example: one flat set of flags, made from the dataclasses.

A flag is a field's name with dashes (`train.micro_batch_size` is `--micro-batch-size`), its help is the field's
docstring. Later wins:

    field default  <  the example's `defaults`  <  what the model brings  <  `--config FILE`  <  flags

`--config` names a YAML (or JSON) file with the same names, dashes or underscores, flat or under their section:

    tp: 2
    train: {micro-batch-size: 4, learning_rate: 3e-4}     # refused: learning_rate belongs to the section optim
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from megallm.config.config_file import read_config_file
from megallm.config.fields import ConfigField, did_you_mean, leaf_fields, parse_text
from megallm.config.run import JobConfig, RunConfig

Run = TypeVar("Run", bound=JobConfig)
PRETRAINING = RunConfig()

ALIASES: Mapping[str, str] = {
    "--lr": "--learning-rate",
    "--preset": "--model",
    "--bf16": "--precision bf16",
    "--fp16": "--precision fp16",
    "--train-iters": "--steps",
    "--max-steps": "--steps",
    "--num-steps": "--steps",
    "--batch-size": "--global-batch-size",
    "--per-device-train-batch-size": "--micro-batch-size",
    "--seq-len": "--seq-length",
    "--max-length": "--seq-length",
    "--clip-grad": "--max-grad-norm",
    "--data-path": "--data",
    "--save-interval": "--save-every",
    "--output-dir": "--save",
    "--tensor-model-parallel-size": "--tp",
    "--pipeline-model-parallel-size": "--pp",
    "--context-parallel-size": "--cp",
}
"""What other engines call our flags; only ever used to suggest ours."""


def parse_run_config(
    argv: Sequence[str] | None = None,
    *,
    defaults: Run = PRETRAINING,  # type: ignore[assignment]
    description: str = "",
    extra: Callable[[argparse.ArgumentParser], object] | None = None,
    model_defaults: Callable[[str | None], Mapping[str, object]] | None = None,
) -> tuple[Run, argparse.Namespace]:
    """The run that `argv` (None = the process's) asks for, and the values of the example's own arguments.

    `defaults` are the example's; its type decides which sections there are. `extra` adds arguments to the parser, which
    may then also stand in the config file. `model_defaults` is called with the chosen `model` and returns field names
    and values that come before the config file and the flags: what a preset brings along.
    A user's mistake ends the process with exit code 2 and one line on stderr.
    """
    fields = {field.name: field for field in config_fields(type(defaults))}
    parser = build_parser(defaults, description=description)
    if extra is not None:
        extra(parser)
    arguments = list(argv) if argv is not None else sys.argv[1:]
    file_values, file_arguments = _read_file(parser, fields, arguments)
    flags, unknown = parser.parse_known_args(file_arguments + arguments)
    if unknown:
        _refuse_unknown(parser, unknown)
    flag_values = {name: _joined(fields[name], value) for name, value in vars(flags).items() if name in fields}
    values = {**file_values, **flag_values}
    if model_defaults is not None:
        brought = model_defaults(values.get("model", defaults.model))
        if unheard := sorted(set(brought) - set(fields)):
            raise KeyError(f"model_defaults returned {unheard}, which are no config fields")
        values = {**brought, **values}
    others = {name: value for name, value in vars(flags).items() if name not in fields and name != "config"}
    return with_values(defaults, values), argparse.Namespace(**others)


def config_fields(config: type) -> tuple[ConfigField, ...]:
    """The fields of `config` that are flags; ValueError if two sections share a name, which a flat set cannot hold."""
    fields = leaf_fields(config)
    seen: dict[str, str] = {"config": "--config FILE", "help": "--help"}
    for field in fields:
        if field.name in seen:
            raise ValueError(f"{field.path} and {seen[field.name]} would be the same flag: rename one")
        seen[field.name] = field.path
    return fields


def build_parser(defaults: JobConfig, *, description: str = "") -> argparse.ArgumentParser:
    """A parser of every field of `defaults`, grouped by section. It stores only what is given."""
    parser = _Parser(
        usage="%(prog)s [flags]", description=description, allow_abbrev=False, formatter_class=_HelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with values for these flags; flags win")
    groups: dict[str, Any] = {}
    for field in config_fields(type(defaults)):
        if field.section not in groups:
            groups[field.section] = parser.add_argument_group(field.section or "run")
        _add_flag(groups[field.section], field, value_at(defaults, field.path))
    return parser


def value_at(config: Any, path: str) -> Any:
    """The value at the dotted `path` of `config`."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def with_values(config: Run, values: Mapping[str, Any]) -> Run:
    """`config` with the fields named in `values` (flat names) changed, whichever section they are in."""
    sections: dict[str, dict[str, Any]] = {}
    for field in config_fields(type(config)):
        if field.name in values:
            sections.setdefault(field.section, {})[field.name] = values[field.name]
    changed: Run = _replace(config, "", sections)
    return changed


def format_config(config: Any, *, defaults: Any = None) -> str:
    """Aligned `section.name = value` lines; a `*` marks what differs from `defaults` (None = the fields' own)."""
    rows: list[tuple[str, str, bool]] = []
    for field in leaf_fields(type(config)):
        value = value_at(config, field.path)
        default = field.default if defaults is None else value_at(defaults, field.path)
        rows.append((field.path, _shown(field, value), value != default))
    width = max(len(path) for path, _, _ in rows)
    return "\n".join(f"{'*' if changed else ' '} {path:<{width}} = {text}" for path, text, changed in rows)


class _Parser(argparse.ArgumentParser):
    """Exits with code 2 and one line, not with the usage of fifty flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists every flag)\n")


class _HelpFormatter(argparse.HelpFormatter):
    """Flags in a column wide enough for most of them."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 36, **options})


def _add_flag(group: Any, field: ConfigField, default: Any) -> None:
    """One field as a flag of `group`."""
    flag = "--" + field.name.replace("_", "-")
    doc = f"{field.doc} (default: {_shown(field, default)})".replace("%", "%%")
    if field.type.base is bool and not field.type.is_tuple:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=doc)
        return
    metavar = "{" + ",".join(map(str, field.type.choices)) + "}" if field.type.choices else _metavar(field)
    several: dict[str, Any] = {"nargs": "+"} if field.type.is_tuple else {}
    if field.type.is_tuple and field.type.base is str:
        several["action"] = "extend"  # given twice, both count
    group.add_argument(
        flag, type=_argument_type(field), default=argparse.SUPPRESS, metavar=metavar, help=doc, **several
    )


def _metavar(field: ConfigField) -> str:
    return {int: "N", float: "X", str: "TEXT"}[field.type.base]


def _argument_type(field: ConfigField) -> Callable[[str], Any]:
    """argparse's `type`: one text to one value, or to a list for `3,4,4,3` in a tuple of numbers."""

    def parse(text: str) -> Any:
        try:
            if field.type.is_tuple and field.type.base is not str:
                return [parse_text(field.type, part) for part in text.split(",") if part]
            return parse_text(field.type, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _joined(field: ConfigField, value: Any) -> Any:
    """What argparse stored, as the field wants it: a tuple, with comma lists joined, or None for `auto`."""
    if not field.type.is_tuple:
        return value
    items = [item for part in value for item in (part if isinstance(part, list) else [part])]
    return None if items == [None] else tuple(items)


def _read_file(
    parser: argparse.ArgumentParser, fields: Mapping[str, ConfigField], arguments: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """The config values of the `--config` file, and its other keys as arguments for `parser`."""
    only_config = _Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    only_config.add_argument("--config")
    path = only_config.parse_known_args(arguments)[0].config
    if path is None:
        return {}, []
    own = {option[2:]: option for option in _option_strings(parser) if not option.startswith("--no-")}
    extra_names = {name.replace("-", "_") for name in own} - set(fields) - {"config", "help"}
    try:
        values, extras = read_config_file(path, fields, extra_names=extra_names)
    except OSError as error:
        parser.error(f"cannot read --config {path}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    texts: list[str] = []
    for name, value in extras.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            texts += [flag] if value else [f"--no-{flag[2:]}"] if f"--no-{flag[2:]}" in _option_strings(parser) else []
        elif isinstance(value, list):
            texts += [flag, *map(str, value)]
        elif value is not None:
            texts.append(f"{flag}={value}")
    return values, texts


def _refuse_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> NoReturn:
    """Exit over the first argument that nothing knows."""
    word = next((word for word in unknown if word.startswith("-")), None)
    if word is None:
        parser.error(f"unexpected argument {unknown[0]!r}")
    flag = word.split("=")[0]
    parser.error(f"unknown flag {flag}{did_you_mean(flag, _option_strings(parser), ALIASES)}")


def _option_strings(parser: argparse.ArgumentParser) -> list[str]:
    """Every `--flag` of `parser`; argparse has no public list of them."""
    return [option for option in parser._option_string_actions if option.startswith("--")]


def _replace(config: Any, path: str, sections: Mapping[str, Mapping[str, Any]]) -> Any:
    """`config`, which stands at `path`, with the values of `sections` (dotted path to names) at and below it."""
    changes = dict(sections.get(path, {}))
    for field in dataclasses.fields(config):
        below = f"{path}.{field.name}" if path else field.name
        if any(section == below or section.startswith(below + ".") for section in sections):
            changes[field.name] = _replace(getattr(config, field.name), below, sections)
    return dataclasses.replace(config, **changes)


def _shown(field: ConfigField, value: Any) -> str:
    """`value` as a user would write it."""
    if value is None:
        return field.none_word
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "empty"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
