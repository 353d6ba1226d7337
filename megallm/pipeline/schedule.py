"""A pipeline schedule as a table: which rank does what in which slot, and the messages at the end of each slot.

          slot   0    1    2    3    4    5
    rank 0      0F0  0F1   .   0B0   .   0B1        0F0 = stage 0, forward, microbatch 0
    rank 1       .   1F0  1B0  1F1  1B1   .

A slot is an order, not a duration: rank and slot say what comes before what; `simulate` puts times on it.

The p2p rule (the runtime executes it, `validate` proves it). At the end of slot k every message produced in slot k
is posted by both sides, sender isend and receiver irecv, and all messages of one rank in one slot are one batch.
Receives are waited for only when the consuming action runs. A result for a stage on the same rank is handed over
locally. NCCL ignores tags and matches messages per ordered pair of ranks in the order of posting; here a rank runs at
most one action in a slot, so an ordered pair exchanges at most one message in a slot, and both sides post in slot
order: sends and receives agree whatever the schedule, also where the next rank is the previous rank (pp = 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megallm.pipeline.actions import Action, Transfer, consumer


@dataclass(frozen=True)
class Schedule:
    """Who does what when. Plain data: build it with `make_schedule` or `place`, check it with `validate`."""

    name: str
    num_microbatches: int
    stage_to_rank: tuple[int, ...]
    """Pipeline rank of every stage."""
    grid: tuple[tuple[Action | None, ...], ...]
    """[pp_rank][slot]; None is an idle slot."""

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks (pp)."""
        return len(self.grid)

    @property
    def num_stages(self) -> int:
        """Stages of the whole model: pp * virtual_stages."""
        return len(self.stage_to_rank)

    @property
    def num_slots(self) -> int:
        """Columns of the grid."""
        return len(self.grid[0]) if self.grid else 0

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that live on this rank, in model order; the position of a stage here is its chunk."""
        return self._stages_of_ranks[rank]

    def actions_of(self, rank: int) -> tuple[Action, ...]:
        """The rank's actions in order, without the idle slots."""
        return tuple(action for action in self.grid[rank] if action is not None)

    def consumer(self, action: Action) -> Action | None:
        """The action that takes this one's result as input: on the same rank (hand-over), on another, or None."""
        return consumer(action, self.num_stages)

    def transfers(self, rank: int, slot: int) -> tuple[Transfer, ...]:
        """The batch that this rank posts at the end of this slot: its sends (src == rank) and receives (dst == rank).

        In order of the sending rank, which is the same order on every rank. A lookup in a table made once.
        """
        return self._transfer_table[rank][slot]

    @cached_property
    def _stages_of_ranks(self) -> tuple[tuple[int, ...], ...]:
        stages: list[list[int]] = [[] for _ in range(self.num_ranks)]
        for stage, rank in enumerate(self.stage_to_rank):
            stages[rank].append(stage)
        return tuple(tuple(row) for row in stages)

    @cached_property
    def _transfer_table(self) -> tuple[tuple[tuple[Transfer, ...], ...], ...]:
        table: list[list[tuple[Transfer, ...]]] = [[()] * self.num_slots for _ in range(self.num_ranks)]
        for slot in range(self.num_slots):
            for rank in range(self.num_ranks):
                transfer = self._produced(rank, self.grid[rank][slot])
                if transfer is not None:
                    table[transfer.src][slot] += (transfer,)
                    table[transfer.dst][slot] += (transfer,)
        return tuple(tuple(row) for row in table)

    def _produced(self, rank: int, action: Action | None) -> Transfer | None:
        taker = None if action is None else self.consumer(action)
        if action is None or taker is None or self.stage_to_rank[taker.stage] == rank:
            return None
        return Transfer(
            action.kind, action.stage, taker.stage, action.microbatch, rank, self.stage_to_rank[taker.stage]
        )
