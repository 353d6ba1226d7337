"""Proof that a schedule trains: every action once, in an order that works, with messages that meet and never hang."""

from __future__ import annotations

from collections import defaultdict

from megallm.pipeline.actions import KINDS, Action, Transfer, dependencies
from megallm.pipeline.rendezvous import play, programs
from megallm.pipeline.schedule import Schedule

_Where = dict[Action, tuple[int, int]]  # action -> (slot, rank)


def validate(schedule: Schedule) -> None:
    """Returns if the schedule is right; ValueError names the first violation with its rank and slot.

    In this order: the grid is a table of actions that exist, each on its stage's rank and at most once; none is
    missing; F comes in a later slot than F of the stage before, B than its own F and B of the stage after; for every
    ordered pair of ranks the sends of one are the receives of the other, in the same order; and all ranks come to the
    end when played under rendezvous (see `rendezvous`).
    """
    _check_table(schedule)
    where = _index(schedule)
    _check_complete(schedule, where)
    _check_dependencies(schedule, where)
    _check_pairs(schedule)
    play(programs(schedule), num_stages=schedule.num_stages)


def _check_table(schedule: Schedule) -> None:
    if schedule.num_microbatches < 1 or not schedule.grid or not schedule.stage_to_rank:
        raise ValueError(f"schedule {schedule.name!r} is empty: it needs at least one rank, stage and microbatch")
    for rank, row in enumerate(schedule.grid):
        if len(row) != schedule.num_slots:
            raise ValueError(f"rank {rank} has {len(row)} slots, rank 0 has {schedule.num_slots}: pad with None")
    for stage, rank in enumerate(schedule.stage_to_rank):
        if not 0 <= rank < schedule.num_ranks:
            raise ValueError(f"stage {stage} is on rank {rank}: ranks go from 0 to {schedule.num_ranks - 1}")


def _index(schedule: Schedule) -> _Where:
    where: _Where = {}
    for slot in range(schedule.num_slots):
        for rank, row in enumerate(schedule.grid):
            action = row[slot]
            if action is None:
                continue
            here = f"rank {rank}, slot {slot}"
            if action.kind not in KINDS or not 0 <= action.stage < schedule.num_stages:
                raise ValueError(f"{here}: {action} does not exist with {schedule.num_stages} stages")
            if not 0 <= action.microbatch < schedule.num_microbatches:
                raise ValueError(f"{here}: {action} does not exist with {schedule.num_microbatches} microbatches")
            if schedule.stage_to_rank[action.stage] != rank:
                owner = schedule.stage_to_rank[action.stage]
                raise ValueError(f"{here}: {action} is on the wrong rank: stage {action.stage} lives on rank {owner}")
            if action in where:
                raise ValueError(f"{here}: {action} runs twice, first in slot {where[action][0]}")
            where[action] = (slot, rank)
    return where


def _check_complete(schedule: Schedule, where: _Where) -> None:
    for stage, rank in enumerate(schedule.stage_to_rank):
        for microbatch in range(schedule.num_microbatches):
            for kind in KINDS:
                action = Action(kind, stage, microbatch)
                if action not in where:
                    raise ValueError(
                        f"rank {rank}: {action} is missing from all slots 0 to {schedule.num_slots - 1}: "
                        "every stage runs one F and one B of every microbatch"
                    )


def _check_dependencies(schedule: Schedule, where: _Where) -> None:
    for action, (slot, rank) in where.items():
        for need in dependencies(action, schedule.num_stages):
            need_slot, need_rank = where[need]
            if need_slot >= slot:
                raise ValueError(
                    f"rank {rank}, slot {slot}: {action} needs {need}, which runs on rank {need_rank} in slot "
                    f"{need_slot}: it must run in an earlier slot"
                )


def _check_pairs(schedule: Schedule) -> None:
    """Sends on src and receives on dst, in order of posting, are the same list for every ordered pair."""
    sends: dict[tuple[int, int], list[tuple[int, Transfer]]] = defaultdict(list)
    receives: dict[tuple[int, int], list[tuple[int, Transfer]]] = defaultdict(list)
    for rank in range(schedule.num_ranks):
        for slot in range(schedule.num_slots):
            for message in schedule.transfers(rank, slot):
                side = sends if message.src == rank else receives
                side[message.src, message.dst].append((slot, message))
    for pair in sorted(sends.keys() | receives.keys()):
        src, dst = pair
        if len(sends[pair]) != len(receives[pair]):
            raise ValueError(
                f"rank {src} sends {len(sends[pair])} messages to rank {dst}, which receives {len(receives[pair])}: "
                "every message needs both sides"
            )
        for (send_slot, sent), (slot, received) in zip(sends[pair], receives[pair], strict=True):
            if sent != received:
                raise ValueError(
                    f"rank {src}, slot {send_slot}: p2p order differs: it sends {sent}, but rank {dst} in slot {slot} "
                    f"receives {received}: post the messages of a pair in the same order on both ranks"
                )
