"""How a job of N ranks ends when something is wrong: within seconds, with the first cause shown once.

    user's mistake    A UsageError (runtime/launch.py), raised before any rank talks to another. Every rank finds
                      the same one: one line `error: ...`, exit code 2 (torchrun itself always exits with 1).
    first cause       The rank prints its traceback behind `[rank r]` and leaves at once, past all destructors: they
                      would wait for peers. torchrun sees it within 0.1 s and ends the other ranks.
    consequence       A rank whose peer is gone gets `Connection closed by peer` from its collective. It says nothing
                      and waits to be ended; only if nobody does so, it speaks after all.

Who speaks is settled by one file per node that is created by whoever comes first. It lies beside the error files that
torchrun keeps for each attempt of a job, so no leftover of an earlier run can silence anyone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

from megallm.runtime.environment import LaunchInfo

USAGE_EXIT_CODE = 2
"""Exit code of a mistake in what the user asked for."""
_INTERRUPT_EXIT_CODE = 130
"""128 + SIGINT, as shells count."""
_GRACE_S = 5.0
"""How long a rank leaves it to another to speak, or waits to be ended: torchrun polls every 0.1 s, and a job whose
launcher ends nobody is still to be over within 10 s."""
_PEER_LOST = (
    "connection closed by peer",  # gloo: the peer's process is gone
    "connection reset by peer",
    "broken pipe",
    "socket closed",
    "connection was likely closed",  # TCPStore
    "recvvalue failed",
    "sendbytes failed",
    "ncclremoteerror",
    "remote process exited",  # NCCL
)


class RunStopped(RuntimeError):
    """A run cannot go on, on any rank; the message says all there is to say, so it is shown without a traceback."""


def end_usage_error(info: LaunchInfo, error: ValueError) -> NoReturn:
    """The node's first rank speaks; the others leave with 0 once it did, so that torchrun's report names one rank."""
    message = " ".join(str(error).split())
    if info.error_file is None:
        _say(f"error: {message}\n" if info.rank == 0 else "")
        _leave(info, USAGE_EXIT_CODE)
    deadline = time.monotonic() + _GRACE_S
    while info.local_rank > 0 and time.monotonic() < deadline and not _claim_path(info.error_file).exists():
        time.sleep(0.05)
    if not _claim(info):
        _leave(info, 0)
    _say(f"error: {message}\n")
    _report(info.error_file, cause=message, shown="see the line above that begins with 'error:'")
    _leave(info, USAGE_EXIT_CODE)


def end_failure(info: LaunchInfo, error: Exception) -> NoReturn:
    """The first cause is printed and ends the job; a consequence of it waits in silence."""
    if _is_peer_lost(error) and info.world_size > 1:
        _wait_to_be_ended(info)
    if not _claim(info):
        _wait_to_be_ended(info)
        _leave(info, 1)
    prefix = f"[rank {info.rank}] " if info.world_size > 1 else ""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip("\n")
    if isinstance(error, RunStopped):
        prefix, text = "error: ", str(error)
    _say("".join(f"{prefix}{line}\n" for line in text.split("\n")))
    if info.error_file is not None:
        cause = f"{type(error).__name__}: {error}"
        _report(info.error_file, cause=cause, shown=f"see the lines above that begin with '{prefix.strip()}'")
    _leave(info, 1)


def end_well(info: LaunchInfo, code: int) -> NoReturn:
    """One of several ranks leaves past destructors: those of communication threads abort it now and then."""
    _leave(info, code)


def end_interrupt(info: LaunchInfo) -> NoReturn:
    """Ctrl-C reaches every rank: one word for all, exit code 130."""
    _say("interrupted\n" if info.rank == 0 else "")
    _leave(info, _INTERRUPT_EXIT_CODE)


def _wait_to_be_ended(info: LaunchInfo) -> None:
    """Returns after _GRACE_S, if no signal ended the process: one sent by torchrun ends it with 0, so unreported."""
    if info.error_file is not None:
        signal.signal(signal.SIGTERM, _leave_on_signal)
    time.sleep(_GRACE_S)


def _leave_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(0)


def _is_peer_lost(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, here or in what `error` was raised from."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, RuntimeError | ConnectionError):
            text = str(chain).lower()
            if any(words in text for words in _PEER_LOST):
                return True
        chain = chain.__cause__
    return False


def _claim_path(error_file: Path) -> Path:
    """torchrun keeps ATTEMPT/LOCAL_RANK/error.json: the claim lies in ATTEMPT, which the node's ranks share."""
    return error_file.parent.parent / "megallm_first_failure"


def _claim(info: LaunchInfo) -> bool:
    """Whether this rank is the first of its node to ask, and so is the one to speak. Always true without torchrun."""
    if info.error_file is None:
        return True
    try:
        _claim_path(info.error_file).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # no place to write: better said twice than not at all
    return True


def _report(error_file: Path, *, cause: str, shown: str) -> None:
    """Writes what torchrun shows for this rank (`shown`) and hands to a scheduler (`cause`), in torchrun's format."""
    extra = {"py_callstack": shown, "timestamp": str(int(time.time()))}
    try:
        error_file.write_text(json.dumps({"message": {"message": cause, "extraInfo": extra}}), encoding="utf-8")
    except OSError as error:
        _say(f"warning: torchrun's error file cannot be written: {error}\n")


def _say(text: str) -> None:
    """One write, so that the lines of several ranks do not mix."""
    if text:
        sys.stderr.write(text)
        sys.stderr.flush()


def _leave(info: LaunchInfo, code: int) -> NoReturn:
    """Ends the process: one of several ranks at once, past destructors and exit hooks, since those wait for peers."""
    if info.world_size == 1:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass  # whoever read it is gone; the exit code still speaks
    os._exit(code)
