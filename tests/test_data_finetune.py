"""Samples of fine-tuning: every example once an epoch, batches that are a function of what was consumed before."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from megallm.data.examples import Group
from megallm.data.finetune import PairDataset, SftDataset
from megallm.data.loader import Batch, BatchLoader, ValidationLoader
from megallm.data.masks import Example, labels
from megallm.data.packing import batch_cu_seqlens
from megallm.data.permutation import permutation, permute

SEQ = 16
LENGTHS = [3, 9, 16, 2, 5, 5, 7, 12, 4, 2, 8, 11, 6]


def example(number: int, length: int) -> Example:
    """Example 7 has the ids 700, 701, ..."""
    ids = np.arange(100 * number, 100 * number + length, dtype=np.int32)
    return Example(input_ids=ids, is_trained=np.arange(length) >= 1, prompt_length=1)


EXAMPLES = [example(number, length) for number, length in enumerate(LENGTHS, start=1)]


def dataset(**kwargs: Any) -> SftDataset:
    return SftDataset(EXAMPLES, **{"seq_length": SEQ, "seed": 3, **kwargs})


def group(number: int, *lengths: int, margin: float | None = None) -> Group:
    made = tuple(example(10 * number + place, length) for place, length in enumerate(lengths))
    return Group(examples=made, ranks=tuple(range(len(lengths))), margin=margin)


GROUPS = [group(1, 3, 5), group(2, 2, 9, margin=0.5), group(3, 4, 4), group(4, 8, 2), group(5, 6, 6)]


@pytest.mark.parametrize("size", [1, 2, 3, 17, 100, 1000])
def test_permutations_of_all_indices_are_those_of_each(size: int) -> None:
    for key in (0, 5, (1 << 64) - 1):
        assert permutation(size, key).tolist() == [permute(index, size, key) for index in range(size)]


@pytest.mark.parametrize("pack", [False, True])
def test_an_epoch_has_every_example_once(pack: bool) -> None:
    data = dataset(pack=pack, pack_window=5)
    begin, orders = 0, []
    for epoch in range(6):
        count = data.epoch_samples(epoch)
        seen = [member for index in range(begin, begin + count) for member in data.members(index)]
        assert sorted(seen) == list(range(len(EXAMPLES)))
        assert [data.locate(begin), data.locate(begin + count - 1)] == [(epoch, 0), (epoch, count - 1)]
        orders.append(tuple(seen))
        begin += count
    assert len(set(orders)) == 6
    assert data.num_samples == data.epoch_samples(0)


@pytest.mark.parametrize("pack", [False, True])
def test_a_sample_is_known_without_those_before(pack: bool) -> None:
    data = dataset(pack=pack)
    unbroken = [data.members(index) for index in range(60)]
    for index in (59, 0, 31, 30, 45):
        assert dataset(pack=pack).members(index) == unbroken[index]
        assert data.members(index) == unbroken[index]
    assert [dataset(pack=pack, seed=4).members(index) for index in range(60)] != unbroken


def test_without_shuffle_examples_come_in_order() -> None:
    data = dataset(shuffle=False)
    assert [data.members(index) for index in (0, 1, 12, 13)] == [[0], [1], [12], [0]]


def test_packs_are_filled() -> None:
    assert dataset().fill_fraction() == sum(LENGTHS) / (SEQ * len(LENGTHS))
    packed = dataset(pack=True)
    assert packed.fill_fraction() == sum(LENGTHS) / (SEQ * packed.num_samples) > 0.9
    many = [example(number, 10 + 37 * number % 60) for number in range(20_000)]
    assert SftDataset(many, seq_length=512, pack=True).fill_fraction() > 0.995


def rows_of(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of every document in a batch, padding left out."""
    flat_ids, flat_labels = batch["input_ids"].flatten().numpy(), batch["labels"].flatten().numpy()
    if "document_ids" in batch:
        ends = batch_cu_seqlens(batch["document_ids"].numpy()).tolist()
        parts = list(pairwise(ends))
    else:
        length = batch["input_ids"].size(1)
        parts = [(row * length, row * length + int(own)) for row, own in enumerate(batch["lengths"])]
    return [(flat_ids[a:b].tolist(), flat_labels[a:b].tolist()) for a, b in parts if flat_ids[a:b].any()]


@pytest.mark.parametrize("kwargs", [{}, {"pack": True}, {"pad_to_multiple": 4}], ids=str)
def test_batches_hold_the_examples_and_their_labels(kwargs: dict[str, Any]) -> None:
    data = dataset(**kwargs)
    batch = BatchLoader(data, global_batch_size=3).batch(3)
    members = [member for index in (3, 4, 5) for member in data.members(index)]
    expected = [(EXAMPLES[m].input_ids.tolist(), labels(EXAMPLES[m]).tolist()) for m in members]
    assert rows_of(batch) == expected
    assert batch["sample_ids"].tolist() == [3, 4, 5] and batch["input_ids"].dtype == torch.int64
    trained = sum(EXAMPLES[member].num_trained for member in members)
    assert int((batch["labels"] != -100).sum()) == trained


@pytest.mark.parametrize("kwargs", [{}, {"pack": True}, {"pad_to_multiple": 2}], ids=str)
def test_global_batches_do_not_depend_on_dp(kwargs: dict[str, Any]) -> None:
    whole = BatchLoader(dataset(**kwargs), global_batch_size=6).batch(12)
    for dp_size in (2, 3, 6):
        parts = [
            BatchLoader(dataset(**kwargs), global_batch_size=6, dp_rank=dp_rank, dp_size=dp_size).batch(12)
            for dp_rank in range(dp_size)
        ]
        joined = {name: torch.cat([part[name] for part in parts]) for name in whole}
        for name, expected in whole.items():
            assert torch.equal(joined[name], expected)


