"""What an answer is worth, as functions of text: `def name(prompt: str, completion: str, **record) -> float`.

`record` holds the other columns of the prompt's record. A function that has no `**` gets those columns that it names.
Specs say which function is meant:

    exact_answer          a built-in one (BUILT_IN)
    format:REGEX          with an option: what a column of the record says, if it is there, else this (OPTIONS)
    FILE.py:NAME          one of a Python file, whose folder it may import from

Functions run in processes of their own (reward_workers.py). Those import this file, which imports little: no torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import math
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

TEST_LIMIT_S = 5.0
"""Of processor and wall-clock time, for `python_tests` without an option."""
_TEST_MEMORY_BYTES = 1 << 30
_TEST_FILE_BYTES = 16 << 20
_NUMBER = re.compile(r"[+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?")
_FENCED = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)

Score = Callable[[str, str, Mapping[str, Any]], Any]
"""(prompt, completion, record) to what the function returns."""


def exact_answer(prompt: str, completion: str, **record: Any) -> float:
    """1 if the completion is the column `answer`, else 0. Spaces around do not count; two numbers are compared as
    numbers (15, 15.0, 1,500)."""
    return float(_is_same(completion, str(_column(record, "answer", "exact_answer"))))


def boxed(prompt: str, completion: str, **record: Any) -> float:
    r"""1 if the last answer in the completion, inside \boxed{...} or behind ####, is that of the column `answer`
    (which may be a whole solution that ends so), else 0."""
    wanted = str(_column(record, "answer", "boxed"))
    found, last = _last_answer(completion), _last_answer(wanted)
    return float(found is not None and _is_same(_bare(found), _bare(wanted if last is None else last)))


def format(prompt: str, completion: str, **record: Any) -> float:
    """1 if the whole completion, without spaces around, matches the regular expression of the column `format`, where
    `.` is any character, else 0."""
    pattern = str(_column(record, "format", "format"))
    return float(re.fullmatch(pattern, completion.strip(), re.DOTALL) is not None)


def length(prompt: str, completion: str, **record: Any) -> float:
    """Characters of the completion; with the column `max_characters` those beyond it. For a negative weight."""
    return float(max(0, len(completion) - int(record.get("max_characters", 0))))


def python_tests(prompt: str, completion: str, **record: Any) -> float:
    """1 if the completion's code (its last block between ```, else all of it) and then the column `tests` (code, or a
    list of it) run to their end, else 0.

    NOT a sandbox: the code runs as this user, in a process and an empty folder of its own, without the environment
    variables, with limits of time (`test_limit_s`), memory (1 GiB) and file size. It can read and write what this user
    can, and use the network. Run models that you do not trust inside a container.
    """
    tests = _column(record, "tests", "python_tests")
    blocks = _FENCED.findall(completion)
    parts = [blocks[-1] if blocks else completion, *([tests] if isinstance(tests, str) else tests)]
    return float(_runs_to_its_end("\n".join(parts), float(record.get("test_limit_s", TEST_LIMIT_S))))


BUILT_IN: Mapping[str, Callable[..., float]] = {
    "exact_answer": exact_answer,
    "boxed": boxed,
    "format": format,
    "length": length,
    "python_tests": python_tests,
}


@dataclass(frozen=True)
class _Option:
    column: str
    """That it stands for."""
    read: Callable[[str], Any]
    """ValueError if it is none."""


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"no regular expression ({error})") from error
    return text


def _seconds(text: str) -> float:
    found = float(text)
    if not 0.0 < found < math.inf:
        raise ValueError("seconds must be more than 0")
    return found


def _characters(text: str) -> int:
    found = int(text)
    if found < 0:
        raise ValueError("characters must be 0 or more")
    return found


OPTIONS: Mapping[str, _Option] = {
    "format": _Option("format", _pattern),
    "length": _Option("max_characters", _characters),
    "python_tests": _Option("test_limit_s", _seconds),
}
"""What stands behind the colon of a built-in function."""
_NEEDED: Mapping[str, str] = {
    "exact_answer": "answer",
    "boxed": "answer",
    "format": "format",
    "python_tests": "tests",
}
"""The column that a built-in function reads."""


def check_text(spec: str) -> None:
    """ValueError or FileNotFoundError for a spec that is wrong as far as one can tell without running anything."""
    if _file_and_name(spec) is None:
        _built_in(spec)


def function_name(spec: str) -> str:
    """What a checked spec's function is called."""
    found = _file_and_name(spec)
    return spec.partition(":")[0] if found is None else found[1]


