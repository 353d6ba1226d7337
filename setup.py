"""Packaging: `pip install -c constraints.txt -e .` gives the libraries `megallm` and `megallm_kernels` and the command.

The folder kernels/ is a source root and not a package: its content is installed as `megallm_kernels`.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# Triton publishes wheels for Linux on these two machines only; elsewhere the plain torch ops serve.
TRITON = 'triton>=3.6; platform_system == "Linux" and (platform_machine == "x86_64" or platform_machine == "aarch64")'


def read_version() -> str:
    """The version that megallm/__init__.py states."""
    match = re.search(r'__version__ = "([^"]+)"', (ROOT / "megallm" / "__init__.py").read_text(encoding="utf-8"))
    if match is None:
        raise ValueError("megallm/__init__.py states no __version__")
    return match.group(1)


setup(
    name="megallm",
    version=read_version(),
    description="Trains large language models end to end on any 3D layout of ranks",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["megallm", "megallm.*"]),
        *find_packages(where="kernels", include=["megallm_kernels", "megallm_kernels.*"]),
    ],
    package_dir={"megallm": "megallm", "megallm_kernels": "kernels/megallm_kernels"},
    install_requires=[
        "torch>=2.11",
        TRITON,
        "numpy",
        "safetensors",
        "tokenizers",
        "pyyaml",
        "matplotlib",
    ],
    extras_require={
        "test": ["pytest", "ruff", "mypy", "transformers", "types-PyYAML", "psutil"],
    },
    entry_points={"console_scripts": ["megallm = megallm.cli.main:main"]},
)
