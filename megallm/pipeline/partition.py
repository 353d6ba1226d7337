"""Which transformer layers each pipeline stage holds.

The embedding lives on the first stage and the final norm and head on the last, so they count as layers' worth of work:

    8 layers, 4 stages, embedding and head as one layer each:   [E 0 1] [2 3] [4 5] [6 7 H]   cost 3 2 2 3
"""

from __future__ import annotations

import math
from itertools import accumulate


def partition_layers(
    num_layers: int,
    num_stages: int,
    *,
    embedding_cost: float = 1.0,
    head_cost: float = 1.0,
    explicit: tuple[int, ...] | None = None,
) -> tuple[range, ...]:
    """The layers of each stage, contiguous and in order, with the smallest possible maximum stage cost.

    A stage costs its number of layers, plus embedding_cost on the first and head_cost on the last stage (in layers'
    worth). Any number of layers goes, even or not. Among the partitions with the smallest maximum, the costs are as
    equal as possible (least sum of squares), then the numbers of layers, and what remains goes to the latest stages,
    since early stages hold the most live microbatches.

    Chosen automatically, every stage holds at least one layer. `explicit` gives the layers of each stage instead; there
    the first and the last stage may hold none (an embedding or a head on its own), middle stages may not.

    ValueError if there are more stages than layers, if a cost is negative or not finite, or if `explicit` has the wrong
    length or sum or an empty middle stage.
    """
    if num_layers < 1 or num_stages < 1:
        raise ValueError(f"num_layers ({num_layers}) and num_stages ({num_stages}) must both be at least 1")
    for name, cost in (("embedding_cost", embedding_cost), ("head_cost", head_cost)):
        if not (math.isfinite(cost) and cost >= 0):
            raise ValueError(f"{name} is {cost}: give a cost of 0 or more, in layers' worth of work")
    if explicit is not None:
        counts = _checked(explicit, num_layers, num_stages)
    else:
        counts = _balanced(num_layers, num_stages, embedding_cost, head_cost)
    ends = list(accumulate(counts))
    return tuple(range(end - count, end) for count, end in zip(counts, ends, strict=True))


def _balanced(num_layers: int, num_stages: int, embedding_cost: float, head_cost: float) -> tuple[int, ...]:
    """One layer each, then each further layer to the cheapest stage.

    Giving every unit to the cheapest place is optimal for the maximum and for every sum of one convex function of the
    costs (Ibaraki and Katoh, Resource Allocation Problems, 1988, section 4.2).
    """
    if num_stages > num_layers:
        raise ValueError(
            f"pp * virtual_stages ({num_stages} stages) is more than num_hidden_layers ({num_layers}): every stage "
            f"needs a layer: use pp * virtual_stages of 1 to {num_layers}, or pipeline_partition with an empty "
            "first or last stage"
        )
    counts = [1] * num_stages
    extra = [0.0] * num_stages
    extra[0] += embedding_cost
    extra[-1] += head_cost
    for _ in range(num_layers - num_stages):
        cheapest = min(range(num_stages), key=lambda stage: (counts[stage] + extra[stage], counts[stage], -stage))
        counts[cheapest] += 1
    return tuple(counts)


def _checked(explicit: tuple[int, ...], num_layers: int, num_stages: int) -> tuple[int, ...]:
    text = ", ".join(str(count) for count in explicit)
    if len(explicit) != num_stages:
        raise ValueError(
            f"pipeline_partition ({text}) has {len(explicit)} entries, but there are {num_stages} stages: "
            "give one number of layers for each of the pp * virtual_stages stages"
        )
    for stage, count in enumerate(explicit):
        is_end = stage in (0, num_stages - 1)
        if count < 0 or (count == 0 and not is_end):
            raise ValueError(
                f"pipeline_partition ({text}) gives stage {stage} {count} layers: middle stages need at least 1, "
                "the first and the last at least 0"
            )
    if sum(explicit) != num_layers:
        raise ValueError(
            f"pipeline_partition ({text}) sums to {sum(explicit)}, but num_hidden_layers is {num_layers}: "
            "the numbers must add up to all layers"
        )
    return explicit
