"""Counter-based random numbers: slices equal the whole, whatever the cut; and the numbers look random."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megallm.parallel import random

SHAPE = (13, 7, 5)
KEY = random.key(1, "test")


def drawn(start: tuple[int, ...], size: tuple[int, ...], shape: tuple[int, ...], key: int = KEY) -> torch.Tensor:
    out = torch.empty(size, dtype=torch.float64)
    random.normal_(out, key=key, start=start, shape=shape, std=1.0)
    return out


def test_every_slice_equals_the_slice_of_the_whole_bit_for_bit() -> None:
    whole = drawn((0, 0, 0), SHAPE, SHAPE)
    cuts = [list(itertools.combinations(range(0, n + 1, 2), 2)) for n in SHAPE]
    for dims in itertools.product(*cuts):
        part = drawn(tuple(a for a, _ in dims), tuple(b - a for a, b in dims), SHAPE)
        assert torch.equal(part, whole[tuple(slice(a, b) for a, b in dims)]), dims


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_shards_of_a_matrix_put_together_are_the_matrix(parts: int, dim: int) -> None:
    shape = (24, 48)
    size = shape[dim] // parts
    shards = []
    for i in range(parts):
        start = tuple(i * size if d == dim else 0 for d in range(2))
        shards.append(drawn(start, tuple(size if d == dim else n for d, n in enumerate(shape)), shape))
    assert torch.equal(torch.cat(shards, dim), drawn((0, 0), shape, shape))


def test_a_view_of_another_tensor_is_filled_in_place_and_nothing_else() -> None:
    out = torch.zeros(6, 10)
    random.normal_(out[1:4, 2:9:3], key=KEY, start=(0, 0), shape=(3, 3), std=1.0)
    assert torch.equal(out[1:4, 2:9:3].double(), drawn((0, 0), (3, 3), (3, 3)))
    assert out.count_nonzero() == 9


def test_an_empty_slice_draws_nothing() -> None:
    assert drawn((13, 0, 0), (0, 7, 5), SHAPE).numel() == 0


def test_chunked_drawing_equals_drawing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn((0, 0, 0), SHAPE, SHAPE)
    monkeypatch.setattr(random, "_CHUNK", 40)
    assert torch.equal(drawn((0, 0, 0), SHAPE, SHAPE), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_get_the_rounded_numbers(dtype: torch.dtype) -> None:
    out = torch.empty(SHAPE, dtype=dtype)
    random.normal_(out, key=KEY, start=(0, 0, 0), shape=SHAPE, std=1.0)
    assert torch.equal(out, drawn((0, 0, 0), SHAPE, SHAPE).to(dtype))


def test_normal_numbers_have_the_moments_of_the_normal_distribution() -> None:
    """n = 200,000; a sample moment is off by less than 5 of its standard errors, sqrt(var / n)."""
    n = 200_000
    x = torch.empty(n, dtype=torch.float64)
    random.normal_(x, key=KEY, start=(0,), shape=(n,), std=2.0)
    x /= 2.0
    for power, mean, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(x.pow(power).mean().item() - mean) < 5 * math.sqrt(variance / n), power
    for bound, probability in ((1.0, 0.682689), (2.0, 0.954500), (3.0, 0.997300)):
        error = (x.abs() < bound).double().mean().item() - probability
        assert abs(error) < 5 * math.sqrt(probability * (1 - probability) / n)


def test_uniform_numbers_fill_the_open_unit_interval_evenly() -> None:
    """Chi-squared over 100 cells has mean 99 and deviation sqrt(198)."""
    n = 100_000
    u = random.uniform(torch.arange(n), KEY)
    assert 0.0 < u.min() and u.max() < 1.0
    counts = torch.histc(u, bins=100, min=0.0, max=1.0)
    chi_squared = ((counts - n / 100) ** 2 / (n / 100)).sum().item()
    assert abs(chi_squared - 99) < 5 * math.sqrt(198)


def test_neighbouring_numbers_keys_and_rows_are_uncorrelated() -> None:
    """The correlation of n independent pairs has deviation 1 / sqrt(n)."""
    n = 100_000
    x = drawn((0,), (n,), (n,))
    others = {f"lag {lag}": x.roll(lag) for lag in (1, 2, 3, 64, 4096)}
    others["next key"] = drawn((0,), (n,), (n,), KEY + 1)
    others["other name"] = drawn((0,), (n,), (n,), random.key(1, "test2"))
    for name, other in others.items():
        assert abs((x * other).mean().item()) < 5 / math.sqrt(n), name


def test_keys_differ_by_seed_word_and_order() -> None:
    keys = [
        random.key(seed, *words)
        for seed in range(20)
        for words in ((), ("a",), ("b",), ("a", "b"), ("b", "a"), ("ab",), ("a", 1), ("a", 2), ("a", 1, 2), ("a", 12))
    ]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 1 << 64 for key in keys)


def test_a_key_is_the_same_in_every_process_and_version() -> None:
    assert random.key(1234, "init", "model.norm.weight") == 6756574185373699045


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 0.9])
def test_the_keep_mask_keeps_the_given_share(drop: float) -> None:
    n = 100_000
    kept = random.keep_mask(torch.arange(n), key=KEY, drop=drop).double().mean().item()
    assert abs(kept - (1.0 - drop)) <= 5 * math.sqrt(drop * (1.0 - drop) / n)


def test_the_keep_mask_of_a_part_is_part_of_the_keep_mask() -> None:
    index = torch.arange(1000).view(20, 50)
    whole = random.keep_mask(index, key=KEY, drop=0.3)
    assert torch.equal(random.keep_mask(index[5:9, 10:], key=KEY, drop=0.3), whole[5:9, 10:])
    assert not torch.equal(random.keep_mask(index, key=KEY + 1, drop=0.3), whole)
