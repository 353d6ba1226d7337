"""What pip installs, and that its versions are pinned."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import megallm

ROOT = Path(__file__).parents[1]
CONSTRAINTS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
)


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def setup_says(*options: str) -> list[str]:
    command = [sys.executable, "setup.py", "--quiet", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture(scope="module")
def distribution() -> metadata.Distribution:
    try:
        return metadata.distribution("megallm")
    except metadata.PackageNotFoundError:
        pytest.skip("megallm runs from a checkout that is not installed")


def test_every_folder_of_modules_is_a_package() -> None:
    for source in (ROOT / "megallm", ROOT / "kernels" / "megallm_kernels"):
        folders = {file.parent for file in source.rglob("*.py")}
        assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_version_is_the_package_s() -> None:
    assert setup_says("--version")[-1] == megallm.__version__


def test_kernels_itself_is_not_importable() -> None:
    assert importlib.util.find_spec("megallm_kernels") is not None
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None, "a package named kernels would be taken for Hugging Face's"


def test_what_is_built_holds_every_module_and_table(tmp_path: Path) -> None:
    """As `pip install .` copies it, without the checkout behind it."""
    setup_says("build_py", "--build-lib", str(tmp_path))
    for source, name in ((ROOT / "megallm", "megallm"), (ROOT / "kernels" / "megallm_kernels", "megallm_kernels")):
        wanted = {p.relative_to(source) for kind in ("*.py", "*.csv") for p in source.rglob(kind)}
        assert wanted - {p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*.*")} == set()


def test_the_command_is_installed(distribution: metadata.Distribution) -> None:
    commands = {entry.name: entry.value for entry in distribution.entry_points if entry.group == "console_scripts"}
    assert commands == {"megallm": "megallm.cli.main:main"}


def test_everything_that_is_required_is_pinned(distribution: metadata.Distribution) -> None:
    pinned = {normalised(name) for name in CONSTRAINTS}
    required = [re.split(r"[^\w.-]", line)[0] for line in distribution.requires or []]
    assert "torch" in required
    assert [name for name in required if normalised(name) not in pinned] == []


def test_constraints_name_versions_and_nothing_else() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
