"""Writes the tables of flags in docs/commands.md from the parsers themselves.

python docs/make_commands.py            rewrites the part between the markers
python docs/make_commands.py --check    exit code 1 if that would change it
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megallm.cli.main import _MODULES, COMMANDS
from megallm.config.fields import ConfigField
from megallm.config.flags import config_fields, value_at
from megallm.config.run import JobConfig

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "commands.md"
AFTER_PRETRAINING = ("sft", "reward", "dpo", "ppo", "grpo")
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def example(name: str) -> Any:
    """The module examples/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of `megallm NAME`."""
    parser = argparse.ArgumentParser(prog=f"megallm {name}")
    importlib.import_module(f"megallm.cli.{_MODULES.get(name, name)}").add_arguments(parser)
    return parser


def generated() -> str:
    """Everything between the markers."""
    parts = ["## examples/pretrain_gpt.py", *_run_tables("pretrain_gpt")]
    for name in AFTER_PRETRAINING:
        parts += [f"## examples/{name}.py", "The flags of pretraining but those of its data, and:", *_own_tables(name)]
    for name, what in COMMANDS.items():
        parts += [f"## megallm {name}", f"{what[0].upper()}{what[1:]}.", _parser_table(command_parser(name))]
    return "\n\n".join(parts)


def page_with(text: str) -> str:
    """docs/commands.md with `text` between its markers."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


def _own_tables(name: str) -> list[str]:
    """Of the sections that pretraining does not have."""
    common = {field.section for field in config_fields(JobConfig)}
    return _run_tables(name, leave_out=common)


def _run_tables(name: str, *, leave_out: Collection[str] = ()) -> list[str]:
    module = example(name)
    sections: dict[str, list[str]] = {}
    for field in config_fields(type(module.DEFAULTS)):
        if field.section in leave_out:
            continue
        default = _shown(field, value_at(module.DEFAULTS, field.path))
        flag = "--" + field.name.replace("_", "-")
        if field.type.base is bool and not field.type.is_tuple:
            flag = f"{flag}, --no-{flag[2:]}"
        values = f" ({', '.join(map(str, field.type.choices))})" if field.type.choices else ""
        sections.setdefault(field.section or "run", []).append(_row(f"`{flag}`{values}", default, field.doc))
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--config", metavar="FILE", help="YAML file with values for these flags; flags win")
    if hasattr(module, "add_arguments"):
        module.add_arguments(own)
    return [f"### {name}\n\n{_table(rows)}" for name, rows in sections.items()] + [
        f"### of this example\n\n{_parser_table(own)}"
    ]


def _parser_table(parser: argparse.ArgumentParser) -> str:
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        values = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
        needed = (action.required and bool(action.option_strings)) or not action.option_strings
        empty = action.default is None or action.default is argparse.SUPPRESS
        default = "required" if needed else "" if empty or action.default == [] else str(action.default).lower()
        rows.append(_row(f"`{name}`{values}", default, (action.help or "").replace("%%", "%")))
    return _table(rows) if rows else "It takes no flags."


def _shown(field: ConfigField, value: Any) -> str:
    if value is None:
        return field.none_word
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "empty"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _table(rows: list[str]) -> str:
    return "\n".join(["| flag | default | meaning |", "|---|---|---|", *rows])


def _row(flag: str, default: str, text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return f"| {flag} | {default} | {text} |".replace("  |", " |")


def main() -> int:
    """Rewrites the page, or with --check says whether it is up to date."""
    page = page_with(generated())
    if "--check" in sys.argv[1:]:
        return int(page != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
