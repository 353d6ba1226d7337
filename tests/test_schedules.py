"""Pipeline schedules: what each rank runs, in which order, what it sends, how long it idles, what it holds."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
from watching import calls_made

from megallm.pipeline.actions import Action, Transfer
from megallm.pipeline.formulas import bubble_formula, peak_live_formula
from megallm.pipeline.generators import SCHEDULE_NAMES, gpipe, interleaved, make_schedule, one_f_one_b
from megallm.pipeline.place import place
from megallm.pipeline.rendezvous import Step, play
from megallm.pipeline.schedule import Schedule
from megallm.pipeline.simulate import simulate
from megallm.pipeline.validate import validate

SIZES = [  # name, pp, virtual stages, microbatches
    *(("gpipe", p, v, m) for p in (1, 2, 3, 4, 7) for v in (1, 2, 3) for m in (1, 2, 3, 5, 8)),
    *(("1f1b", p, 1, m) for p in (1, 2, 3, 4, 7) for m in (1, 2, 3, 5, 8, 13)),
    *(("interleaved", p, v, g * p) for p in (1, 2, 3, 4, 7) for v in (1, 2, 3, 4) for g in (1, 2, 3)),
]
TIMES = [(1.0, 2.0), (1.0, 1.0), (3.0, 4.0), (2.0, 1.0)]


def build(size: tuple[str, int, int, int]) -> Schedule:
    name, pp, virtual_stages, num_microbatches = size
    return make_schedule(name, pp=pp, virtual_stages=virtual_stages, num_microbatches=num_microbatches)


def actions(text: str) -> list[Action]:
    return [Action.parse(word) for word in text.split()]


def changed(schedule: Schedule, cells: dict[tuple[int, int], str | None]) -> Schedule:
    """The schedule with the cells {(rank, slot): action} written over."""
    grid = [list(row) for row in schedule.grid]
    for (rank, slot), text in cells.items():
        grid[rank][slot] = None if text is None else Action.parse(text)
    return replace(schedule, grid=tuple(tuple(row) for row in grid))


def cell_of(schedule: Schedule, text: str) -> tuple[int, int]:
    action = Action.parse(text)
    rank = schedule.stage_to_rank[action.stage]
    return rank, schedule.grid[rank].index(action)


# Actions


def test_action_text_reads_back() -> None:
    for action in (Action("F", 2, 0), Action("B", 13, 127)):
        assert Action.parse(str(action)) == action
    assert str(Action("F", 2, 0)) == "2F0"


@pytest.mark.parametrize("text", ["", "F0", "2F", "2X0", "2F0 1", "-1F0", "2f0"])
def test_action_parse_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError, match="not a pipeline action"):
        Action.parse(text)


# Generators


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_generated_schedule_is_valid(size: tuple[str, int, int, int]) -> None:
    schedule = build(size)
    validate(schedule)
    assert schedule.num_ranks == size[1]
    assert schedule.num_stages == size[1] * size[2]
    assert schedule.stage_to_rank == tuple(stage % size[1] for stage in range(schedule.num_stages))


def test_1f1b_runs_the_order_of_the_paper() -> None:
    schedule = one_f_one_b(3, 4)
    assert list(schedule.actions_of(0)) == actions("0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3")
    assert list(schedule.actions_of(1)) == actions("1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3")
    assert list(schedule.actions_of(2)) == actions("2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3")


def test_interleaved_runs_megatrons_order() -> None:
    schedule = interleaved(2, 2, 4)
    assert list(schedule.actions_of(0)) == actions("0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3")
    assert list(schedule.actions_of(1)) == actions("1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3")


def test_gpipe_with_virtual_stages_is_breadth_first() -> None:
    assert list(gpipe(2, 3, virtual_stages=2).actions_of(1)) == actions(
        "1F0 1F1 1F2 3F0 3F1 3F2 3B0 3B1 3B2 1B0 1B1 1B2"
    )


def test_interleaved_with_one_virtual_stage_is_1f1b() -> None:
    assert interleaved(4, 1, 8).grid == one_f_one_b(4, 8).grid


def test_every_stage_runs_backwards_in_order_of_microbatch() -> None:
    """So gradients are summed in the same order whatever the schedule."""
    for size in SIZES:
        schedule = build(size)
        for rank in range(schedule.num_ranks):
            for stage in schedule.stages_of(rank):
                done = [a.microbatch for a in schedule.actions_of(rank) if (a.kind, a.stage) == ("B", stage)]
                assert done == list(range(schedule.num_microbatches)), size


def test_auto_schedule_follows_virtual_stages() -> None:
    assert make_schedule(None, pp=2, virtual_stages=1, num_microbatches=2).name == "1f1b"
    assert make_schedule(None, pp=2, virtual_stages=2, num_microbatches=2).name == "interleaved"


@pytest.mark.parametrize(
    ("name", "pp", "virtual_stages", "num_microbatches", "words"),
    [
        ("zigzag", 2, 1, 4, "gpipe, 1f1b, interleaved"),
        ("1f1b", 2, 2, 4, "virtual_stages is 2"),
        ("interleaved", 4, 2, 10, "10 microbatches is not a multiple of pp .4.: use 8 or 12"),
        ("interleaved", 4, 2, 3, "use 4 microbatches"),
        ("gpipe", 0, 1, 4, "pp is 0"),
        ("1f1b", 2, 0, 4, "virtual_stages is 0"),
        ("interleaved", 2, 2, 0, "num_microbatches is 0"),
    ],
)
def test_sizes_that_cannot_be_scheduled_are_refused(
    name: str, pp: int, virtual_stages: int, num_microbatches: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        make_schedule(name, pp=pp, virtual_stages=virtual_stages, num_microbatches=num_microbatches)


def test_orders_that_wait_for_each_other_are_refused() -> None:
    orders = [actions("0F0 0B0"), actions("1B0 1F0")]
    with pytest.raises(ValueError, match="deadlocks: rank 0 at 0B0 waits for 1B0; rank 1 at 1B0 waits for 1F0"):
        place("crossed", orders, num_microbatches=1, stage_to_rank=(0, 1))


def test_placement_takes_other_stage_layouts() -> None:
    """A V-shaped layout: rank 0 has the first and the last stage, rank 1 both middle ones."""
    orders = [actions("0F0 3F0 3B0 0B0"), actions("1F0 2F0 2B0 1B0")]
    schedule = place("v", orders, num_microbatches=1, stage_to_rank=(0, 1, 1, 0))
    validate(schedule)
    assert schedule.stages_of(0) == (0, 3)
    assert sum(message.src == 0 for slot in range(schedule.num_slots) for message in schedule.transfers(0, slot)) == 2


# Messages


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_messages_cross_ranks_once_and_meet_in_order(size: tuple[str, int, int, int]) -> None:
    schedule = build(size)
    sends: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
    receives: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
    for slot in range(schedule.num_slots):
        in_slot = []
        for rank in range(schedule.num_ranks):
            batch = schedule.transfers(rank, slot)
            for message in batch:
                assert message.src != message.dst
                assert rank in (message.src, message.dst)
                if message.src == rank:
                    assert schedule.grid[rank][slot] == message.producer
                    assert schedule.consumer(message.producer) == message.consumer
                    in_slot.append((message.src, message.dst))
                (sends if message.src == rank else receives)[message.src, message.dst].append(message)
        assert len(in_slot) == len(set(in_slot))  # at most one message of an ordered pair in a slot
    assert sends == receives
    hops = schedule.num_stages - 1 if schedule.num_ranks > 1 else 0
    assert sum(len(queue) for queue in sends.values()) == 2 * hops * schedule.num_microbatches


def test_one_rank_sends_nothing() -> None:
    schedule = interleaved(1, 3, 2)
    assert all(schedule.transfers(0, slot) == () for slot in range(schedule.num_slots))


def test_pp2_with_2_virtual_stages_keeps_both_directions_apart() -> None:
    """The next rank is the previous rank: between the two ranks run activations and gradients, both ways."""
    schedule = interleaved(2, 2, 2)
    for slot in range(schedule.num_slots):
        assert schedule.transfers(0, slot) == schedule.transfers(1, slot)
    queues: dict[tuple[int, int], list[str]] = defaultdict(list)
    for slot in range(schedule.num_slots):
        for message in schedule.transfers(0, slot):
            queues[message.src, message.dst].append(f"{message.producer}->{message.consumer}")
    assert queues[0, 1] == ["0F0->1F0", "0F1->1F1", "2F0->3F0", "2F1->3F1", "2B0->1B0", "2B1->1B1"]
    assert queues[1, 0] == ["1F0->2F0", "1F1->2F1", "3B0->2B0", "3B1->2B1", "1B0->0B0", "1B1->0B1"]
    # In the steady state an activation of one chunk and a gradient of the other cross in one batch.
    longer = interleaved(2, 2, 4)
    kinds = {tuple(str(m.producer) for m in longer.transfers(0, slot)) for slot in range(longer.num_slots)}
    assert ("0F2", "3B0") in kinds or ("0F3", "3B0") in kinds or ("0F2", "3B1") in kinds


class _ActivationsFirst(Schedule):
    """Breaks the rule as unordered neighbours do: rank 1 receives a slot later whatever comes from its "next" rank."""

    def transfers(self, rank: int, slot: int) -> tuple[Transfer, ...]:
        if rank == 0:
            return super().transfers(rank, slot)
        here = [m for m in super().transfers(1, slot) if (m.src, m.kind) != (0, "B")]
        late = [m for m in super().transfers(1, slot - 1) if (m.src, m.kind) == (0, "B")] if slot else []
        return tuple(here + late)


def test_messages_in_another_order_on_the_other_side_are_refused() -> None:
    good = interleaved(2, 2, 4)
    swapped = _ActivationsFirst(good.name, good.num_microbatches, good.stage_to_rank, good.grid)
    with pytest.raises(ValueError, match="rank 0, slot 5: p2p order differs: it sends 2B0->1B0"):
        validate(swapped)


def test_a_message_without_its_other_side_is_refused() -> None:
    class Deaf(Schedule):
        def transfers(self, rank: int, slot: int) -> tuple[Transfer, ...]:
            return tuple(m for m in super().transfers(rank, slot) if m.src == rank)

    good = one_f_one_b(2, 2)
    with pytest.raises(ValueError, match="rank 0 sends 2 messages to rank 1, which receives 0"):
        validate(Deaf(good.name, good.num_microbatches, good.stage_to_rank, good.grid))


# Validator


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"1B2": None}, "rank 1: 1B2 is missing"),
        ({"0F2": "0F1"}, "rank 0, slot 4: 0F1 runs twice, first in slot 1"),
        ({"1F0": "0F0"}, "rank 1, slot 1: 0F0 is on the wrong rank: stage 0 lives on rank 0"),
        ({"1F0": "1F2", "1F2": "1F0"}, "rank 1, slot 1: 1F2 needs 0F2"),
        ({"0B0": "0B1", "0B1": "0B0"}, "rank 0, slot .: 0B1 needs 1B1"),
        ({"1B0": "1F0", "1F0": "1B0"}, "rank 1, slot 1: 1B0 needs 1F0"),
        ({"0F0": "5F0"}, "rank 0, slot 0: 5F0 does not exist with 2 stages"),
        ({"0F0": "0F9"}, "rank 0, slot 0: 0F9 does not exist with 3 microbatches"),
    ],
)
def test_broken_schedules_are_refused_by_rank_and_slot(cells: dict[str, str | None], words: str) -> None:
    good = one_f_one_b(2, 3)
    validate(good)
    with pytest.raises(ValueError, match=words):
        validate(changed(good, {cell_of(good, old): new for old, new in cells.items()}))


def test_a_dependency_in_the_same_slot_is_refused() -> None:
    row0, row1 = actions("0F0 0B0"), actions("1F0 1B0")
    schedule = Schedule("tight", 1, (0, 1), ((row0[0], None, row0[1]), (row1[0], row1[1], None)))
    with pytest.raises(ValueError, match="rank 1, slot 0: 1F0 needs 0F0, which runs on rank 0 in slot 0"):
        validate(schedule)
    late = Schedule("tight", 1, (0, 1), ((row0[0], None, row0[1]), (None, row1[0], row1[1])))
    with pytest.raises(ValueError, match="rank 0, slot 2: 0B0 needs 1B0, which runs on rank 1 in slot 2"):
        validate(late)


def test_malformed_tables_are_refused() -> None:
    good = one_f_one_b(2, 2)
    with pytest.raises(ValueError, match="rank 1 has"):
        validate(replace(good, grid=(good.grid[0], good.grid[1][:-1])))
    with pytest.raises(ValueError, match="stage 1 is on rank 2"):
        validate(replace(good, stage_to_rank=(0, 2)))
    with pytest.raises(ValueError, match="is empty"):
        validate(replace(good, grid=()))


FORWARD = Transfer("F", 0, 1, 0, 0, 1)
NEXT_FORWARD = Transfer("F", 0, 1, 1, 0, 1)
BACK = Transfer("B", 1, 0, 0, 1, 0)


def test_rendezvous_refuses_ranks_that_both_send_first() -> None:
    """Two sends that each wait for their receive: fine with buffers, a hang with NCCL."""
    start = [Step(Action("F", 0, 0), (FORWARD,)), Step(Action("F", 0, 1), ())]
    other = [Step(None, (FORWARD,)), Step(Action("F", 1, 0)), Step(Action("B", 1, 0))]
    sends_first = [[*start, Step(None, (NEXT_FORWARD,)), Step(None, (BACK,))], [*other, Step(None, (BACK,))]]
    sends_first[1].append(Step(None, (NEXT_FORWARD,)))
    with pytest.raises(
        ValueError, match="deadlock: rank 0, slot 2 waits to send 0F1.*rank 1, slot 3 waits to send 1B0"
    ):
        play(sends_first, num_stages=2)
    in_one_batch = [[*start, Step(None, (NEXT_FORWARD, BACK))], [*other, Step(None, (BACK, NEXT_FORWARD))]]
    play(in_one_batch, num_stages=2)


def test_rendezvous_refuses_a_message_that_never_comes() -> None:
    ranks = [[Step(Action("F", 0, 0))], [Step(None, (FORWARD,)), Step(Action("F", 1, 0))]]
    with pytest.raises(ValueError, match="deadlock: rank 1, slot 0 waits to receive 0F0->1F0"):
        play(ranks, num_stages=2)


def test_rendezvous_refuses_a_send_that_meets_another_receive() -> None:
    made = [Step(Action("F", 0, 0)), Step(Action("F", 0, 1))]
    ranks = [[*made, Step(None, (FORWARD, NEXT_FORWARD))], [Step(None, (NEXT_FORWARD, FORWARD))]]
    with pytest.raises(ValueError, match="p2p order differs"):
        play(ranks, num_stages=2)


def test_rendezvous_refuses_what_is_not_there_yet() -> None:
    with pytest.raises(ValueError, match="rank 1, slot 0: 1F0 runs before the result of 0F0 is there"):
        play([[Step(Action("F", 0, 0), (FORWARD,))], [Step(Action("F", 1, 0), (FORWARD,))]], num_stages=2)
    with pytest.raises(ValueError, match="rank 0, slot 0: sends 0F0->1F0 .* before it is made"):
        play([[Step(None, (FORWARD,)), Step(Action("F", 0, 0))], [Step(None, (FORWARD,))]], num_stages=2)


def test_the_work_of_build_and_validate_grows_with_the_actions_alone() -> None:
    """pp 16, 4 virtual stages: twice the microbatches, twice the work."""
    small = calls_made(lambda: validate(interleaved(16, 4, 32)))
    large = calls_made(lambda: validate(interleaved(16, 4, 64)))
    assert large < 2.2 * small
    validate(interleaved(16, 4, 128))


# Simulation


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bubble_and_live_activations_equal_the_formulas(size: tuple[str, int, int, int]) -> None:
    name, pp, v, m = size
    schedule = build(size)
    sizes = {"pp": pp, "virtual_stages": v, "num_microbatches": m}
    for forward_time, backward_time in TIMES:
        simulation = simulate(schedule, forward_time=forward_time, backward_time=backward_time)
        assert simulation.bubble == bubble_formula(name, **sizes)
        assert all(bubble == simulation.bubble for bubble in simulation.bubble_per_rank)
        assert simulation.busy == (m * (forward_time + backward_time),) * pp
    assert simulation.peak_live_chunks == tuple(peak_live_formula(name, **sizes, rank=rank) for rank in range(pp))


def test_bubbles_are_those_of_the_papers() -> None:
    for p, v, m in ((2, 2, 2), (4, 2, 8), (4, 3, 12), (8, 4, 16)):
        assert simulate(gpipe(p, m)).bubble == (p - 1) / m
        assert simulate(one_f_one_b(p, m)).bubble == (p - 1) / m
        assert simulate(interleaved(p, v, m)).bubble == (p - 1) / (v * m)


def test_live_activations_are_those_of_the_papers() -> None:
    for p, v, m in ((2, 2, 6), (4, 2, 8), (4, 3, 12), (8, 4, 16)):
        assert simulate(gpipe(p, m)).peak_live_microbatches == (float(m),) * p
        assert simulate(one_f_one_b(p, m)).peak_live_microbatches == tuple(float(min(p - r, m)) for r in range(p))
        first = simulate(interleaved(p, v, m)).peak_live_microbatches[0]
        assert first == pytest.approx(p * (1 + (p - 1) / (p * v)), rel=1e-15)


def test_timeline_keeps_order_and_adds_up() -> None:
    simulation = simulate(interleaved(3, 2, 6), forward_time=2.0, backward_time=3.0, p2p_time=0.25)
    ends: dict[Action, float] = {}
    for span in simulation.timeline:
        assert span.end - span.start == (1.0 if span.action.kind == "F" else 1.5)
        ends[span.action] = span.end
    for span in simulation.timeline:
        stage, microbatch = span.action.stage, span.action.microbatch
        if span.action.kind == "F" and stage > 0:
            assert span.start >= ends[Action("F", stage - 1, microbatch)] + 0.25
        if span.action.kind == "B" and stage < 5:
            assert span.start >= ends[Action("B", stage + 1, microbatch)] + 0.25
    assert simulation.total_time == max(ends.values())


def test_batched_messages_never_arrive_sooner() -> None:
    for size in (("gpipe", 3, 2, 5), ("1f1b", 4, 1, 8), ("interleaved", 4, 2, 8), ("interleaved", 2, 2, 4)):
        schedule = build(size)
        loose, batched = (simulate(schedule, p2p_time=0.1, batched_p2p=flag) for flag in (False, True))
        assert batched.total_time >= loose.total_time > simulate(schedule).total_time


def test_1f1b_loses_nothing_to_batches() -> None:
    for p, m in ((2, 4), (4, 8), (7, 13)):
        assert simulate(one_f_one_b(p, m), batched_p2p=True).bubble == (p - 1) / m


def test_times_that_are_no_times_are_refused() -> None:
    schedule = one_f_one_b(2, 2)
    with pytest.raises(ValueError, match="backward_time is -1"):
        simulate(schedule, backward_time=-1.0)
    with pytest.raises(ValueError, match="both 0"):
        simulate(schedule, forward_time=0.0, backward_time=0.0)


def test_every_schedule_name_can_be_made() -> None:
    assert {make_schedule(name, pp=2, virtual_stages=1, num_microbatches=2).name for name in SCHEDULE_NAMES} == set(
        SCHEDULE_NAMES
    )
