"""Buckets that are in memory whole for a while: gradients at ZeRO stages 2 and 3, parameters at stage 3.

Found by going through a step's schedule unit by unit, gathering and reducing as optim/residency.py and
optim/gradients.py do.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence

from megallm.optim.layout import Bucket
from megallm.pipeline.schedule import Schedule
from megallm.planner.parameters import LocalParameter, Units

REDUCTIONS_UNDER_WAY = 2
"""What optim/gradients.py allows before it waits for the oldest."""


def most_whole_bytes(
    units: Units,
    buckets: Sequence[Bucket],
    schedule: Schedule,
    *,
    pp_rank: int,
    zero: int,
    zero_keep: bool,
    parameter_bytes: int,
    gradient_bytes: int,
) -> int:
    """Most bytes of whole buckets at once on a pipeline rank, at a ZeRO stage; 0 below stage 2."""
    if zero < 2:
        return 0
    step = _Step(units, buckets, gathers=zero == 3, keeps=zero_keep)
    most = 0
    for action in schedule.actions_of(pp_rank)[: 8 * schedule.num_stages]:  # after that they repeat themselves
        for _ in step.forward(action.stage) if action.kind == "F" else step.backward(action.stage):
            gathered, summed = (sum(buckets[i].numel for i in found) for found in (step.gathered, step.summed))
            most = max(most, parameter_bytes * gathered + gradient_bytes * summed)
    return most


class _Step:
    """Which buckets are whole, from moment to moment: each turn of `forward` and `backward` is one."""

    def __init__(self, units: Units, buckets: Sequence[Bucket], *, gathers: bool, keeps: bool) -> None:
        self._gathers, self._keeps = gathers, keeps
        bucket_of = {slot.name: i for i, bucket in enumerate(buckets) for slot in bucket.slots}
        self._fed = {unit: [bucket_of[each.name] for each in _forward_order(needed)] for unit, needed in units.items()}
        self._sums = {
            unit: [bucket_of[each.name] for each in _forward_order(needed) if each.is_trained]
            for unit, needed in units.items()
        }
        uses = {each.name: each.uses for needed in units.values() for each in needed}
        self._contributions = [sum(uses[slot.name] for slot in bucket.slots) for bucket in buckets]
        self._awaited = list(self._contributions)
        self._in_flight: deque[int] = deque()
        self._pending: set[int] = set()
        """Of those in flight, the ones that nobody had to wait for yet."""
        self._heads: Counter[str] = Counter()
        self.gathered: set[int] = set()
        """Buckets of parameters."""
        self.summed: set[int] = set()
        """Buckets of gradients, from the first contribution to the end of the reduction."""

    def forward(self, stage: int) -> Iterator[None]:
        names = self._of_stage(stage)
        for i, unit in enumerate(names):
            if unit.endswith(".head"):
                self._heads[unit] += 1
            self._bring(names[i : i + 2])
            yield

    def backward(self, stage: int) -> Iterator[None]:
        names = self._of_stage(stage)
        for i, unit in reversed(list(enumerate(names))):
            if unit.split(".")[1].isdigit():
                if i + 1 < len(names) and names[i + 1].endswith(".head"):
                    self._heads[names[i + 1]] -= 1
                before = names[i - 1 : i] if i else []
                self._bring([unit, *(each for each in before if not each.endswith(".embed"))])
                yield
            for bucket in reversed(self._sums[unit]):
                self._contribute(bucket)
                yield
                self._wait_for_the_oldest()

    def _of_stage(self, stage: int) -> list[str]:
        return [unit for unit in self._fed if unit.split(".")[0] == str(stage)]

    def _bring(self, names: Sequence[str]) -> None:
        if not self._gathers:
            return
        wanted = {i for unit in names for i in self._fed[unit]}
        if not self._keeps:
            self.gathered &= wanted | {i for unit, count in self._heads.items() if count for i in self._fed[unit]}
        self.gathered |= wanted

    def _contribute(self, bucket: int) -> None:
        self._pending.discard(bucket)
        self.summed.add(bucket)
        self._awaited[bucket] -= 1
        if self._awaited[bucket] == 0:
            self._awaited[bucket] = self._contributions[bucket]
            self._pending.add(bucket)
            self._in_flight.append(bucket)

    def _wait_for_the_oldest(self) -> None:
        if len(self._in_flight) > REDUCTIONS_UNDER_WAY:
            oldest = self._in_flight.popleft()
            if oldest in self._pending:
                self._pending.discard(oldest)
                self.summed.discard(oldest)


def _forward_order(needed: Sequence[LocalParameter]) -> list[LocalParameter]:
    """As they are used: the norms of q and k, which a module names first, come after the projection."""
    norms = [each for each in needed if each.name.endswith((".q_norm", ".k_norm"))]
    found: list[LocalParameter] = []
    for each in needed:
        if each not in norms:
            if each.name.endswith(".o_proj.weight"):
                found += norms
            found.append(each)
    return found
