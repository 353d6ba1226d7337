"""How jobs of N ranks start and end, with real processes under torchrun."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megallm.runtime.environment import wished_threads
from megallm.runtime.launch import (
    LaunchInfo,
    UsageError,
    device_for,
    launch_info,
    num_usable_cores,
    threads_per_rank,
    usage_errors,
)
from megallm.runtime.logging import Log
from megallm.runtime.outputs import check_output_directory, check_output_file

ROOT = Path(__file__).parents[1]
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
PREAMBLE = """
import os, signal, sys, time
from megallm.runtime.launch import launch_info, run_main, usage_errors

def communicate():
    import torch
    import torch.distributed as dist
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    if launch_info().rank == 0:
        print(f"time={time.time()}", flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A program that has ended."""

    code: int
    stdout: str
    stderr: str
    ended: float
    """time.time() at its end."""

    @property
    def seconds_since_last_step(self) -> float:
        """From the last `time=` that the program printed to its end."""
        return self.ended - float(self.stdout.split("time=")[-1])


def run(folder: Path, body: str, *, num_ranks: int) -> Finished:
    """Runs a program whose main() is `body`, by torchrun (num_ranks > 1) or by plain Python."""
    program = folder / "program.py"
    main = "def main():\n" + textwrap.indent(textwrap.dedent(body).strip(), "    ")
    program.write_text(f'{PREAMBLE}\n{main}\n\nif __name__ == "__main__":\n    run_main(main)\n')
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [sys.executable, *(launcher if num_ranks > 1 else []), str(program)]
    env = {key: value for key, value in os.environ.items() if key not in TORCHRUN}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1800, check=False)
    return Finished(code=done.returncode, stdout=done.stdout, stderr=done.stderr, ended=time.time())


def test_a_usage_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        with usage_errors():
            raise ValueError("tp (3) does not divide 8 heads: use tp 1, 2, 4 or 8")
        """,
        num_ranks=1,
    )
    assert (done.code, done.stderr) == (2, "error: tp (3) does not divide 8 heads: use tp 1, 2, 4 or 8\n")


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    done = run(tmp_path, 'with usage_errors():\n    open("/nowhere/data.txt")', num_ranks=1)
    assert (done.code, done.stderr) == (2, "error: /nowhere/data.txt: no such file or directory\n")


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda path: path.read_text(), "is a directory"),
        (lambda path: path.mkdir(), "file exists"),
        (lambda path: (path / "file" / "below").touch(), "not a directory"),
        (lambda path: (path / ("x" * 300)).touch(), "file name too long"),
    ],
)
def test_what_the_system_has_against_a_path_is_a_usage_error(
    use: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as error, usage_errors():
        use(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and str(error.value).endswith(f": {words}")


@pytest.mark.parametrize(
    "error",
    [PermissionError(errno.EPERM, "not of a path"), OSError(errno.ENOSPC, "no space left", "file"), KeyError("a bug")],
)
def test_what_is_no_mistake_of_usage_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, usage_errors():
        raise error
    assert raised.value is error


def test_asking_whether_something_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "file", tmp_path / "new", tmp_path / "a" / "b" / "new"):
        check_output_file(path)
    for path in (tmp_path, tmp_path / "a" / "b"):
        check_output_directory(path)
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "link" / "below"):
        with pytest.raises(ValueError, match="is not a directory; choose another place"):
            check_output_directory(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="takes no new files .permission denied.; choose another place"):
        check_output_file(tmp_path / "a" / "new")


def test_any_other_error_has_a_traceback_and_exit_code_1(tmp_path: Path) -> None:
    done = run(tmp_path, 'raise ValueError("a bug")', num_ranks=1)
    assert done.code == 1
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("ValueError: a bug\n")


def test_the_exit_code_is_what_main_returns(tmp_path: Path) -> None:
    assert run(tmp_path, "return 3", num_ranks=1).code == 3
    assert run(tmp_path, "pass", num_ranks=1).code == 0


