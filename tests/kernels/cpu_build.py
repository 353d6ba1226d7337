"""The CPU's compiled part as setup.py builds it, once for all tests of a run."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from compiled_build import run_setup

from megallm_kernels import cpu_adamw


@pytest.fixture(scope="module")
def cpu_part(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module, in place of an installed one; the installed one where there is no compiler."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        if cpu_adamw.why_absent():
            pytest.skip(f"there is no C++ compiler, and {cpu_adamw.why_absent()}")
        yield cpu_adamw.load().module
        return
    made = _build(tmp_path_factory.getbasetemp() / "cpu")
    installed = sys.modules.get(cpu_adamw.MODULE)
    sys.modules[cpu_adamw.MODULE] = made
    cpu_adamw.load.cache_clear()
    yield made
    del sys.modules[cpu_adamw.MODULE]
    if installed is not None:
        sys.modules[cpu_adamw.MODULE] = installed
    cpu_adamw.load.cache_clear()


@cache
def _build(folder: Path) -> Any:
    out = [f"--build-temp={folder / 'objects'}", f"--build-lib={folder / 'library'}"]
    done = run_setup("build_ext", *out, MEGALLM_BUILD_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    found = list((folder / "library" / "megallm_kernels").glob("_cpu*"))
    assert len(found) == 1, done.stdout + done.stderr
    spec = importlib.util.spec_from_file_location(cpu_adamw.MODULE, found[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
