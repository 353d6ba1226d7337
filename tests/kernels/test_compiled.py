"""Every kernel compiles for sm_80 and sm_90 without a GPU, and takes no more than its budget."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted(path.stem[6:] for path in HERE.glob("cases_*.py")))
def test_machine_code_stays_within_its_budget(op: str) -> None:
    """No spills, shared memory under the limit, tensor cores and TMA where expected, registers as stored."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "compile_all.py"), op, "--check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
