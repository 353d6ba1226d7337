"""The compiled part as setup.py builds it, once for all tests of a run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megallm_kernels import compiled_part

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Built:
    """What setup.py made."""

    path: Path
    log: str
    module: Any


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    """The module, in place of an installed one."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    made = _build(tmp_path_factory.getbasetemp() / "compiled")
    installed = sys.modules.get(compiled_part.MODULE)
    sys.modules[compiled_part.MODULE] = made.module
    compiled_part.load.cache_clear()
    yield made
    del sys.modules[compiled_part.MODULE]
    if installed is not None:
        sys.modules[compiled_part.MODULE] = installed
    compiled_part.load.cache_clear()


def run_setup(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py with these arguments and environment variables."""
    given = {k: v for k, v in os.environ.items() if k != "CUDA_HOME"} | environment
    return subprocess.run(
        [sys.executable, "setup.py", *command], cwd=ROOT, env=given, capture_output=True, text=True, timeout=1800
    )


@cache
def _build(folder: Path) -> Built:
    out = [f"--build-temp={folder / 'objects'}", f"--build-lib={folder / 'library'}"]
    done = run_setup("build_ext", *out, MEGALLM_BUILD_CUDA="1", MEGALLM_CUDA_ARCHS="80;90a")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "library" / "megallm_kernels").glob("_compiled*")
    spec = importlib.util.spec_from_file_location(compiled_part.MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Built(path, done.stdout, module)
