"""Reward functions in real processes: whatever one does, every row has an outcome, nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from watching import lives

from megallm.data.reward_worker import MARGIN_S
from megallm.data.reward_workers import Call, Failure, RewardWorkers, check_spec

FILE = r"""
import ctypes, os, signal, subprocess, sys, threading, time

print("printed while loading")

def score(prompt, completion, **record):
    print("a print", flush=True)
    os.write(1, b"not json\n")
    os.system("echo of a child")
    if completion == "raise":
        raise KeyError("no such\nthing")
    if completion == "exit":
        sys.exit(3)
    if completion == "die":
        os._exit(3)
    if completion == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if completion == "sleep":
        time.sleep(600)
    if completion == "hold":  # sleeps with the interpreter's lock held
        ctypes.PyDLL(None).sleep(600)
    if completion == "family":
        subprocess.Popen(["sleep", "60173"])
        time.sleep(600)
    if completion == "thread":  # leaves somebody who takes the lock for good
        threading.Timer(0.2, lambda: ctypes.PyDLL(None).sleep(600)).start()
        return 1.0
    if completion == "die later":
        threading.Timer(0.1, lambda: os._exit(4)).start()
        return 1.0
    if completion == "read":
        return len(sys.stdin.read())
    return {"nan": float("nan"), "inf": -float("inf"), "none": None, "text": "1.0", "true": True, "int": 2}.get(
        completion, len(prompt) + len(completion) / 10 + record.get("bonus", 0.0)
    )

def process(prompt, completion):
    return os.getpid()

def pause(prompt, completion):
    time.sleep(float(completion))
    return 1.0

def meet(prompt, completion):  # returns when four rows are here
    open(os.path.join(prompt, completion), "w").close()
    while len(os.listdir(prompt)) < 4:
        time.sleep(0.01)
    return 1.0
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def workers(file: Path) -> Iterator[Callable[..., RewardWorkers]]:
    made: list[RewardWorkers] = []

    def make(name: str = "score", **kwargs: Any) -> RewardWorkers:
        made.append(RewardWorkers(f"{file}:{name}", **{"workers": 2, "timeout_s": 2.0, **kwargs}))
        return made[-1]

    yield make
    for each in made:
        each.close()


def calls(*completions: str, **record: Any) -> list[Call]:
    return [Call(prompt="ab", completion=completion, record=record) for completion in completions]


