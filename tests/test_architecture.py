"""The house rules that a machine can check, over the syntax tree of every source file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]

LAYERS = (
    ("config",),
    ("ops",),
    ("parallel",),
    ("model",),
    ("pipeline",),
    ("optim",),
    ("data",),
    ("checkpoint",),
    ("generate",),
    ("planner", "monitor", "runtime"),
    ("trainers",),
    ("cli",),
    ("testing",),
)
"""Each imports only from itself and from those before it; names on one line may import one another."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

FACADE = "megallm/parallel/__init__.py"
"""The public entrance: it re-exports upper layers, and does so on first access."""

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 90

PICKLING_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
CODE_RUNNERS = {"eval", "exec"}
PICKLING_CALLS = {"torch.load", "torch.save"}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"}
ENVIRONMENT_LAYERS = {"runtime", "cli", "testing"}


def paths(*folders: str) -> list[Path]:
    """Every Python file under the folders, and those of the root, sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


LIBRARY = paths("megallm", "kernels")
SOURCES = [*LIBRARY, *paths("examples", "benchmarks", "tests"), ROOT / "setup.py"]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def label(path: Path, node: ast.AST | None = None) -> str:
    name = path.relative_to(ROOT).as_posix()
    return name if node is None else f"{name}:{getattr(node, 'lineno', 0)}"


def layer(path: Path) -> str | None:
    """`optim` for megallm/optim/clip.py; None outside the layers of megallm."""
    parts = path.relative_to(ROOT).parts
    return parts[1] if parts[0] == "megallm" and len(parts) > 2 else None


def imports(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Every imported dotted name, wherever it stands: in functions and under TYPE_CHECKING too, relative ones resolved.

    `from a.b import c` gives `a.b.c`, since c may be a module.
    """
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node, f"{module}.{alias.name}"


def dotted(node: ast.AST) -> str | None:
    """`a.b.c` for that expression; None for any that is not a plain chain of names."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def aliases(path: Path) -> dict[str, str]:
    """What the names that imports bind stand for: {"dist": "torch.distributed"}."""
    bound: dict[str, str] = {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            bound.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            bound.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return bound


def names_used(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Every chain of names, its first one replaced by what was imported as it: `dist.x` gives torch.distributed.x."""
    bound = aliases(path)
    for node in ast.walk(tree(path)):
        name = dotted(node) if isinstance(node, ast.Attribute | ast.Name) else None
        if name is not None:
            head, _, rest = name.partition(".")
            yield node, ".".join([bound.get(head, head), *([rest] if rest else [])])


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_layers_import_downward_only() -> None:
    wrong = []
    for path in LIBRARY:
        own = layer(path)
        for node, name in imports(path):
            parts = name.split(".")
            if own is None or label(path) == FACADE or parts[0] not in ("megallm", "megallm_kernels"):
                continue
            if parts[0] == "megallm_kernels":
                if LEVEL[own] < LEVEL["ops"]:
                    wrong.append(f"{label(path, node)}: {own} imports {name}")
            elif len(parts) > 1 and parts[1] in LEVEL and LEVEL[parts[1]] > LEVEL[own]:
                wrong.append(f"{label(path, node)}: {own} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_folder_of_megallm_is_a_layer() -> None:
    assert sorted({layer(path) for path in LIBRARY} - {None} - set(LEVEL)) == []


def test_nothing_but_tests_imports_testing() -> None:
    users = [path for path in [*LIBRARY, *paths("examples", "benchmarks")] if layer(path) != "testing"]
    wrong = [label(path, node) for path in users for node, name in imports(path) if is_within(name, "megallm.testing")]
    assert not wrong, "\n".join(wrong)


def test_kernels_know_nothing_of_megallm() -> None:
    found = [(path, node, name) for path in paths("kernels") for node, name in imports(path)]
    wrong = [label(path, node) for path, node, name in found if is_within(name, "megallm")]
    assert not wrong, "\n".join(wrong)


def test_only_parallel_talks_to_torch_distributed() -> None:
    wrong = []
    for path in LIBRARY:
        if layer(path) in ("parallel", "testing"):
            continue
        for node, name in [*imports(path), *names_used(path)]:
            if is_within(name, "torch.distributed"):
                wrong.append(f"{label(path, node)}: {name}")
    assert not wrong, "\n".join(wrong)


def test_no_global_state_is_rebound() -> None:
    wrong = [label(path, node) for path in LIBRARY for node in ast.walk(tree(path)) if isinstance(node, ast.Global)]
    assert not wrong, "\n".join(wrong)


def test_the_library_reads_no_environment_variables() -> None:
    wrong = [
        f"{label(path, node)}: {name}"
        for path in LIBRARY
        if layer(path) not in ENVIRONMENT_LAYERS
        for node, name in [*imports(path), *names_used(path)]
        if any(is_within(name, each) for each in ENVIRONMENT)
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_unpickled_or_evaluated() -> None:
    wrong = []
    for path in LIBRARY:
        if layer(path) == "testing":  # it talks to its own processes only
            continue
        found = [(node, name) for node, name in imports(path) if name.split(".")[0] in PICKLING_MODULES]
        found += [(node, name) for node, name in names_used(path) if name in PICKLING_CALLS | CODE_RUNNERS]
        wrong += [f"{label(path, node)}: {name}" for node, name in found]
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                wrong.append(f"{label(path, node)}: allow_pickle")
    assert not wrong, "\n".join(wrong)


def test_files_are_short() -> None:
    lengths = {label(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    wrong = []
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    wrong.append(f"{label(path, node)}: {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


def test_no_file_is_called_utils() -> None:
    assert [label(path) for path in SOURCES if path.stem in ("util", "utils")] == []


def test_sources_are_ascii() -> None:
    assert [label(path) for path in SOURCES if not path.read_text(encoding="utf-8").isascii()] == []


def test_every_module_says_what_it_is_for() -> None:
    wrong = [label(path) for path in SOURCES if len((ast.get_docstring(tree(path)) or "").strip(" .")) < 10]
    assert not wrong, "\n".join(wrong)
