"""Memory by cause as text: what was predicted and, after the first steps, what was measured.

    memory of a rank     predicted      measured
      parameters          19.1 MiB      19.1 MiB
      ...
      total               86.3 MiB      84.1 MiB

Causes peak at different times: the measured total is the most at once, the predicted one the sum of the causes.
"""

from __future__ import annotations

from collections.abc import Iterator

from megallm.monitor.memory import MeasuredMemory
from megallm.planner.memory import CauseBytes, MemoryPlan

_WIDTH = 12


def format_memory_table(
    plan: MemoryPlan, measured: MeasuredMemory | None = None, *, capacity: int | None = None
) -> str:
    """The table, without a newline at the end.

    capacity: bytes of the device, None = not known. Columns of the host's memory only where something lies there.
    """
    columns = list(_columns(plan, measured))
    places = list(dict.fromkeys(place for place, _, _, _ in columns))
    heading = "memory of a rank".ljust(18)
    lines = [heading + "".join(_cell(f"{word}" if len(places) == 1 else f"{place}") for place, word, _, _ in columns)]
    if len(places) > 1:
        lines.append(" " * 18 + "".join(_cell(word) for _, word, _, _ in columns))
    for i, (cause, _) in enumerate(plan.device.items()):
        cells = [_cell(format_bytes(found.items()[i][1])) for _, _, found, _ in columns]
        lines.append(f"  {cause:16}" + "".join(cells))
    lines.append(f"  {'total':16}" + "".join(_cell(format_bytes(total)) for _, _, _, total in columns))
    if measured is not None and measured.allocator_peak is not None:
        lines.append(f"  {'allocator':16}{_cell('')}{_cell(format_bytes(measured.allocator_peak))}")
    if capacity is not None:
        excess = "" if plan.device.total <= capacity else "  less than is needed"
        lines.append(f"  {'the device has':16}{_cell(format_bytes(capacity))}{excess}")
    return "\n".join(line.rstrip() for line in lines)


def format_bytes(count: float | None) -> str:
    """Bytes in MiB or GiB; `-` where they are not known."""
    if count is None:
        return "-"
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 / 10 else f"{count / 2**10:.1f} KiB" if count else "0"


def _columns(
    plan: MemoryPlan, measured: MeasuredMemory | None
) -> Iterator[tuple[str, str, CauseBytes, int]]:
    """(device or host, predicted or measured, bytes by cause, total)."""
    yield "device", "predicted", plan.device, plan.device.total
    if measured is not None:
        yield "device", "measured", measured.device, measured.peak
    if plan.host.total or (measured is not None and measured.host.total):
        yield "host", "predicted", plan.host, plan.host.total
        if measured is not None:
            yield "host", "measured", measured.host, measured.host.total


def _cell(text: str) -> str:
    return text.rjust(_WIDTH)
