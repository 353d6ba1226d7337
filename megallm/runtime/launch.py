"""How a program of N ranks starts and ends: every example and command is `run_main(main)`.

    def main() -> int:
        with usage_errors():                       # a mistake in here: one line on stderr, exit code 2
            config = parse(sys.argv[1:])
            device = device_for(launch_info().local_rank)
        ...                                        # an exception out here: shown once, ends all ranks
        return 0

    if __name__ == "__main__":
        run_main(main)

Under torchrun every rank runs this. torchrun itself always ends with exit code 1 and a report of its own, which names
the rank that failed and points to what that rank has said.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from megallm.runtime.environment import LaunchInfo, launch_info, wished_threads
from megallm.runtime.failure import end_failure, end_interrupt, end_usage_error, end_well

if TYPE_CHECKING:
    import torch

__all__ = [
    "LaunchInfo",
    "UsageError",
    "device_for",
    "launch_info",
    "num_usable_cores",
    "run_main",
    "threads_per_rank",
    "usage_errors",
]


_OF_A_PATH = {
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip
"""What the system says of a path that was named wrongly. Others, such as a full disk, are no mistakes of usage."""


class UsageError(ValueError):
    """What was asked for cannot be done; the message names the values, the rule and the way out."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turns ValueError, FileNotFoundError and what the system has against a path into UsageError.

    Put around what reads and checks the user's wishes, and only that: no rank may have talked to another yet.
    """
    try:
        yield
    except UsageError:
        raise
    except FileNotFoundError as error:
        raise UsageError(_file_message(error)) from error
    except OSError as error:
        if error.filename is None or error.errno not in _OF_A_PATH:  # of a socket or a process: not the user's wishes
            raise
        raise UsageError(_file_message(error)) from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Runs a program's `main` and ends the process with its exit code (None = 0): never returns.

    A UsageError prints one line for the whole node and exits with 2; any other exception ends the whole job, shown once
    (runtime/failure.py).
    """
    try:
        info = launch_info()
    except ValueError as error:
        end_usage_error(LaunchInfo(), error)
    try:
        code = main()
        if "megallm.parallel.mesh" in sys.modules:  # else no rank can have talked to another
            sys.modules["megallm.parallel.mesh"].stop_process_group()
    except UsageError as error:
        end_usage_error(info, error)
    except KeyboardInterrupt:
        end_interrupt(info)
    except BrokenPipeError:  # who read our output (a pager, `head`) has left: nothing more to say, no complaint
        os._exit(0)
    except Exception as error:
        end_failure(info, error)
    end_well(info, code or 0)


def device_for(local_rank: int, *, local_world_size: int | None = None) -> torch.device:
    """The GPU `local_rank` of this node, made current; the CPU on a node without GPUs.

    The ranks of a node share its cores: torch gets cores // local_world_size threads (at least 1), on GPUs as well,
    where optimizer state may be in the host's memory; torchrun's own OMP_NUM_THREADS=1 would leave cores unused. One
    that the user has set is kept.
    `local_world_size`: None = as launched. Raises ValueError when the node has fewer GPUs than ranks.
    """
    import torch  # here, so that a mistyped flag is answered without the seconds that importing torch takes

    size = launch_info().local_world_size if local_world_size is None else local_world_size
    torch.set_num_threads(wished_threads(size) or threads_per_rank(num_usable_cores(), size))
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if size > count:  # not `local_rank >= count`: all ranks find the same mistake
            raise ValueError(
                f"{size} ranks on a node with {count} GPUs: start at most {count} (torchrun --nproc-per-node {count}), "
                f"or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def threads_per_rank(num_cores: int, local_world_size: int) -> int:
    """Threads of one rank when `local_world_size` ranks share `num_cores` cores: the quotient, at least 1."""
    return max(1, num_cores // local_world_size)


def num_usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _file_message(error: OSError) -> str:
    """`path: no such file or directory` for what the system reported; a message of our own stays as it is."""
    if error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror.lower()}"
    return str(error)
