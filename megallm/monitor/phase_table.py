"""The memory of a rank by phase and model as text.

    memory of a rank      policy      critic   reference     work      total
      rollout           60.3 MiB    60.2 MiB    15.1 MiB   4.0 MiB  139.6 MiB
"""

from __future__ import annotations

from collections.abc import Sequence

from megallm.monitor.memory_table import format_bytes
from megallm.planner.phases import Phase, largest_phase

_WIDTH = 12


def format_phase_table(phases: Sequence[Phase], *, capacity: int | None = None) -> str:
    """The table, without a newline at the end. capacity: bytes of the device, None = not known."""
    names = list(phases[0].models)
    width = max(len(phase.name) for phase in phases) + 4
    columns = [max(_WIDTH, len(name) + 2) for name in names]
    cells = [name.rjust(size) for name, size in zip(names, columns, strict=True)]
    lines = ["by phase".ljust(width) + "".join(cells) + "work".rjust(_WIDTH) + "total".rjust(_WIDTH)]
    for phase in phases:
        cells = [
            format_bytes(phase.models[name]).rjust(size) for name, size in zip(names, columns, strict=True)
        ]
        ends = [format_bytes(phase.work).rjust(_WIDTH), format_bytes(phase.total).rjust(_WIDTH)]
        lines.append(f"  {phase.name}".ljust(width) + "".join([*cells, *ends]))
    if capacity is not None:
        most = largest_phase(phases).total
        lines.append(f"  the device has {format_bytes(capacity)}{'' if most <= capacity else ': less than is needed'}")
    return "\n".join(lines)
