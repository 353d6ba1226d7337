"""Plays all ranks of a pipeline at once under the strictest p2p there is, to show that no run can hang.

What NCCL needs. A grouped batch of sends and receives is one operation on the communicator's stream: the messages in
it progress together, so their order inside the batch matters only per ordered pair of ranks (matching has no tags: the
n-th send from a to b meets the n-th receive of b from a). The batch ends when all of its messages have ended, a message
moves only when both sides have reached it (no buffering, "rendezvous"), and a rank's batches run one after another.

The player is stricter still: a rank does not go on to its next slot before its batch has ended. Matching per pair is
first in, first out, without wildcards, so posting earlier (isend and irecv, waited for later) can only let more happen
in time, never match otherwise: a program that ends here ends under NCCL's stream order, and under gloo.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from megallm.pipeline.actions import Action, Transfer, dependencies
from megallm.pipeline.schedule import Schedule


@dataclass(frozen=True)
class Step:
    """What a rank does in one slot: at most one action, then one batch of messages."""

    action: Action | None = None
    batch: tuple[Transfer, ...] = ()


def programs(schedule: Schedule) -> tuple[tuple[Step, ...], ...]:
    """Each rank's steps, one a slot, as the runtime executes them."""
    return tuple(
        tuple(Step(action, schedule.transfers(rank, slot)) for slot, action in enumerate(schedule.grid[rank]))
        for rank in range(schedule.num_ranks)
    )


def play(ranks: Sequence[Sequence[Step]], *, num_stages: int) -> None:
    """Returns if every rank comes to the end of its steps; ValueError names the rank and slot of the first fault.

    Faults: an action whose input is not on its rank, a message sent before it was made, a send that meets the receive
    of another message, and ranks that wait for each other for ever.
    """
    player = _Player(ranks=ranks, num_stages=num_stages)
    ready = deque(range(len(ranks)))
    while ready:
        ready.extend(player.advance(ready.popleft()))
    waits = [player.waiting(rank) for rank in range(len(ranks)) if player.slots[rank] < len(ranks[rank])]
    if waits:
        raise ValueError(f"deadlock: {'; '.join(waits)}: post both sides of a message in the same slot")


@dataclass
class _Player:
    """The state of all ranks: where each is, what it has, and the messages posted per ordered pair of ranks."""

    ranks: Sequence[Sequence[Step]]
    num_stages: int
    slots: list[int] = field(init=False)
    posted: list[bool] = field(init=False)
    has: list[set[Action]] = field(init=False)
    sends: dict[tuple[int, int], list[Transfer]] = field(default_factory=lambda: defaultdict(list))
    receives: dict[tuple[int, int], list[Transfer]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.slots = [0] * len(self.ranks)
        self.posted = [False] * len(self.ranks)
        self.has = [set() for _ in self.ranks]

    def advance(self, rank: int) -> set[int]:
        """Moves the rank on until it must wait; returns the ranks that its messages may have woken."""
        woken: set[int] = set()
        while self.slots[rank] < len(self.ranks[rank]):
            step = self.ranks[rank][self.slots[rank]]
            if not self.posted[rank]:
                self._run(rank, step)
                self._post(rank, step)
                self.posted[rank] = True
                woken.update(message.dst if message.src == rank else message.src for message in step.batch)
            if any(self._unmatched(rank, step)):
                break
            self.has[rank].update(message.producer for message in step.batch if message.dst == rank)
            self.slots[rank] += 1
            self.posted[rank] = False
        return woken

    def waiting(self, rank: int) -> str:
        """What the rank waits for, in words."""
        slot = self.slots[rank]
        messages = []
        step = self.ranks[rank][slot]
        for message, lacks in zip(step.batch, self._unmatched(rank, step), strict=True):
            if lacks:
                messages.append(f"to send {message}" if message.src == rank else f"to receive {message}")
        return f"rank {rank}, slot {slot} waits {' and '.join(messages)}"

    def _run(self, rank: int, step: Step) -> None:
        if step.action is None:
            return
        for need in dependencies(step.action, self.num_stages):
            if need not in self.has[rank]:
                raise ValueError(
                    f"rank {rank}, slot {self.slots[rank]}: {step.action} runs before the result of {need} is there: "
                    f"run or receive {need} in an earlier slot"
                )
        self.has[rank].add(step.action)

    def _post(self, rank: int, step: Step) -> None:
        for message in step.batch:
            if rank not in (message.src, message.dst) or message.src == message.dst:
                raise ValueError(f"rank {rank}, slot {self.slots[rank]}: {message} is not a message of this rank")
            if message.src == rank and message.producer not in self.has[rank]:
                raise ValueError(f"rank {rank}, slot {self.slots[rank]}: sends {message} before it is made")
            queues, others = (self.sends, self.receives) if message.src == rank else (self.receives, self.sends)
            queue, other = queues[message.src, message.dst], others[message.src, message.dst]
            queue.append(message)
            if len(other) >= len(queue) and other[len(queue) - 1] != message:
                raise ValueError(
                    f"rank {rank}, slot {self.slots[rank]}: p2p order differs: posts {message}, but message "
                    f"{len(queue) - 1} of rank {message.src} to {message.dst} is {other[len(queue) - 1]} on the other "
                    "side: post the messages of a pair in the same order on both ranks"
                )

    def _unmatched(self, rank: int, step: Step) -> list[bool]:
        """For each message of the rank's posted batch: has the other side not come to it yet?"""
        # The messages of one pair were posted last, so they are the tail of the pair's queue, in batch order.
        lacks: list[bool] = []
        later: dict[tuple[int, int, bool], int] = defaultdict(int)
        for message in reversed(step.batch):
            is_send = message.src == rank
            pair = (message.src, message.dst)
            queue, other = (self.sends, self.receives) if is_send else (self.receives, self.sends)
            index = len(queue[pair]) - 1 - later[pair[0], pair[1], is_send]
            later[pair[0], pair[1], is_send] += 1
            lacks.append(index >= len(other[pair]))
        return lacks[::-1]
