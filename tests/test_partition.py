"""Layers of each pipeline stage: balanced, contiguous, or as asked."""

from __future__ import annotations

from itertools import product

import pytest

from megallm.pipeline.partition import partition_layers


def counts(*args: int, **kwargs: object) -> tuple[int, ...]:
    return tuple(len(layers) for layers in partition_layers(*args, **kwargs))  # type: ignore[arg-type]


def costs(numbers: tuple[int, ...], embedding_cost: float, head_cost: float) -> list[float]:
    result = [float(number) for number in numbers]
    result[0] += embedding_cost
    result[-1] += head_cost
    return result


@pytest.mark.parametrize(("num_layers", "num_stages"), [(1, 1), (3, 2), (7, 3), (8, 8), (13, 5), (32, 4)])
def test_partition_is_contiguous_and_complete(num_layers: int, num_stages: int) -> None:
    stages = partition_layers(num_layers, num_stages)
    assert [layer for layers in stages for layer in layers] == list(range(num_layers))
    assert len(stages) == num_stages
    assert all(len(layers) >= 1 for layers in stages)


def test_partition_is_the_best_of_all() -> None:
    """Every composition of the layers is tried: no smaller maximum, and no smaller sum of squares beside it."""
    for num_layers, num_stages in product(range(1, 9), range(1, 5)):
        if num_stages > num_layers:
            continue
        everything = [c for c in product(range(1, num_layers + 1), repeat=num_stages) if sum(c) == num_layers]
        for ends in ((0.0, 0.0), (1.0, 1.0), (0.5, 1.7), (3.0, 0.0), (0.0, 2.5)):
            ranked = [(max(costs(c, *ends)), sum(x * x for x in costs(c, *ends))) for c in everything]
            chosen = counts(num_layers, num_stages, embedding_cost=ends[0], head_cost=ends[1])
            mine = (max(costs(chosen, *ends)), sum(x * x for x in costs(chosen, *ends)))
            assert mine == pytest.approx(min(ranked)), (num_layers, num_stages, ends, chosen)


def test_natural_partitions() -> None:
    assert counts(8, 4, embedding_cost=0.0, head_cost=0.0) == (2, 2, 2, 2)
    assert counts(8, 4) == (2, 2, 2, 2)
    assert counts(32, 4) == (8, 8, 8, 8)
    assert counts(10, 4) == (2, 3, 3, 2)
    assert counts(3, 2) == (1, 2)  # the odd layer goes where fewer microbatches are alive
    assert counts(7, 3, embedding_cost=0.0, head_cost=0.0) == (2, 2, 3)
    assert counts(8, 4, embedding_cost=9.0, head_cost=9.0) == (1, 3, 3, 1)
    assert counts(12, 1) == (12,)


def test_more_stages_than_layers_are_refused_with_the_sizes_that_work() -> None:
    with pytest.raises(ValueError, match=r"8 stages\) is more than num_hidden_layers \(6\).*1 to 6"):
        partition_layers(6, 8)


def test_explicit_partition_is_taken() -> None:
    assert partition_layers(5, 3, explicit=(1, 3, 1)) == (range(1), range(1, 4), range(4, 5))
    assert counts(4, 4, explicit=(0, 2, 2, 0)) == (0, 2, 2, 0)
    assert counts(2, 4, explicit=(0, 1, 1, 0)) == (0, 1, 1, 0)


@pytest.mark.parametrize(
    ("explicit", "words"),
    [
        ((2, 3), r"\(2, 3\) has 2 entries, but there are 3 stages"),
        ((2, 2, 2), "sums to 6, but num_hidden_layers is 5"),
        ((3, 0, 2), "gives stage 1 0 layers"),
        ((6, 1, -2), "gives stage 2 -2 layers"),
    ],
)
def test_wrong_explicit_partitions_are_refused(explicit: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        partition_layers(5, 3, explicit=explicit)


def test_sizes_and_costs_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="must both be at least 1"):
        partition_layers(0, 1)
    with pytest.raises(ValueError, match="head_cost is -1"):
        partition_layers(4, 2, head_cost=-1.0)
    with pytest.raises(ValueError, match="embedding_cost is nan"):
        partition_layers(4, 2, embedding_cost=float("nan"))
