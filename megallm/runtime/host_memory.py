"""How much of this node's memory is still to be had: what the kernel says, or less where a container is limited.

Linux alone is read (/proc and cgroups of both versions); elsewhere the answer is None, and nobody checks.
"""

from __future__ import annotations

from pathlib import Path

_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")
"""Files of a limit and of what is in use, and the entry of memory.stat that can be given back."""


def available_host_memory(root: Path = Path("/")) -> int | None:
    """Bytes that new processes of this job could still use on this node; None where that is not known.

    `root`: where /proc and /sys are.
    """
    found = _meminfo(root / "proc" / "meminfo", "MemAvailable")
    if found is None:
        return None
    for folder, names in _cgroup_folders(root):
        limit, used = _number(folder / names[0]), _number(folder / names[1])
        if limit is not None and used is not None:
            found = min(found, max(limit - used + _stat(folder / "memory.stat", names[2]), 0))
    return found


def _cgroup_folders(root: Path) -> list[tuple[Path, tuple[str, str, str]]]:
    """The groups that this process is in, with all that they are in themselves: each may have a limit."""
    base = root / "sys" / "fs" / "cgroup"
    folders: list[tuple[Path, tuple[str, str, str]]] = []
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers == "memory" or controllers == "":
            top, names = (base / "memory", _V1) if controllers else (base, _V2)
            own = top / path.strip("/")
            folders += [(each, names) for each in (own, *own.parents) if each == top or top in each.parents]
    return folders


def _meminfo(path: Path, name: str) -> int | None:
    for line in _text(path).splitlines():
        key, _, rest = line.partition(":")
        if key == name and rest.split():
            return int(rest.split()[0]) * 1024
    return None


def _stat(path: Path, name: str) -> int:
    for line in _text(path).splitlines():
        key, _, rest = line.partition(" ")
        if key == name:
            return int(rest)
    return 0


def _number(path: Path) -> int | None:
    """The number in a file; None for `max` or no file."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
