"""Packs: every document in one, few places empty, and rows that keep their documents apart."""

from __future__ import annotations

import numpy as np
import pytest
from watching import calls_made

from megallm.data.masks import Example, labels
from megallm.data.packing import batch_cu_seqlens, fill_fraction, pack_row, plan_packs


def example(*ids: int, prompt: int = 1) -> Example:
    return Example(
        input_ids=np.array(ids, dtype=np.int32), is_trained=np.arange(len(ids)) >= prompt, prompt_length=prompt
    )


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The rule written down once more: O(n packs)."""
    packs: list[list[int]] = []
    rooms: list[int] = []
    changed: list[int] = []
    for turn, document in enumerate(sorted(range(len(lengths)), key=lambda index: -lengths[index])):
        fitting = [pack for pack in range(len(packs)) if rooms[pack] >= lengths[document]]
        best = min(fitting, key=lambda pack: (rooms[pack], -changed[pack]), default=len(packs))
        if best == len(packs):
            packs, rooms, changed = [*packs, []], [*rooms, capacity], [*changed, turn]
        packs[best].append(document)
        rooms[best] -= lengths[document]
        changed[best] = turn
    return packs


@pytest.mark.parametrize("seed", range(8))
def test_plans_are_best_fit_decreasing(seed: int) -> None:
    random = np.random.default_rng(seed)
    capacity = int(random.integers(1, 60))
    lengths = random.integers(1, capacity + 1, size=int(random.integers(0, 150))).tolist()
    packs = plan_packs(lengths, capacity)
    assert packs == best_fit_decreasing(lengths, capacity)
    assert sorted(document for pack in packs for document in pack) == list(range(len(lengths)))
    assert all(sum(lengths[document] for document in pack) <= capacity for pack in packs)
    filled = fill_fraction(lengths, packs, capacity)
    assert filled == (sum(lengths) / (len(packs) * capacity) if packs else 0.0)


def test_a_plan_of_many_documents_looks_at_each_once_and_leaves_little_empty() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, 200_000).astype(np.int64), 1, 4096)
    packs = plan_packs(lengths, 4096)
    assert fill_fraction(lengths, packs, 4096) > 0.999
    half = calls_made(lambda: plan_packs(lengths[:100_000], 4096))
    assert calls_made(lambda: plan_packs(lengths, 4096)) < 2.2 * half
    unpacked = fill_fraction(lengths, [[index] for index in range(len(lengths))], 4096)
    assert unpacked < 0.11


def test_documents_that_fit_no_pack_are_refused() -> None:
    with pytest.raises(ValueError, match=r"document 1 of 9 tokens is longer than a pack \(8\): cut it first"):
        plan_packs([3, 9, 10], 8)
    with pytest.raises(ValueError, match="document 2 of 0 tokens is empty: leave it out"):
        plan_packs([3, 8, 0], 8)
    with pytest.raises(ValueError, match=r"the capacity of a pack \(0\) must be at least 1"):
        plan_packs([], 0)
    assert plan_packs([], 8) == []


def test_a_row_keeps_its_documents_apart() -> None:
    row = pack_row([example(5, 6, 7, 8, prompt=2), example(9, 1)], [30, 4], seq_length=8)
    assert row.input_ids.tolist() == [5, 6, 7, 8, 9, 1, 0, 0]
    assert row.labels.tolist() == [-100, 7, 8, -100, 1, -100, -100, -100]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert row.document_ids.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert row.cu_seqlens.tolist() == [0, 4, 6, 8] and row.cu_seqlens.dtype == np.int32
    assert row.sample_ids.tolist() == [30, 4]
    assert all(array.dtype == np.int64 for array in (row.input_ids, row.labels, row.position_ids, row.document_ids))


def test_a_full_row_has_no_padding_document() -> None:
    row = pack_row([example(5, 6, 7), example(8)], [0, 1], seq_length=4)
    assert row.cu_seqlens.tolist() == [0, 3, 4] and row.document_ids.tolist() == [0, 0, 0, 1]


def test_packing_changes_no_target() -> None:
    examples = [example(*range(1, length + 1), prompt=length // 2) for length in (2, 7, 3, 5, 1, 6)]
    for pack in plan_packs([len(each) for each in examples], 9):
        row = pack_row([examples[member] for member in pack], pack, seq_length=9)
        for member, start, end in zip(pack, row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=False):
            assert row.labels[start:end].tolist() == labels(examples[member]).tolist()
            assert row.input_ids[start:end].tolist() == examples[member].input_ids.tolist()
        starts = row.cu_seqlens[1:-1]
        assert (row.labels[starts - 1] == -100).all()  # nothing predicts a document's first token
        assert (row.position_ids[starts] == 0).all()


def test_boundaries_of_a_batch_are_those_of_its_rows() -> None:
    rows = [pack_row([example(1, 2, 3), example(4)], [0, 1], 5), pack_row([example(1, 2, 3, 4, 5)], [2], 5)]
    boundaries = batch_cu_seqlens(np.stack([row.document_ids for row in rows]))
    assert boundaries.tolist() == [0, 3, 4, 5, 10] and boundaries.dtype == np.int32
