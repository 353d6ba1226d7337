"""Whether a node's memory holds what ranks offload to it."""

from __future__ import annotations

GIB = 2**30


def check_host_memory(bytes_per_rank: int, *, ranks_per_node: int, available_bytes: int | None) -> None:
    """ValueError unless `ranks_per_node` ranks of `bytes_per_rank` fit what the node has; None = not known, so no rule.

    Only what is offloaded is counted: data, the interpreter and the framework take a few GiB a rank besides.
    """
    needed = bytes_per_rank * ranks_per_node
    if available_bytes is None or needed <= available_bytes:
        return
    raise ValueError(
        f"offload needs {needed / GIB:.1f} GiB of this node's memory ({bytes_per_rank / GIB:.1f} GiB for each of "
        f"{ranks_per_node} {'rank' if ranks_per_node == 1 else 'ranks'}), but {available_bytes / GIB:.1f} GiB are "
        "available: use more data-parallel ranks on more nodes with zero 1 or higher, a smaller model, or offload none"
    )
