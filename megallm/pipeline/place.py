"""From an ordered list of actions per rank to slots. Every generator ends here.

A generator decides only the order on each rank; when an action can run follows from its dependencies. So a new
schedule (zero-bubble, V-shaped) is a new order and a new stage_to_rank, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from megallm.pipeline.actions import Action, dependencies
from megallm.pipeline.schedule import Schedule


def place(
    name: str, orders: Sequence[Sequence[Action]], *, num_microbatches: int, stage_to_rank: tuple[int, ...]
) -> Schedule:
    """The schedule in which every rank takes its next action in the first slot it can.

    `orders[rank]` is the rank's actions in order. An action can run in a slot if all it depends on ran in earlier
    slots. ValueError if the orders wait for each other (or for an action nobody runs) and no rank can go on.
    """
    num_stages = len(stage_to_rank)
    needs = [[dependencies(action, num_stages) for action in order] for order in orders]
    rows: list[list[Action | None]] = [[] for _ in orders]
    position = [0] * len(orders)
    done: set[Action] = set()
    while any(position[rank] < len(order) for rank, order in enumerate(orders)):
        ran: list[Action] = []
        for rank, order in enumerate(orders):
            at = position[rank]
            runs = at < len(order) and done.issuperset(needs[rank][at])
            rows[rank].append(order[at] if runs else None)
            if runs:
                ran.append(order[at])
                position[rank] += 1
        if not ran:
            raise ValueError(_stuck(name, orders, needs, position, done))
        done.update(ran)
    return Schedule(
        name=name,
        num_microbatches=num_microbatches,
        stage_to_rank=stage_to_rank,
        grid=tuple(tuple(row) for row in rows),
    )


def _stuck(
    name: str,
    orders: Sequence[Sequence[Action]],
    needs: Sequence[Sequence[tuple[Action, ...]]],
    position: Sequence[int],
    done: set[Action],
) -> str:
    waits = []
    for rank, order in enumerate(orders):
        if position[rank] < len(order):
            missing = ", ".join(str(need) for need in needs[rank][position[rank]] if need not in done)
            waits.append(f"rank {rank} at {order[position[rank]]} waits for {missing}")
    return f"schedule {name!r} deadlocks: {'; '.join(waits)}; change the order of the actions on one of these ranks"
