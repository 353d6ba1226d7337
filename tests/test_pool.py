"""The pool of ranks: what it returns, and how it reports ranks that raise, die or hang."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from watching import lives, wait_until

from megallm.testing.pool import RankError, run_ranks

WORLD = 3


def describe(rank: int, world_size: int, *, base: int) -> tuple[int, int, int]:
    return rank, world_size, base + rank


def sum_of_ranks(rank: int, world_size: int) -> torch.Tensor:
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    return total


def process_id(rank: int, world_size: int) -> int:
    return os.getpid()


def draw(rank: int, world_size: int) -> float:
    return torch.rand(()).item()


def group_count(rank: int, world_size: int) -> tuple[int, int]:
    before = len(dist.distributed_c10d._world.pg_map)
    dist.all_reduce(torch.ones(1), group=dist.new_group(list(range(world_size))))
    return before, torch.get_num_threads()


def raise_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("five heads on four ranks")
    dist.all_reduce(torch.ones(1))


def die_on_rank_2(rank: int, world_size: int) -> None:
    if rank == 2:
        os._exit(7)
    dist.all_reduce(torch.ones(1))


def skip_a_collective_on_rank_0(rank: int, world_size: int) -> None:
    if rank > 0:
        dist.all_reduce(torch.ones(1))


def test_results_come_in_order_of_rank() -> None:
    assert run_ranks(describe, WORLD, base=10) == [(0, 3, 10), (1, 3, 11), (2, 3, 12)]


def test_ranks_share_a_process_group() -> None:
    assert [each.item() for each in run_ranks(sum_of_ranks, WORLD)] == [3.0, 3.0, 3.0]


def test_a_pool_of_one_rank_has_no_process_group() -> None:
    assert run_ranks(has_group, 1) == [False]


def has_group(rank: int, world_size: int) -> bool:
    return dist.is_initialized()


def test_processes_are_kept_warm_between_calls() -> None:
    assert run_ranks(process_id, WORLD) == run_ranks(process_id, WORLD)


def test_every_call_starts_from_the_same_seed() -> None:
    assert run_ranks(draw, WORLD) == run_ranks(draw, WORLD)


def test_groups_of_one_call_are_gone_in_the_next() -> None:
    run_ranks(group_count, WORLD)
    assert run_ranks(group_count, WORLD) == [(1, 1)] * WORLD


def test_the_first_error_is_raised_with_its_traceback_and_the_next_call_works() -> None:
    with pytest.raises(RankError, match="five heads on four ranks") as caught:
        run_ranks(raise_on_rank_1, WORLD)
    assert caught.value.rank == 1
    assert "in raise_on_rank_1" in str(caught.value)
    assert "all_reduce" not in str(caught.value)
    assert len(run_ranks(draw, WORLD)) == WORLD


def test_a_dead_rank_is_named() -> None:
    with pytest.raises(RankError, match=r"rank 2 of 3 died in die_on_rank_2 \(exit code 7\)") as caught:
        run_ranks(die_on_rank_2, WORLD)
    assert caught.value.rank == 2


def test_a_hang_is_ended_with_the_stacks_of_the_waiting_ranks() -> None:
    begin = time.monotonic()
    with pytest.raises(RankError, match="did not finish") as caught:
        run_ranks(skip_a_collective_on_rank_0, WORLD, timeout=1.0)
    assert str(caught.value).count("in skip_a_collective_on_rank_0") == 2
    assert time.monotonic() - begin < 600.0  # the ranks themselves would wait for half an hour


def test_a_local_function_is_refused() -> None:
    with pytest.raises(ValueError, match="define it at the top"):
        run_ranks(lambda rank, world_size: rank, WORLD)


def test_ranks_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "victim.py").write_text(
        textwrap.dedent("""
            import os, sys, time

            def report(rank, world_size, folder):
                with open(os.path.join(folder, f"pid-{rank}"), "w") as file:
                    file.write(str(os.getpid()))
                time.sleep(60)
        """)
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    code += "import victim; from megallm.testing.pool import run_ranks\n"
    code += f"run_ranks(victim.report, 2, {str(tmp_path)!r})"
    parent = subprocess.Popen([sys.executable, "-c", code])
    files = [tmp_path / "pid-0", tmp_path / "pid-1"]
    try:
        wait_until(lambda: all(file.exists() and file.read_text() for file in files), 60.0)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(lives(int(file.read_text())) for file in files), 50.0)
