"""The embedded corpus: the Python standard library of the interpreter that runs, read where it is installed.

Two kinds of documents, about 10 MB together:

- every `.py` file of the modules named in `sys.stdlib_module_names`: code with English docstrings and comments. That
  list leaves out `site-packages` and the test suite (17 MB more, but not installed everywhere, so that two machines
  with one Python would differ). Nested test folders, Windows code pages and generated files are left out too.
- the topics of `pydoc_data.topics`: the language reference as plain text, 0.5 MB.

Nothing is downloaded. The order is: sorted by name, then shuffled with a fixed key, so that the last documents (the
validation part) are a fair sample. It is a function of the Python version only.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
)
"""Folders left out at any depth."""
_SKIPPED_PATHS = ("encodings/cp", "encodings/iso", "encodings/mac_", "encodings/koi8", "pydoc_data/", "_sysconfigdata")
"""Starts of relative paths left out: tables of code points, the topics (taken as text instead), build records."""
_SHUFFLE_KEY = "megallm-corpus-1"


def corpus_names() -> list[str]:
    """The names of all documents in corpus order: `lib/<relative path>` for a source, `topic/<name>` for a topic."""
    names = [f"lib/{path}" for path in _source_paths()] + [f"topic/{topic}" for topic in _topics()]
    if not names:
        raise ValueError(
            f"no .py files in {_stdlib_folder()}: this Python has no sources for the embedded corpus; "
            "give text with --data"
        )
    return sorted(names, key=_shuffled)


def read_corpus() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document, in corpus order; documents with nothing but blanks are left out."""
    folder, topics = _stdlib_folder(), _topics()
    for name in corpus_names():
        kind, _, rest = name.partition("/")
        text = topics[rest] if kind == "topic" else _read_source(folder / rest)
        if text.strip():
            yield name, text


def corpus_fingerprint() -> str:
    """A hash of what decides the corpus: the Python version, and the names and sizes of its files (not their dates)."""
    folder = _stdlib_folder()
    lines = [sys.version.split()[0], _SHUFFLE_KEY, str(sum(map(len, _topics().values())))]
    lines += [f"{path} {(folder / path).stat().st_size}" for path in _source_paths()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def corpus_bytes() -> int:
    """The size of the corpus in bytes (of the topics, in characters)."""
    folder = _stdlib_folder()
    return sum((folder / path).stat().st_size for path in _source_paths()) + sum(map(len, _topics().values()))


def _stdlib_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _topics() -> dict[str, str]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return topics


def _source_paths() -> list[str]:
    """Relative paths, sorted, with / on every system."""
    folder = _stdlib_folder()
    paths: list[str] = []
    for module in sorted(sys.stdlib_module_names):
        single = folder / f"{module}.py"
        found = [single] if single.is_file() else sorted((folder / module).rglob("*.py"))
        for path in found:
            relative = path.relative_to(folder)
            if not _SKIPPED_FOLDERS.intersection(relative.parts) and not relative.as_posix().startswith(_SKIPPED_PATHS):
                paths.append(relative.as_posix())
    return sorted(paths)


def _read_source(path: Path) -> str:
    """The text of a source file in the encoding that it declares (PEP 263)."""
    with tokenize.open(path) as file:
        return file.read()


def _shuffled(name: str) -> bytes:
    return hashlib.sha256(f"{_SHUFFLE_KEY}:{name}".encode()).digest()
