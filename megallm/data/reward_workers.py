"""Reward functions in processes of their own, several at once: whatever one does, the caller gets an answer in time.

    RewardWorkers --- pipe --- worker 0        one call at a time each; JSON lines (reward_worker.py says which)
                  --- pipe --- worker 1

A worker that has not answered within `timeout_s` is killed with all that it started, even if it holds its interpreter's
lock, and so is one that ended; the next call gets a new one. Functions may keep what they load between calls, but must
not count on which worker sees a call.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megallm.data.reward_functions import check_text, own_limit_s

FailureKind = Literal["raised", "not a number", "blocked", "died"]
TIMEOUT_S = 10.0
START_TIMEOUT_S = 60.0
"""To import what a user's file imports."""
_GOODBYE_S = 1.0
_START = "import sys; sys.path[:] = sys.argv[1:]; from megallm.data.reward_worker import main; main()"
"""What `-m megallm.data.reward_worker` does, with the caller's places to import from."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a function is asked."""

    prompt: str
    completion: str
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The columns of the prompt's record; what JSON can say."""


@dataclass(frozen=True)
class Failure:
    """Why there is no score."""

    kind: FailureKind
    detail: str


class RewardWorkers:
    """Processes that run one function. Not for several threads at a time."""

    def __init__(
        self,
        spec: str,
        *,
        workers: int = 2,
        timeout_s: float = TIMEOUT_S,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        """Starts them and waits until each has loaded the function. ValueError or FileNotFoundError for a spec that
        names none (data/reward_functions.py), in words."""
        check_text(spec)
        if workers < 1:
            raise ValueError(f"workers ({workers}) must be at least 1")
        if not 0.0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s ({timeout_s}) must be more than 0 and finite")
        if own_limit_s(spec) >= timeout_s:
            raise ValueError(
                f"{spec} may take {own_limit_s(spec):g} s by its own rule, timeout_s is {timeout_s:g}: raise it, or "
                "give the function fewer seconds, as in python_tests:2"
            )
        self._start = {"spec": spec, "limit_s": timeout_s, "start_limit_s": start_timeout_s}
        self._children: list[_Child | None] = []
        try:
            for _ in range(workers):
                self._children.append(_Child(self._start))
            while waiting := [child for child in self._children if child is not None and not child.is_ready]:
                for _, outcome in _outcomes(waiting):
                    assert isinstance(outcome, Failure)  # nothing was asked yet
                    raise ValueError(f"{spec}: {outcome.detail}")
        except BaseException:
            self.close()
            raise

    @property
    def columns(self) -> tuple[str, ...]:
        """Of a record, without which the function has no score, as far as its parameters tell."""
        return next((child.columns for child in self._children if child is not None), ())

    def score(self, rows: Sequence[Call]) -> list[float | Failure]:
        """What the function says of each row, in their order: a finite number, or why there is none."""
        lines = [_line({**vars(row), "record": dict(row.record)}) for row in rows]
        found: dict[int, float | Failure] = {}
        asked: dict[int, int] = {}  # worker: row
        waiting = iter(range(len(rows)))
        try:
            while len(found) < len(rows):
                for worker in range(len(self._children)):
                    if worker not in asked and (row := next(waiting, None)) is not None:
                        asked[worker] = row
                        self._ask(worker, lines[row])
                busy = [child for worker in asked if (child := self._children[worker]) is not None]
                for child, outcome in _outcomes(busy):
                    worker = self._children.index(child)
                    found[asked.pop(worker)] = outcome
                    if child.is_lost:
                        self._end(worker)
        except BaseException:
            for worker in asked:  # their answers would be taken for those to the next rows
                self._end(worker)
            raise
        return [found[row] for row in range(len(rows))]

    def _ask(self, worker: int, line: bytes) -> None:
        child = self._children[worker]
        if child is not None and not child.is_idle():  # it ended since its last answer
            self._end(worker)
            child = None
        if child is None:
            child = self._children[worker] = _Child(self._start)
        child.ask(line)

    def _end(self, worker: int) -> None:
        if (child := self._children[worker]) is not None:
            child.end()
        self._children[worker] = None

    def close(self) -> None:
        """Ends the processes, and whatever they started. Scoring again starts new ones."""
        children = [child for child in self._children if child is not None]
        self._children = [None] * len(self._children)
        for child in children:
            child.hang_up()
        deadline = time.monotonic() + _GOODBYE_S
        for child in children:
            child.wait_for_goodbye(deadline)
            child.end()

    def __enter__(self) -> RewardWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_spec(spec: str, *, start_timeout_s: float = START_TIMEOUT_S) -> tuple[str, ...]:
    """The columns that the function needs. ValueError or FileNotFoundError if there is no such function, its file
    cannot be loaded, or it cannot be called with (prompt, completion, **record). Runs the file, in a process of its
    own."""
    check_text(spec)
    timeout_s = max(TIMEOUT_S, 2.0 * own_limit_s(spec))
    with RewardWorkers(spec, workers=1, timeout_s=timeout_s, start_timeout_s=start_timeout_s) as workers:
        return workers.columns


class _Child:
    """One process, and what is on its way to and from it."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        self._limit_s = float(start["limit_s"])
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *sys.path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        for pipe in (self._to, self._from):
            os.set_blocking(pipe.fileno(), False)
        self._leaving = bytearray(_line(start))
        self._arrived = bytearray()
        self._is_closed = False
        self.is_ready = False
        self.columns: tuple[str, ...] = ()
        self.is_lost = False
        """Whether no more answers can come."""
        self._patience_s = float(start["start_limit_s"])
        self.deadline = time.monotonic() + self._patience_s

    def ask(self, line: bytes) -> None:
        """The call goes out as soon as there is room; time counts from now, or from when the function is loaded."""
        self._leaving += line
        if self.is_ready:
            self._begin()

    def is_idle(self) -> bool:
        """Whether it lives and has nothing to say, as one must that is not in a call."""
        self._read()
        return not self._is_closed and not self._arrived

    def register(self, poller: select.poll) -> None:
        """For what this waits for."""
        poller.register(self._from, select.POLLIN)
        if self._leaving:
            poller.register(self._to, select.POLLOUT)

    def outcome(self) -> float | Failure | None:
        """The answer if it is here, None while it may still come."""
        self._move()
        while (end := self._arrived.find(b"\n")) >= 0:
            line = bytes(self._arrived[:end])
            del self._arrived[: end + 1]
            reply = _read(line)
            if reply is None:
                return self._lost("died", "something wrote between its answers")
            if "refused" in reply:
                return self._lost("died", reply["refused"])
            if "ready" not in reply:
                return float(reply["score"]) if "score" in reply else Failure(reply["kind"], reply["detail"])
            self.is_ready, self.columns = True, tuple(reply["columns"])
            self._begin()
        if self._is_closed:
            return self._lost(*self._cause_of_death())
        if time.monotonic() >= self.deadline:
            what = "no score" if self.is_ready else "not loaded"
            return self._lost("blocked", f"{what} after {self._patience_s:g} s")
        return None

    def hang_up(self) -> None:
        """No more calls: it ends if it is not in one."""
        self._to.close()

    def wait_for_goodbye(self, deadline: float) -> None:
        """Until it has ended, or for so long."""
        while not self._is_closed and (left := deadline - time.monotonic()) > 0:
            poller = select.poll()
            poller.register(self._from, select.POLLIN)
            poller.poll(math.ceil(1000 * left))
            self._read()

    def end(self) -> None:
        """Kills it and what it started, if they still live."""
        if self._process.returncode is None:  # not waited for yet, so that its number is nobody else's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._to.close()
        self._from.close()

    def _begin(self) -> None:
        self._patience_s = self._limit_s
        self.deadline = time.monotonic() + self._limit_s

    def _lost(self, kind: FailureKind, detail: str) -> Failure:
        self.is_lost = True
        return Failure(kind, detail)

    def _move(self) -> None:
        """Writes and reads what can be without waiting."""
        try:
            while self._leaving:
                del self._leaving[: os.write(self._to.fileno(), self._leaving[:65536])]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # it has ended, as reading will tell
            self._leaving.clear()
        self._read()

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._from.fileno(), 65536):
                self._arrived += part
            self._is_closed = True

    def _cause_of_death(self) -> tuple[FailureKind, str]:
        self.end()
        code = self._process.returncode
        if code == -signal.SIGALRM:
            return "blocked", f"no score after {self._patience_s:g} s"
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return "died", f"its process ended ({cause})"


def _outcomes(children: Sequence[_Child]) -> list[tuple[_Child, float | Failure]]:
    """Waits until one of the children has something; what there is of each."""
    poller = select.poll()
    for child in children:
        child.register(poller)
    left = min(child.deadline for child in children) - time.monotonic()
    poller.poll(max(0, math.ceil(1000 * left)))
    return [(child, found) for child in children if (found := child.outcome()) is not None]


def _line(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()


def _read(line: bytes) -> dict[str, Any] | None:
    """A reply; None for anything else."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.keys() & {"ready", "refused", "score", "kind"} else None