def own_limit_s(spec: str) -> float:
    """Seconds that the function of a checked spec may use by its own rule; 0 if it has none."""
    if _file_and_name(spec) is not None or function_name(spec) != "python_tests":
        return 0.0
    return float(_built_in(spec)[1].get("test_limit_s", TEST_LIMIT_S))


@dataclass(frozen=True)
class Loaded:
    """A function that can be called."""

    score: Score
    columns: tuple[str, ...]
    """Of a record, without which it has no score."""


def load(spec: str) -> Loaded:
    """The function. Runs the user's file. ValueError or FileNotFoundError, in words, for all that a user can get
    wrong; what the file itself raises is part of the message."""
    found = _file_and_name(spec)
    if found is None:
        return _load_built_in(spec)
    file, name = found
    module = _import(file)
    if not hasattr(module, name):
        defined = [each for each, value in vars(module).items() if inspect.isfunction(value) and each[0] != "_"]
        listed = f"; it has {', '.join(defined)}" if defined else ""
        raise ValueError(f"{file} has no function {name}{listed}")
    function = getattr(module, name)
    wanted, needed = _wanted(function, name)

    def score(prompt: str, completion: str, record: Mapping[str, Any]) -> Any:
        given = _columns_of(record)
        return function(
            prompt, completion, **(given if wanted is None else {key: given[key] for key in wanted if key in given})
        )

    return Loaded(score, needed)


def _load_built_in(spec: str) -> Loaded:
    function, defaults = _built_in(spec)
    needed = _NEEDED.get(function_name(spec))
    return Loaded(
        lambda prompt, completion, record: function(prompt, completion, **{**defaults, **_columns_of(record)}),
        () if needed is None or needed in defaults else (needed,),
    )


def _file_and_name(spec: str) -> tuple[Path, str] | None:
    """Of FILE.py:NAME; None for others."""
    if spec.endswith(".py"):
        raise ValueError(f"{spec}: which function of the file? Write {spec}:NAME")
    head, separator, name = spec.rpartition(".py:")
    if not separator or spec.partition(":")[0] in BUILT_IN:
        return None
    file = Path(head + ".py")
    if not name.isidentifier():
        raise ValueError(f"{spec}: {name!r} is no name of a function: write FILE.py:NAME")
    if not file.is_file():
        raise FileNotFoundError(f"{spec}: there is no file {file}")
    return file, name


def _built_in(spec: str) -> tuple[Callable[..., float], dict[str, Any]]:
    """(function, columns that the option stands for)."""
    name, separator, option = spec.partition(":")
    if name not in BUILT_IN:
        raise ValueError(
            f"{spec!r} is no reward function: use one of {', '.join(BUILT_IN)}, or FILE.py:NAME for one of your own"
        )
    if not separator:
        return BUILT_IN[name], {}
    if name not in OPTIONS:
        raise ValueError(f"{spec}: {name} has no option: write {name} alone")
    try:
        return BUILT_IN[name], {OPTIONS[name].column: OPTIONS[name].read(option)}
    except ValueError as error:
        raise ValueError(f"{spec}: {option!r} is not what {name} takes as {OPTIONS[name].column}: {error}") from error


def _import(file: Path) -> Any:
    file = file.resolve()
    found = importlib.util.spec_from_file_location(f"_rewards_{file.stem}", file)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look for it there
    sys.path.insert(0, str(file.parent))
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{file} cannot be loaded: {describe(error, str(file))}") from error
    return module


