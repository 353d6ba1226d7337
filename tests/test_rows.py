"""Rows laid end to end: what is where, and that a model computes the same of them as of padded rows."""

from __future__ import annotations

import pytest
import torch

from megallm.trainers.rows import last_values, lay_end_to_end, row_sums

LENGTHS = [3, 0, 5, 2]


def padded() -> dict[str, torch.Tensor]:
    ids = torch.arange(1, 25).view(4, 6)
    rows = {"lengths": torch.tensor(LENGTHS), "ranks": torch.tensor([0, -1, 0, 1])}
    return {"input_ids": ids, "labels": ids + 100, **rows}


def test_tokens_keep_their_order_and_padding_comes_last() -> None:
    laid, documents = lay_end_to_end(padded(), 8)
    assert laid["input_ids"].tolist() == [[1, 2, 3, 13, 14, 15, 16, 17, 19, 20, 0, 0, 0, 0, 0, 0]]
    assert laid["labels"].tolist() == [[101, 102, 103, 113, 114, 115, 116, 117, 119, 120] + [-100] * 6]
    assert laid["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4, 5]]
    assert laid["row_offsets"].tolist() == [0, 3, 3, 8, 10]
    assert laid["ranks"].tolist() == [0, -1, 0, 1], "what is of rows stays"
    assert documents.lengths == (3, 5, 2, 6) and documents.offsets.tolist() == [0, 3, 8, 10, 16]


@pytest.mark.parametrize(("lengths", "total"), [([0, 0], 8), ([8, 0], 8), ([6, 6], 16)])
def test_there_is_always_a_token_and_no_padding_that_is_not_needed(lengths: list[int], total: int) -> None:
    batch = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "lengths": torch.tensor(lengths)}
    laid, documents = lay_end_to_end(batch, 8)
    assert laid["input_ids"].shape == (1, total) and sum(documents.lengths) == total and min(documents.lengths) > 0


def test_sums_and_last_values_are_those_of_padded_rows() -> None:
    batch = padded()
    laid, _ = lay_end_to_end(batch, 8)
    values = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    is_token = torch.arange(6) < batch["lengths"].unsqueeze(1)
    flat = torch.zeros(1, 16, dtype=torch.float64)
    flat[0, :10] = values[is_token]
    flat.requires_grad_()
    sums = row_sums(flat, laid)
    assert torch.allclose(sums, (values * is_token).sum(1), rtol=1e-14)
    assert torch.allclose(row_sums(values * is_token, batch), sums, rtol=1e-14)
    (sums * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert flat.grad is not None
    assert flat.grad.tolist() == [[1.0] * 3 + [3.0] * 5 + [4.0] * 2 + [0.0] * 6]
    real = [0, 2, 3]
    assert torch.equal(last_values(flat, laid)[real], last_values(values, batch)[real])


def test_a_single_row_is_known_by_its_offsets_and_not_by_its_shape() -> None:
    batch = {"input_ids": torch.ones(1, 5, dtype=torch.int64), "lengths": torch.tensor([3])}
    laid, _ = lay_end_to_end(batch, 8)
    values = torch.arange(8.0).view(1, 8)
    assert row_sums(values, laid).tolist() == [3.0] and last_values(values, laid).tolist() == [2.0]
