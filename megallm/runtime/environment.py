"""What the launcher (torchrun) tells a rank. The only file of the library that reads the environment.

A process started without torchrun is a job of one rank.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megallm.data.cache import default_cache_dir

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True, kw_only=True)
class LaunchInfo:
    """Which rank of which job this process is."""

    rank: int = 0
    """Of the whole job, 0 .. world_size - 1."""
    world_size: int = 1
    """Ranks of the whole job."""
    local_rank: int = 0
    """Of this node, 0 .. local_world_size - 1."""
    local_world_size: int = 1
    """Ranks of this node."""
    error_file: Path | None = None
    """Where torchrun looks for the cause of this rank's failure; None without torchrun."""


def launch_info(environment: Mapping[str, str] | None = None) -> LaunchInfo:
    """This process as its launcher describes it. `environment`: None = the process's own.

    Raises ValueError when the launcher's variables are incomplete or contradict each other.
    """
    env = os.environ if environment is None else environment
    # A scheduler or a container may set WORLD_SIZE or LOCAL_RANK for reasons of its own; RANK makes it a launch.
    if "RANK" not in env:
        return LaunchInfo()
    missing = [name for name in _NAMES[:3] if name not in env]
    if missing:
        raise ValueError(f"RANK is set but {', '.join(missing)} is not: start ranks with torchrun, or unset RANK")
    rank, world_size, local_rank = (_integer(env, name) for name in _NAMES[:3])
    local_world_size = _integer(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else 1
    local_world_size = max(local_world_size, local_rank + 1)
    if not 0 <= rank < world_size or not 0 <= local_rank < world_size:
        raise ValueError(
            f"RANK {rank} and LOCAL_RANK {local_rank} do not lie in 0 .. WORLD_SIZE - 1 = {world_size - 1}: "
            f"start ranks with torchrun"
        )
    error_file = env.get("TORCHELASTIC_ERROR_FILE")
    return LaunchInfo(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        error_file=Path(error_file) if error_file else None,
    )


def is_launched(environment: Mapping[str, str] | None = None) -> bool:
    """Whether a launcher has started this process as a rank."""
    return "RANK" in (os.environ if environment is None else environment)


def wished_threads(local_world_size: int, environment: Mapping[str, str] | None = None) -> int | None:
    """OMP_NUM_THREADS where it is the user's wish; None where it is not set, or is no number.

    torchrun sets it to 1 by itself when it starts several ranks on a node: a 1 is then taken for torchrun's.
    """
    env = os.environ if environment is None else environment
    first = env.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list is one number for each level of nesting
    if not first.isdecimal() or int(first) < 1:
        return None
    return None if first == "1" and local_world_size > 1 else int(first)


def become_ranks(number: int, arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by torchrun with `number` ranks of this machine, each running `python ARGUMENTS`: signals
    and the exit code are torchrun's."""
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    os.execve(sys.executable, [*command, *arguments], {"OMP_NUM_THREADS": "1", **os.environ})


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise ValueError(f"{name} is {env[name]!r}, not a whole number: start ranks with torchrun") from None


def user_cache_dir() -> Path:
    """Where tokenised data is kept unless a run says otherwise."""
    return default_cache_dir(os.environ, Path.home())