def test_rows_of_a_rank_are_in_the_order_of_the_samples() -> None:
    assert BatchLoader(dataset(), global_batch_size=6, dp_size=2).batch(12)["sample_ids"].tolist() == [12, 13, 14]


@pytest.mark.parametrize("pack", [False, True])
def test_resume_and_prefetch_change_nothing(pack: bool) -> None:
    loader = BatchLoader(dataset(pack=pack), global_batch_size=4, prefetch=True)
    unbroken = [loader.batch(4 * step) for step in range(9)]
    loader.close()
    resumed = BatchLoader(dataset(pack=pack), global_batch_size=4)
    for step in (8, 5):
        assert all(torch.equal(resumed.batch(4 * step)[name], unbroken[step][name]) for name in unbroken[step])


def test_rows_are_as_long_as_the_longest_of_the_global_batch_rounded_up() -> None:
    data = dataset(pad_to_multiple=4, shuffle=False)
    lengths = []
    for consumed in range(0, 12, 2):
        parts = [BatchLoader(data, global_batch_size=2, dp_rank=rank, dp_size=2).batch(consumed) for rank in (0, 1)]
        assert parts[0]["input_ids"].shape == parts[1]["input_ids"].shape
        lengths.append(parts[0]["input_ids"].size(1))
    assert lengths == [12, 16, 8, 12, 4, 12]
    assert BatchLoader(dataset(shuffle=False), global_batch_size=2).batch(0)["input_ids"].shape == (2, SEQ)


@pytest.mark.parametrize("kwargs", [{}, {"pack": True}, {"pad_to_multiple": 4}], ids=str)
def test_validation_sees_each_example_once_and_pads_with_rows_without_labels(kwargs: dict[str, Any]) -> None:
    data = dataset(shuffle=False, **kwargs)
    seen: Counter[int] = Counter()
    for dp_rank in range(2):
        for batch in ValidationLoader(data, num_sequences=100, batch_size=4, dp_rank=dp_rank, dp_size=2):
            padding = batch["sample_ids"] < 0
            assert batch["input_ids"].size(0) == 2 and (batch["labels"][padding] == -100).all()
            seen.update(ids[0] // 100 - 1 for ids, _ in rows_of(batch))
    assert seen == Counter(range(len(EXAMPLES)))


# Pairs.


def test_answers_to_one_prompt_follow_each_other_best_first() -> None:
    data = PairDataset(GROUPS, seq_length=SEQ, seed=1)
    assert (data.rows_per_sample, data.num_samples) == (2, 5)
    for epoch in range(3):
        assert sorted(data.member(5 * epoch + place) for place in range(5)) == list(range(5))
    batch = BatchLoader(data, global_batch_size=4).batch(4)
    members = [data.member(index) for index in range(4, 8)]
    expected = [each for member in members for each in GROUPS[member].examples]
    assert rows_of(batch) == [(each.input_ids.tolist(), labels(each).tolist()) for each in expected]
    assert batch["lengths"].tolist() == [len(each) for each in expected]
    assert batch["ranks"].tolist() == [0, 1] * 4
    assert batch["sample_ids"].tolist() == [4, 4, 5, 5, 6, 6, 7, 7]
    margins = [GROUPS[member].margin or 0.0 for member in members]
    assert batch["margins"].tolist() == [margin for margin in margins for _ in range(2)]
    halves = [BatchLoader(data, global_batch_size=4, dp_rank=rank, dp_size=2).batch(4) for rank in (0, 1)]
    assert all(torch.equal(torch.cat([half[name] for half in halves]), batch[name]) for name in batch)


def test_smaller_groups_are_filled_up_with_rows_of_rank_minus_one() -> None:
    data = PairDataset([group(1, 3, 2), group(2, 4, 4, 5)], seq_length=SEQ, shuffle=False, pad_to_multiple=8)
    batch = BatchLoader(data, global_batch_size=2).batch(0)
    assert batch["input_ids"].shape == (6, 8)
    assert batch["ranks"].tolist() == [0, 1, -1, 0, 1, 2] and batch["lengths"].tolist() == [3, 2, 0, 4, 4, 5]
    assert (batch["labels"][2] == -100).all()
    (last,) = ValidationLoader(data, num_sequences=9, batch_size=4)
    assert last["sample_ids"].tolist() == [0, 0, 0, 1, 1, 1] + [-1] * 6 and (last["ranks"][6:] == -1).all()


# Refusals.


def test_sizes_that_do_not_fit_are_refused() -> None:
    message = r"an example has 16 tokens, more than seq_length \(8\): make the examples with that max_length"
    with pytest.raises(ValueError, match=message):
        dataset(seq_length=8)
    with pytest.raises(ValueError, match=r"seq_length \(16\) is not a multiple of pad_to_multiple \(3\)"):
        dataset(pad_to_multiple=3)
    with pytest.raises(ValueError, match="packed rows are full: pad_to_multiple is for unpacked ones"):
        dataset(pack=True, pad_to_multiple=4)
    with pytest.raises(ValueError, match="there are no examples"):
        PairDataset([], seq_length=8)
    with pytest.raises(IndexError, match="sample -1: samples count from 0"):
        dataset(pack=True).members(-1)
    with pytest.raises(ValueError, match="a permutation of 0 elements"):
        permutation(0, 1)
