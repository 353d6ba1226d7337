"""The learning rate at the seams: first step, end of warm-up, start and end of the decay."""

from __future__ import annotations

import itertools
import math

import pytest

from megallm.config.optim import OptimConfig
from megallm.optim.lr_schedule import learning_rate_at

PEAK, MINIMUM = 2.0, 0.5


def rates(total_steps: int, *, beyond: int = 0, **changes: object) -> list[float]:
    settings = {"learning_rate": PEAK, "min_learning_rate": MINIMUM, **changes}
    config = OptimConfig(**settings)  # type: ignore[arg-type]
    return [learning_rate_at(step, config=config, total_steps=total_steps) for step in range(total_steps + beyond)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_ends_at_the_peak_and_no_step_has_rate_0(schedule: str) -> None:
    got = rates(20, lr_schedule=schedule, warmup_steps=4, min_learning_rate=0.0)
    assert got[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert min(got) > 0.0
    assert max(got) == PEAK


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_minimum_is_reached_one_step_after_the_last_and_kept(schedule: str) -> None:
    got = rates(10, beyond=5, lr_schedule=schedule, warmup_steps=3)
    assert got[9] > MINIMUM
    assert got[10:] == [pytest.approx(MINIMUM)] * 5
    assert all(after <= before for before, after in itertools.pairwise(got[3:]))


def test_linear_decay() -> None:
    assert rates(5, lr_schedule="linear", warmup_steps=1, decay_steps=4) == [2.0, 2.0, 1.625, 1.25, 0.875]
    assert rates(5, lr_schedule="linear", warmup_steps=1, decay_steps=2) == [2.0, 2.0, 1.25, 0.5, 0.5]


def test_cosine_decay() -> None:
    got = rates(4, beyond=1, lr_schedule="cosine")
    expected = [MINIMUM + (PEAK - MINIMUM) * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]
    assert got == pytest.approx(expected, rel=1e-15)
    assert got[2] == pytest.approx((PEAK + MINIMUM) / 2)


def test_wsd_is_flat_until_its_decay() -> None:
    got = rates(10, beyond=1, lr_schedule="wsd", warmup_steps=2, decay_steps=3)
    assert got == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5])


def test_wsd_decays_over_a_tenth_by_default() -> None:
    got = rates(40, beyond=1, lr_schedule="wsd")
    assert [step for step, rate in enumerate(got) if rate < PEAK] == [37, 38, 39, 40]
    assert rates(3, lr_schedule="wsd") == [PEAK] * 3


def test_constant_never_decays() -> None:
    assert rates(6, beyond=3, lr_schedule="constant", warmup_steps=2) == [1.0] + [PEAK] * 8


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_a_run_of_one_step_runs_at_the_peak(schedule: str) -> None:
    assert rates(1, lr_schedule=schedule) == [PEAK]


def test_the_minimum_is_a_tenth_by_default() -> None:
    assert rates(4, beyond=1, lr_schedule="linear", min_learning_rate=None)[4] == pytest.approx(PEAK / 10)


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step \\(-1\\) must be 0 or more"):
        learning_rate_at(-1, config=OptimConfig(), total_steps=3)