def describe(error: BaseException, file: str = "") -> str:
    """An exception in a line: its type, what it says, and the line of `file` (else the last one) that it came from."""
    try:
        said = " ".join(str(error).split())
    except Exception:
        said = "(its text cannot be made)"
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    own = [frame for frame in frames if frame[0] == file] or frames
    at = f" (line {own[-1][1]} of {Path(own[-1][0]).name})" if own else ""
    return f"{type(error).__name__}{': ' if said else ''}{said[:400]}{at}"


def _wanted(function: Any, where: str) -> tuple[list[str] | None, tuple[str, ...]]:
    """Names of the columns that a function takes (None = all), and of those that it has no default for. ValueError if
    it cannot be called as it will be."""
    rule = "it is called with (prompt, completion, **record): write `def NAME(prompt, completion, **record)`"
    if not callable(function):
        raise ValueError(f"{where} is no function but {type(function).__name__}")
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"{where} is an async function, which would have to be awaited: write a plain one")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} does not tell its parameters: {rule}") from error
    first = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    if [each.name.lstrip("_") for each in first[:2]] != ["prompt", "completion"]:
        raise ValueError(f"{where}{inspect.signature(function)} does not fit: {rule}")
    others = [each for each in parameters if each not in first[:2]]
    if any(each.kind == each.POSITIONAL_ONLY for each in others):
        raise ValueError(f"{where}{inspect.signature(function)} does not fit: {rule}")
    named = [each for each in others if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    needed = tuple(each.name for each in named if each.default is each.empty)
    takes_all = any(each.kind == each.VAR_KEYWORD for each in others)
    return None if takes_all else [each.name for each in named], needed


def _columns_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Those beside prompt and completion, which are given as texts."""
    return {key: value for key, value in record.items() if key not in ("prompt", "completion")}


def _column(record: Mapping[str, Any], name: str, function: str) -> Any:
    if record.get(name) is None:
        raise ValueError(f"{function} needs the column `{name}`, this record has {sorted(record) or 'no columns'}")
    return record[name]


def _is_same(first: str, second: str) -> bool:
    first, second = first.strip(), second.strip()
    if first == second:
        return True
    return bool(_NUMBER.fullmatch(first) and _NUMBER.fullmatch(second)) and _number(first) == _number(second)


def _number(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


def _bare(text: str) -> str:
    return text.strip().strip("$").removesuffix(".").strip()


def _last_answer(text: str) -> str | None:
    r"""What the last \boxed{...} holds, or the line behind the last ####, whichever comes later."""
    box, mark = text.rfind("\\boxed{"), text.rfind("####")
    if mark > box:
        return text[mark + len("####") :].strip().partition("\n")[0]
    if box < 0:
        return None
    begin, depth = box + len("\\boxed{"), 1
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end]
    return None


def _runs_to_its_end(program: str, limit_s: float) -> bool:
    """Whether the program neither raises, nor ends early, nor uses more than it may."""
    with tempfile.TemporaryDirectory(prefix="megallm-tests-", ignore_cleanup_errors=True) as folder:
        end = Path(folder) / secrets.token_hex(16)  # exit code 0 is what an early sys.exit(0) has, too
        file = Path(folder) / "program.py"
        file.write_text(f"{program}\nopen({str(end)!r}, 'x').close()\n", encoding="utf-8", errors="surrogateescape")
        process = subprocess.Popen(
            [sys.executable, "-I", str(file)], cwd=folder, env={}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=lambda: _limit_this_process(limit_s),
        )  # fmt: skip
        try:
            return process.wait(limit_s) == 0 and end.exists()
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _limit_this_process(limit_s: float) -> None:
    seconds = math.ceil(limit_s)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (_TEST_MEMORY_BYTES, _TEST_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_TEST_FILE_BYTES, _TEST_FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(seconds + 1)  # it ends, even if whoever waits for it was killed
