"""The schedules by name, as orders of actions per rank. Stage s lives on rank s % pp.

Shapes for pp = 2, 4 microbatches (forward 0, backward 0'; a, b = first and second chunk of a rank):

    gpipe         0  1  2  3  .  .  0' 1' 2' 3'      all forwards, then all backwards
                  .  0  1  2  3  0' 1' 2' 3' .
    1f1b          0  1  .  0' 2  1' 3  2' .  3'      as few microbatches alive as a full pipe needs
                  .  0  0' 1  1' 2  2' 3  3' .
    interleaved   a0 a1 b0 b1 a2 b0' a3 b1' b2 ...   pp microbatches through each chunk in turn

In all of them a stage runs its backwards in order of the microbatch, so gradients are summed in the same order
whatever the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence

from megallm.pipeline.actions import Action, Kind
from megallm.pipeline.place import place
from megallm.pipeline.schedule import Schedule

SCHEDULE_NAMES: tuple[str, ...] = ("gpipe", "1f1b", "interleaved")


def make_schedule(name: str | None, *, pp: int, virtual_stages: int, num_microbatches: int) -> Schedule:
    """The schedule of this name; None chooses `interleaved` if virtual_stages > 1, else `1f1b`.

    ValueError for an unknown name, for sizes below 1, for 1f1b with virtual stages, and for interleaved with a
    number of microbatches that is not a multiple of pp.
    """
    if name is None:
        name = "interleaved" if virtual_stages > 1 else "1f1b"
    if name == "gpipe":
        return gpipe(pp, num_microbatches, virtual_stages=virtual_stages)
    if name == "interleaved":
        return interleaved(pp, virtual_stages, num_microbatches)
    if name != "1f1b":
        raise ValueError(f"unknown pipeline schedule {name!r}: use one of {', '.join(SCHEDULE_NAMES)}")
    _check_sizes(pp=pp, virtual_stages=virtual_stages, num_microbatches=num_microbatches)
    if virtual_stages > 1:
        raise ValueError(
            f"schedule 1f1b has one stage per rank, but virtual_stages is {virtual_stages}: "
            "use schedule interleaved (or gpipe), or virtual_stages 1"
        )
    return one_f_one_b(pp, num_microbatches)


def gpipe(num_ranks: int, num_microbatches: int, *, virtual_stages: int = 1) -> Schedule:
    """All forwards, then all backwards (arXiv 1811.06965); with virtual stages breadth-first, chunk after chunk.

    Every rank keeps the activations of all microbatches.
    """
    _check_sizes(pp=num_ranks, virtual_stages=virtual_stages, num_microbatches=num_microbatches)
    chunks, microbatches = range(virtual_stages), range(num_microbatches)
    orders = []
    for rank in range(num_ranks):
        forwards = [Action("F", chunk * num_ranks + rank, mb) for chunk in chunks for mb in microbatches]
        backwards = [Action("B", chunk * num_ranks + rank, mb) for chunk in reversed(chunks) for mb in microbatches]
        orders.append(forwards + backwards)
    return _place("gpipe", orders, num_ranks, virtual_stages, num_microbatches)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B (PipeDream-flush, arXiv 2006.09503; SC21 section 2.2.1): one forward, one backward in turn.

    Rank r first runs the pp - r - 1 forwards that fill the pipe behind it, so at most pp - r microbatches are alive.
    """
    _check_sizes(pp=num_ranks, virtual_stages=1, num_microbatches=num_microbatches)
    orders = []
    for rank in range(num_ranks):
        forwards = [Action("F", rank, microbatch) for microbatch in range(num_microbatches)]
        backwards = [Action("B", rank, microbatch) for microbatch in range(num_microbatches)]
        orders.append(_alternate(forwards, backwards, num_warmup=num_ranks - rank - 1))
    return _place("1f1b", orders, num_ranks, 1, num_microbatches)


def interleaved(num_ranks: int, virtual_stages: int, num_microbatches: int) -> Schedule:
    """Megatron's depth-first interleaved 1F1B (SC21, section 2.2.2): num_ranks microbatches pass chunk after chunk.

    Rank r first runs 2 (pp - r - 1) + (v - 1) pp forwards of chunks, then one forward and one backward in turn. With
    one virtual stage there is nothing to interleave and the order is 1F1B's.
    """
    _check_sizes(pp=num_ranks, virtual_stages=virtual_stages, num_microbatches=num_microbatches)
    if num_microbatches % num_ranks:
        below = num_microbatches // num_ranks * num_ranks
        sizes = f"{below} or {below + num_ranks}" if below else str(num_ranks)
        raise ValueError(
            f"schedule interleaved sends microbatches in groups of pp: {num_microbatches} microbatches is not a "
            f"multiple of pp ({num_ranks}): use {sizes} microbatches, or schedule gpipe"
        )
    per_rank = num_microbatches * virtual_stages
    step = 1 if virtual_stages == 1 else 2
    orders = []
    for rank in range(num_ranks):
        forwards = [_depth_first("F", k, rank, num_ranks, virtual_stages) for k in range(per_rank)]
        backwards = [_depth_first("B", k, rank, num_ranks, virtual_stages) for k in range(per_rank)]
        num_warmup = step * (num_ranks - rank - 1) + (virtual_stages - 1) * num_ranks
        orders.append(_alternate(forwards, backwards, num_warmup=num_warmup))
    return _place("interleaved", orders, num_ranks, virtual_stages, num_microbatches)


def forward_only(num_ranks: int, virtual_stages: int, num_microbatches: int) -> Schedule:
    """Every microbatch through all stages, no backward: evaluation and log-probabilities. Breadth-first over chunks."""
    _check_sizes(pp=num_ranks, virtual_stages=virtual_stages, num_microbatches=num_microbatches)
    chunks, microbatches = range(virtual_stages), range(num_microbatches)
    orders = [
        [Action("F", chunk * num_ranks + rank, microbatch) for chunk in chunks for microbatch in microbatches]
        for rank in range(num_ranks)
    ]
    return _place("forward_only", orders, num_ranks, virtual_stages, num_microbatches)


def _depth_first(kind: Kind, index: int, rank: int, num_ranks: int, virtual_stages: int) -> Action:
    """The index-th action of its kind on the rank: a group of num_ranks microbatches passes every chunk in turn."""
    group, within = divmod(index, num_ranks * virtual_stages)
    chunk, offset = divmod(within, num_ranks)
    if kind == "B":
        chunk = virtual_stages - 1 - chunk
    return Action(kind, chunk * num_ranks + rank, group * num_ranks + offset)


def _alternate(forwards: list[Action], backwards: list[Action], *, num_warmup: int) -> list[Action]:
    """num_warmup forwards, then one forward and one backward in turn, then the backwards that are left."""
    num_warmup = min(num_warmup, len(forwards))
    order = forwards[:num_warmup]
    for forward, backward in zip(forwards[num_warmup:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(forwards) - num_warmup :]


def _place(
    name: str, orders: Sequence[Sequence[Action]], num_ranks: int, virtual_stages: int, num_microbatches: int
) -> Schedule:
    stage_to_rank = tuple(stage % num_ranks for stage in range(num_ranks * virtual_stages))
    return place(name, orders, num_microbatches=num_microbatches, stage_to_rank=stage_to_rank)


def _check_sizes(*, pp: int, virtual_stages: int, num_microbatches: int) -> None:
    for size_name, size in (("pp", pp), ("virtual_stages", virtual_stages), ("num_microbatches", num_microbatches)):
        if size < 1:
            raise ValueError(f"{size_name} is {size}: a pipeline needs {size_name} of at least 1")
