"""Two runs never write into one directory; a run that was killed holds nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megallm.runtime.launch import UsageError
from megallm.runtime.lock import sole_writer

HOLDS = """
import sys, time
from megallm.runtime.lock import sole_writer
with sole_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_directory_has_one_writer_and_no_file_more(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "ppo"
    with sole_writer(folder):
        with pytest.raises(UsageError, match="another run is writing into .*ppo: wait until it has ended"):
            with sole_writer(folder):
                pass
        with sole_writer(tmp_path / "runs" / "other"), sole_writer(None):
            pass
    with sole_writer(folder):
        assert not list(folder.iterdir())


def test_the_lock_ends_with_the_process(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with pytest.raises(UsageError), sole_writer(tmp_path):
            pass
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=60)
    with sole_writer(tmp_path):
        pass


def test_a_second_run_is_refused_before_ranks_talk(tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "examples" / "pretrain_gpt.py"
    with sole_writer(tmp_path / "run"):
        done = subprocess.run(
            [sys.executable, str(example), "--steps", "1", "--warmup-steps", "0", "--save", str(tmp_path / "run")],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 2 and "error: another run is writing into" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list((tmp_path / "run").iterdir())
