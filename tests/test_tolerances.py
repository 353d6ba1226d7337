"""The helpers that other tests judge by: tolerances and tiny models."""

from __future__ import annotations

import pytest
import torch

from megallm.config.model import FAMILIES, Family
from megallm.testing.tiny import tiny_config
from megallm.testing.tolerances import assert_close, tolerance


def test_a_tolerance_grows_with_magnitude_and_with_the_root_of_terms() -> None:
    assert tolerance(torch.float32) == 4 * 2.0**-23
    assert tolerance(torch.float32, magnitude=8.0, terms=9) == 24 * tolerance(torch.float32)


def test_a_sum_in_another_order_is_close_and_a_wrong_term_is_not() -> None:
    values = torch.randn(1000, 7, generator=torch.Generator().manual_seed(0))
    expected = values.double().sum(dim=0)
    magnitude = values.abs().sum(dim=0).max().item()
    assert_close(values.sum(dim=0), expected, terms=1000, magnitude=magnitude)
    with pytest.raises(AssertionError, match=r"grad off by .*1000 terms"):
        assert_close(values[1:].sum(dim=0), expected, terms=1000, magnitude=magnitude, label="grad")


def test_the_less_precise_dtype_decides() -> None:
    third = torch.tensor([1.0]) / 3
    assert_close(third.bfloat16(), third)
    with pytest.raises(AssertionError):
        assert_close(third.bfloat16().float(), third)


def test_nan_and_shapes_are_never_close() -> None:
    with pytest.raises(AssertionError, match="off by nan"):
        assert_close(torch.tensor([float("nan")]), torch.tensor([1.0]))
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.ones(2), torch.ones(2, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_split_over_tp_4(family: Family) -> None:
    config = tiny_config(family, num_hidden_layers=5)
    assert config.family == family and config.num_hidden_layers == 5
    sizes = (config.num_attention_heads, config.num_key_value_heads, config.hidden_size, config.intermediate_size)
    assert all(size % 4 == 0 for size in sizes) and config.vocab_size % 2 == 1
    assert config.position_embedding == "learned" or config.head_dim % 2 == 0
