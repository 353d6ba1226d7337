"""Samples, their order, blends and batches: functions of (seed, consumed samples) whatever the layout."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from megallm.data.blend import Blend
from megallm.data.dataset import TokenDataset
from megallm.data.loader import BatchLoader, ValidationLoader
from megallm.data.permutation import permute

SEQ = 7


def dataset(num_tokens: int = 101, **kwargs: int) -> TokenDataset:
    return TokenDataset(np.arange(num_tokens, dtype=np.uint16), seq_length=SEQ, **{"seed": 3, **kwargs})


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 101, 1000])
def test_permutation_is_one_to_one(size: int) -> None:
    for key in range(5):
        assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_permutation_depends_on_its_key() -> None:
    orders = {tuple(permute(index, 50, key) for index in range(50)) for key in range(20)}
    assert len(orders) == 20


def test_permutation_never_changes() -> None:
    # Made once with this code: another order would break the resume of every saved run.
    assert [permute(index, 10, 1234) for index in range(10)] == [1, 7, 4, 9, 3, 6, 0, 8, 2, 5]


def test_labels_are_the_next_tokens() -> None:
    input_ids, labels = dataset().sample(4)
    assert input_ids.dtype == labels.dtype == np.int64
    assert input_ids.shape == labels.shape == (SEQ,)
    assert (labels == input_ids + 1).all()


@pytest.mark.parametrize("num_tokens", [SEQ + 1, SEQ + 2, 2 * SEQ, 2 * SEQ + 1, 3 * SEQ, 100, 101])
def test_an_epoch_has_every_window_once(num_tokens: int) -> None:
    data = dataset(num_tokens)
    for epoch in range(30):
        starts = sorted(data.window_start(epoch * data.num_samples + i) for i in range(data.num_samples))
        assert starts == [data.epoch_offset(epoch) + i * SEQ for i in range(data.num_samples)]
        assert 0 <= data.epoch_offset(epoch) < 2 * SEQ - 1
        assert starts[-1] + SEQ + 1 <= num_tokens
    assert num_tokens - data.num_samples * SEQ <= 2 * SEQ  # under two windows are lost in an epoch


def test_every_offset_comes_up_and_every_token_is_a_label() -> None:
    data = dataset(100)
    assert {data.epoch_offset(epoch) % SEQ for epoch in range(100)} == set(range(SEQ))
    seen = {int(label) for index in range(100 * data.num_samples) for label in data.sample(index)[1]}
    assert seen == set(range(1, 100))


def test_epochs_seeds_and_streams_differ() -> None:
    data = dataset()
    orders = [[d.window_start(e * d.num_samples + i) for i in range(d.num_samples)] for d in (data,) for e in range(3)]
    orders += [[d.window_start(i) for i in range(d.num_samples)] for d in (dataset(seed=4), dataset(stream=1))]
    assert len({tuple(order) for order in orders}) == 5


def test_without_shuffle_windows_come_in_file_order_each_epoch() -> None:
    data = dataset(30, shuffle=False)
    assert data.num_samples == 4
    assert [data.window_start(i) for i in range(6)] == [0, 7, 14, 21, 0, 7]


def test_data_shorter_than_a_sample_is_refused() -> None:
    with pytest.raises(ValueError, match=r"holds 7 tokens, fewer than one sample of seq_length \+ 1 = 8"):
        dataset(SEQ)


def greedy(weights: list[float], count: int) -> list[tuple[int, int]]:
    """The rule, written down once more: argmax of w * max(i, 1) - drawn."""
    drawn, rows = np.zeros(len(weights), dtype=int), []
    for index in range(count):
        best = int(np.argmax(np.array(weights) * max(index, 1) - drawn))
        rows.append((best, int(drawn[best])))
        drawn[best] += 1
    return rows


def test_blend_follows_the_greedy_rule() -> None:
    blend = Blend([dataset(), dataset(50), dataset(30)], [0.5, 0.3, 0.2])
    rows = greedy([0.5, 0.3, 0.2], 9000)
    assert [blend.locate(index) for index in range(9000)] == rows
    assert [blend.locate(index) for index in (5000, 3, 8999, 4096, 4095, 0)] == [
        rows[index] for index in (5000, 3, 8999, 4096, 4095, 0)
    ]
    late = Blend([dataset(), dataset(50), dataset(30)], [5, 3, 2])
    assert late.locate(8999) == rows[8999]


def test_blend_keeps_its_weights() -> None:
    blend = Blend([dataset(), dataset(50)], [3, 1])
    for count in (10, 999):
        drawn = Counter(blend.locate(index)[0] for index in range(count))
        assert abs(drawn[0] - 0.75 * count) <= 1 and abs(drawn[1] - 0.25 * count) <= 1


def test_blend_epoch_is_that_of_the_dataset_used_up_first() -> None:
    first, second = dataset(101), dataset(50)
    assert Blend([first, second], [1, 1]).num_samples == 2 * second.num_samples


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, float("nan")]])
def test_blend_refuses_bad_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weight"):
        Blend([dataset(), dataset(50)], weights)


def test_global_batch_does_not_depend_on_dp() -> None:
    blend = Blend([dataset(), dataset(50)], [0.6, 0.4])
    whole = BatchLoader(blend, global_batch_size=12).batch(24)
    assert whole["input_ids"].shape == (12, SEQ) and whole["input_ids"].dtype == torch.int64
    assert whole["sample_ids"].tolist() == list(range(24, 36))
    for dp_size in (2, 3, 4, 12):
        parts = [
            BatchLoader(blend, global_batch_size=12, dp_rank=dp_rank, dp_size=dp_size).batch(24)
            for dp_rank in range(dp_size)
        ]
        for name, expected in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), expected)


def test_resumed_batches_equal_those_of_an_unbroken_run() -> None:
    loader = BatchLoader(dataset(), global_batch_size=4)
    unbroken = [loader.batch(4 * step)["input_ids"] for step in range(12)]
    resumed = BatchLoader(dataset(), global_batch_size=4)
    assert all(torch.equal(resumed.batch(4 * step)["input_ids"], unbroken[step]) for step in (7, 8, 11))


def test_prefetch_changes_nothing() -> None:
    plain, ahead = (BatchLoader(dataset(), global_batch_size=4, prefetch=flag) for flag in (False, True))
    for consumed in (0, 4, 8, 40, 44, 4):
        expected, batch = plain.batch(consumed), ahead.batch(consumed)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    ahead.close()
    assert torch.equal(ahead.batch(8)["labels"], plain.batch(8)["labels"])


def test_batch_size_must_divide_by_dp() -> None:
    with pytest.raises(ValueError, match=r"global_batch_size \(6\) must be a positive multiple of dp \(4\)"):
        BatchLoader(dataset(), global_batch_size=6, dp_size=4)


def test_validation_is_the_first_sequences_padded_to_one_shape() -> None:
    data = dataset(shuffle=False)
    seen: list[int] = []
    for dp_rank in range(3):
        loader = ValidationLoader(data, num_sequences=8, batch_size=6, dp_rank=dp_rank, dp_size=3)
        batches = list(loader)
        assert len(loader) == len(batches) == 2
        for batch in batches:
            assert batch["input_ids"].shape == (2, SEQ)
            real = batch["sample_ids"] >= 0
            assert (batch["labels"][~real] == -100).all() and (batch["labels"][real] >= 0).all()
            assert torch.equal(batch["labels"][real], batch["input_ids"][real] + 1)
            seen += batch["sample_ids"][real].tolist()
    assert sorted(seen) == list(range(8))


def test_validation_counts_nothing_twice() -> None:
    loader = ValidationLoader(dataset(30, shuffle=False), num_sequences=64, batch_size=8)
    assert (loader.num_sequences, len(loader)) == (4, 1)