def test_a_usage_error_of_all_ranks_is_said_once(tmp_path: Path) -> None:
    done = run(tmp_path, 'with usage_errors():\n    raise ValueError("five heads")', num_ranks=3)
    assert done.code == 1  # torchrun's, whatever the ranks' is
    assert done.stderr.count("five heads") == 1
    assert "error: five heads" in done.stderr.splitlines()
    assert "exitcode  : 2 " in done.stderr


def test_a_usage_error_of_one_rank_alone_is_said_too(tmp_path: Path) -> None:
    body = """
        with usage_errors():
            if launch_info().rank == 1:
                raise ValueError("no such file on this rank")
        communicate()
        """
    done = run(tmp_path, body, num_ranks=2)
    assert done.code == 1
    assert done.stderr.splitlines().count("error: no such file on this rank") == 1


def test_a_rank_that_raises_ends_the_job_at_once_and_is_the_only_one_to_speak(tmp_path: Path) -> None:
    body = """
        communicate()
        if launch_info().rank == 2:
            time.sleep(0.5)
            raise RuntimeError("loss is not finite")
        communicate()
        """
    done = run(tmp_path, body, num_ranks=4)
    assert done.code == 1
    assert done.seconds_since_last_step < 120.0  # a collective waits for half an hour
    assert done.stderr.count("[rank 2] RuntimeError: loss is not finite") == 1
    assert done.stderr.count("Traceback") == 2, "the rank's, and the one that torchrun always ends with"
    assert "[rank 0]" not in done.stderr and "[rank 1]" not in done.stderr and "[rank 3]" not in done.stderr


def test_a_killed_rank_ends_the_job_at_once_and_torchrun_names_it(tmp_path: Path) -> None:
    body = """
        communicate()
        if launch_info().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        communicate()
        """
    done = run(tmp_path, body, num_ranks=2)
    assert done.code == 1
    assert done.seconds_since_last_step < 120.0  # a collective waits for half an hour
    assert "[rank 0]" not in done.stderr
    assert f"exitcode  : -{signal.SIGKILL.value} " in done.stderr


def test_launch_info_reads_what_torchrun_sets() -> None:
    assert launch_info(TORCHRUN) == LaunchInfo(rank=3, world_size=4, local_rank=1, local_world_size=2)


def test_without_torchrun_a_process_is_a_job_of_one_rank() -> None:
    assert launch_info({"WORLD_SIZE": "8", "LOCAL_RANK": "2"}) == LaunchInfo()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not"),
        ({"RANK": "4"}, "RANK 4 "),
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK is 'one'"),
    ],
)
def test_a_broken_launch_is_refused(changes: dict[str, str | None], words: str) -> None:
    env = {key: value for key, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=words):
        launch_info(env)


def test_ranks_of_a_node_share_its_cores() -> None:
    assert [threads_per_rank(8, size) for size in (1, 3, 8, 20)] == [8, 2, 1, 1]


@pytest.mark.parametrize(
    ("value", "ranks", "wished"),
    [(None, 1, None), ("1", 1, 1), ("3", 1, 3), ("1", 4, None), ("2", 4, 2), ("6,2", 1, 6), ("x", 1, None)],
)
def test_threads_that_the_user_wishes_are_not_torchruns_own(value: str | None, ranks: int, wished: int | None) -> None:
    assert wished_threads(ranks, {} if value is None else {"OMP_NUM_THREADS": value}) == wished


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine's ranks compute on GPUs")
def test_device_for_sets_the_threads_of_a_rank_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        assert device_for(0, local_world_size=1) == torch.device("cpu")
        assert torch.get_num_threads() == num_usable_cores()
        device_for(0, local_world_size=10_000)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_only_rank_0_logs() -> None:
    stream = io.StringIO()
    for rank in range(2):
        log = Log(rank, stream=stream)
        log.info(f"rank {rank}")
        log.warning("slow")
        log.once("plain attention: no GPU")
        log.once("plain attention: no GPU")
    assert stream.getvalue() == "rank 0\nwarning: slow\nplain attention: no GPU\n"
