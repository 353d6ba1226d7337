"""Times on a schedule: when each action runs, how long ranks idle, how many activations they hold.

Stages are equal. Each rank takes its actions in the schedule's order, each as soon as its input is there. The planner
uses the same object that the runtime executes, so that a prediction and a run cannot drift apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megallm.pipeline.actions import Action, dependencies
from megallm.pipeline.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Span:
    """One action on the clock; times in the unit of `forward_time`."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A schedule with times. Tuples are indexed by pipeline rank."""

    schedule: Schedule
    total_time: float
    """From the first start to the last end."""
    busy: tuple[float, ...]
    """Time spent computing."""
    bubble_per_rank: tuple[float, ...]
    """Idle time over the rank's compute time, m (tf + tb)."""
    bubble: float
    """Idle time over compute time, of all ranks together."""
    peak_live_chunks: tuple[int, ...]
    """Most chunk-microbatches at once whose forward ran and whose backward has not ended."""
    peak_live_microbatches: tuple[float, ...]
    """The same in whole-rank microbatches: one is the activations of all of the rank's layers, so chunks / v."""
    timeline: tuple[Span, ...]
    """In order of slot, then rank."""


def simulate(
    schedule: Schedule,
    *,
    forward_time: float = 1.0,
    backward_time: float = 2.0,
    p2p_time: float = 0.0,
    batched_p2p: bool = False,
) -> Simulation:
    """The schedule's times, for a schedule that `validate` accepts.

    forward_time and backward_time are of one microbatch through all layers of a rank (a chunk takes 1/v of it),
    p2p_time of one message between ranks, which costs no compute time. With batched_p2p a message arrives only when
    its whole batch has ended on the receiver, and batches of a rank run one after another, as with NCCL groups;
    without it a message takes p2p_time from the end of its producer. ValueError if a time is negative or not finite,
    or if forward_time + backward_time is 0.
    """
    _check_times(forward_time=forward_time, backward_time=backward_time, p2p_time=p2p_time)
    if forward_time + backward_time == 0:
        raise ValueError("forward_time and backward_time are both 0: give at least one of them a positive time")
    # Times are kept in units of 1/scale: a chunk's time is then not divided, and whole times give exact bubbles.
    chunks = [len(schedule.stages_of(rank)) for rank in range(schedule.num_ranks)]
    scale = math.lcm(*(count for count in chunks if count))
    costs = {
        "F": [forward_time * (scale // count) if count else 0.0 for count in chunks],
        "B": [backward_time * (scale // count) if count else 0.0 for count in chunks],
    }
    spans = _run(schedule, costs, p2p_time * scale, batched_p2p)
    busy = [0.0] * schedule.num_ranks
    for span in spans:
        busy[span.rank] += costs[span.action.kind][span.rank]
    total = max((span.end for span in spans), default=0.0)
    live = [_peak_live(schedule.actions_of(rank)) for rank in range(schedule.num_ranks)]
    return Simulation(
        schedule=schedule,
        total_time=total / scale,
        busy=tuple(time / scale for time in busy),
        bubble_per_rank=tuple((total - time) / time if time else math.inf for time in busy),
        bubble=(total * schedule.num_ranks - sum(busy)) / sum(busy),
        peak_live_chunks=tuple(live),
        peak_live_microbatches=tuple(peak / count if count else 0.0 for peak, count in zip(live, chunks, strict=True)),
        timeline=tuple(Span(span.rank, span.action, span.start / scale, span.end / scale) for span in spans),
    )


def _run(schedule: Schedule, costs: dict[str, list[float]], p2p_time: float, batched_p2p: bool) -> list[Span]:
    """Every action's span, slot by slot: whatever an action needs lies in an earlier slot."""
    spans: list[Span] = []
    compute_free = [0.0] * schedule.num_ranks
    batch_free = [0.0] * schedule.num_ranks
    ended: dict[Action, float] = {}
    arrived: dict[Action, float] = {}  # by the consuming action
    for slot in range(schedule.num_slots):
        for rank, row in enumerate(schedule.grid):
            action = row[slot]
            if action is None:
                continue
            inputs = [compute_free[rank], arrived.get(action, 0.0)]
            inputs += [
                ended[need]
                for need in dependencies(action, schedule.num_stages)
                if schedule.stage_to_rank[need.stage] == rank
            ]
            start = max(inputs)
            compute_free[rank] = ended[action] = start + costs[action.kind][rank]
            spans.append(Span(rank, action, start, ended[action]))
        _deliver(schedule, slot, compute_free, batch_free, ended, arrived, p2p_time, batched_p2p)
    return spans


def _deliver(
    schedule: Schedule,
    slot: int,
    compute_free: list[float],
    batch_free: list[float],
    ended: dict[Action, float],
    arrived: dict[Action, float],
    p2p_time: float,
    batched_p2p: bool,
) -> None:
    """Fills in when the messages of this slot arrive; updates batch_free in place."""
    batches = [schedule.transfers(rank, slot) for rank in range(schedule.num_ranks)]
    if not batched_p2p:
        for message in {message for batch in batches for message in batch}:
            arrived[message.consumer] = ended[message.producer] + p2p_time
        return
    # A batch is posted after the rank's compute so far and runs after the rank's batch before it.
    begins = [max(times) for times in zip(compute_free, batch_free, strict=True)]
    for rank, batch in enumerate(batches):
        if batch:
            end = max(max(begins[message.src], begins[message.dst]) + p2p_time for message in batch)
            batch_free[rank] = end
            arrived.update({message.consumer: end for message in batch if message.dst == rank})


def _peak_live(actions: tuple[Action, ...]) -> int:
    live = peak = 0
    for action in actions:
        live += 1 if action.kind == "F" else -1
        peak = max(peak, live)
    return peak


def _check_times(**times: float) -> None:
    for name, time in times.items():
        if not (math.isfinite(time) and time >= 0):
            raise ValueError(f"{name} is {time}: give a time of 0 or more")