def ends(pid: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not lives(pid)


def test_scores_come_in_the_order_of_the_rows(workers: Callable[..., RewardWorkers]) -> None:
    rows = calls(*("x" * number for number in range(50)), bonus=0.5)
    found = workers(workers=3).score(rows)
    assert found == [2.5 + number / 10 for number in range(50)] == workers(workers=1).score(rows)
    assert workers(workers=1).score([]) == []


@pytest.mark.parametrize(
    ("completion", "kind", "detail"),
    [
        ("raise", "raised", "KeyError: 'no such\\nthing' (line 11 of rewards.py)"),
        ("exit", "raised", "SystemExit: 3 (line 13 of rewards.py)"),
        ("die", "died", "its process ended (exit code 3)"),
        ("segfault", "died", "its process ended (signal SIGSEGV)"),
        ("sleep", "blocked", "no score after 2 s"),
        ("hold", "blocked", "no score after 2 s"),
        ("nan", "not a number", "returned nan"),
        ("inf", "not a number", "returned -inf"),
        ("none", "not a number", "returned None (NoneType)"),
        ("text", "not a number", "returned '1.0' (str)"),
    ],
)
def test_a_failure_has_a_kind_and_a_cause_and_harms_no_other_row(
    workers: Callable[..., RewardWorkers], completion: str, kind: str, detail: str
) -> None:
    some = workers()
    begin = time.monotonic()
    found = some.score(calls("a", completion, "b", completion, "c", "read"))
    assert found[1] == found[3]
    assert isinstance(found[1], Failure) and (found[1].kind, found[1].detail) == (kind, detail)
    assert [found[0], found[2], found[4], found[5]] == [2.1, 2.1, 2.1, 0.0]
    assert some.score(calls("a", "true", "int")) == [2.1, 1.0, 2.0]
    assert time.monotonic() - begin < 300.0  # what sleeps would for 600 s


def test_what_the_function_prints_goes_to_stderr(
    workers: Callable[..., RewardWorkers], capfd: pytest.CaptureFixture[str]
) -> None:
    assert workers(workers=1).score(calls("a")) == [2.1]
    out, error = capfd.readouterr()
    assert out == "" and "printed while loading" in error
    assert all(text in error for text in ("a print", "not json", "of a child"))


def test_rows_run_at_once(workers: Callable[..., RewardWorkers], tmp_path: Path) -> None:
    """Each of four rows ends when all four have begun: one after another, the first would be given up."""
    place = tmp_path / "here"
    place.mkdir()
    rows = [Call(prompt=str(place), completion=each, record={}) for each in "abcd"]
    assert workers("meet", workers=4, timeout_s=120.0).score(rows) == [1.0] * 4


def test_large_rows_pass_and_a_worker_that_does_not_read_is_given_up(workers: Callable[..., RewardWorkers]) -> None:
    some, large = workers(workers=1), "x" * 3_000_000
    assert some.score(calls(large, large)) == [2 + 300_000.0] * 2
    assert some.score(calls("thread")) == [1.0]
    time.sleep(0.4)
    found = some.score(calls(large, "a"))
    assert isinstance(found[0], Failure) and found[0].kind == "blocked" and found[1] == 2.1


def test_a_worker_that_ended_between_two_calls_costs_no_row(workers: Callable[..., RewardWorkers]) -> None:
    some = workers(workers=1)
    assert some.score(calls("die later")) == [1.0]
    time.sleep(0.4)
    assert some.score(calls("a")) == [2.1]


def test_close_and_a_timeout_leave_no_process(workers: Callable[..., RewardWorkers]) -> None:
    some = workers("process", workers=2)
    pids = {int(each) for each in some.score(calls(*"abcdefgh")) if not isinstance(each, Failure)}
    assert len(pids) == 2 and all(map(lives, pids))
    some.close()
    assert not any(map(lives, pids))
    some.close()
    assert len(some.score(calls("a"))) == 1  # new ones
    family = workers(timeout_s=0.3, workers=1)
    assert isinstance(family.score(calls("family"))[0], Failure)
    deadline = time.monotonic() + 60.0
    while _sleepers("60173") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _sleepers("60173")


def _sleepers(seconds: str) -> list[str]:
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if each.read_bytes().split(b"\0")[:2] == [b"sleep", seconds.encode()] and lives(int(each.parent.name)):
                found.append(each.parent.name)
        except OSError:
            continue
    return found


PARENT = """
import sys, time
from megallm.data.reward_workers import Call, RewardWorkers
some = RewardWorkers(sys.argv[1] + ":process", workers=1)
print(int(some.score([Call(prompt="", completion="")])[0]), flush=True)
time.sleep(600)
"""


def test_workers_end_when_their_parent_is_killed(file: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(file)], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert lives(pid)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert ends(pid, within_s=5.0)


def test_a_worker_in_a_call_ends_by_its_own_timer_when_its_parent_is_killed(file: Path) -> None:
    limit_s = 0.5 - MARGIN_S
    start = json.dumps({"spec": f"{file}:score", "start_limit_s": 60, "limit_s": limit_s}) + "\n"
    command = [sys.executable, "-m", "megallm.data.reward_worker"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(start.encode() + b'{"prompt": "", "completion": "hold", "record": {}}\n')
    worker.stdin.close()
    assert worker.stdout.read() == b'{"ready": true, "columns": []}\n'
    assert worker.wait(timeout=100) == -signal.SIGALRM
    worker.stdout.close()


def test_an_interrupted_call_leaves_no_stale_answers(workers: Callable[..., RewardWorkers]) -> None:
    some = workers("pause", timeout_s=5.0)

    def interrupt(*_: Any) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(InterruptedError):
            some.score(calls("1", "1", "1"))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert some.score(calls("0", "0")) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("other", FILE, "has no function other; it has score, process, pause, meet"),
        ("score", "def score(prompt): ...", "does not fit: it is called with"),
        ("score", "import os; os._exit(5)", r"its process ended \(exit code 5\)"),
        ("score", "import time; time.sleep(600)", "not loaded after 1 s"),
        ("score", "1 / 0", r"cannot be loaded: ZeroDivisionError: division by zero \(line 1 of rewards.py\)"),
        ("score", "def score(:", "cannot be loaded: SyntaxError"),
    ],
)
def test_specs_that_cannot_be_used_are_refused_when_made(file: Path, name: str, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        check_spec(f"{file}:{name}", start_timeout_s=1.0)


def test_good_specs_pass_and_arguments_are_checked(file: Path) -> None:
    for spec in (f"{file}:score", "exact_answer", "format:a+", "python_tests:20"):
        check_spec(spec)
    needs = {"exact_answer": ("answer",), "boxed": ("answer",), "format": ("format",), "format:a": (), "length": ()}
    assert {spec: check_spec(spec) for spec in needs} == needs
    file.write_text("def named(prompt, completion, a, *, b, c=1, **others): ...")
    assert check_spec(f"{file}:named") == ("a", "b")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        check_spec(f"{file.parent / 'none.py'}:score")
    with pytest.raises(ValueError, match="is no reward function"):
        RewardWorkers("nothing")
    with pytest.raises(ValueError, match=r"workers \(0\)"):
        RewardWorkers("exact_answer", workers=0)
    with pytest.raises(ValueError, match=r"may take 5 s by its own rule, timeout_s is 4: raise it"):
        RewardWorkers("python_tests", timeout_s=4.0)


def test_a_worker_starts_without_torch() -> None:
    code = "import sys, megallm.data.reward_worker; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert out.stdout.strip() == "[]"
