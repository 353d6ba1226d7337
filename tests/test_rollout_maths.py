"""Rewards, advantages and returns against their definitions, written out element by element."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from megallm.parallel.mesh import Mesh
from megallm.testing.pool import run_ranks
from megallm.trainers.rollout_maths import (
    AdaptiveKl,
    explained_variance,
    gae,
    group_advantages,
    kl_estimate,
    last_place,
    missing_end,
    moments,
    returns_to_go,
    token_rewards,
    whiten,
)

MASKS = {
    "whole": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
    "ended": [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]],
    "gaps": [[1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 1, 0]],
    "nothing": [[0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
}
MASK = pytest.mark.parametrize("mask", [torch.tensor(m).bool() for m in MASKS.values()], ids=list(MASKS))


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@MASK
def test_the_score_comes_with_the_last_token(mask: torch.Tensor) -> None:
    scores, kl = torch.tensor([2.0, -3.0], dtype=torch.float64), rand(2, 6, seed=1)
    rewards = token_rewards(scores, kl, mask, kl_coefficient=0.1)
    for row in range(2):
        places = [t for t in range(6) if mask[row, t]]
        expected = [-0.1 * float(kl[row, t]) if t in places else 0.0 for t in range(6)]
        if places:
            expected[places[-1]] += float(scores[row])
            assert int(last_place(mask)[row]) == places[-1]
        assert rewards[row].tolist() == pytest.approx(expected, abs=1e-12)


@MASK
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.99, 0.0)])
def test_gae_is_that_of_the_tokens_without_what_lies_between(mask: torch.Tensor, gamma: float, lam: float) -> None:
    rewards, values = rand(2, 6, seed=2) * mask, rand(2, 6, seed=3)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row in range(2):
        places = [t for t in range(6) if mask[row, t]]
        r, v = ([float(x[row, t]) for t in places] for x in (rewards, values))
        v.append(0.0)
        for i, place in enumerate(places):
            # equation 16: the discounted sum of all later deltas
            expected = sum(
                (gamma * lam) ** (j - i) * (r[j] + gamma * v[j + 1] - v[j]) for j in range(i, len(places))
            )
            assert float(advantages[row, place]) == pytest.approx(expected, abs=1e-12)
            assert float(returns[row, place]) == pytest.approx(expected + v[i], abs=1e-12)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_estimates_of_the_kl_are_what_is_said_of_them() -> None:
    """Over a small vocabulary expectations are sums: k1 and k3 are unbiased, k2's gradient is the KL's."""
    logits, other = rand(7, seed=4).requires_grad_(), rand(7, seed=5)
    p, q = torch.log_softmax(logits, 0), torch.log_softmax(other, 0)
    true = (p.exp() * (p - q)).sum()
    for kind in ("k1", "k3"):
        found = (p.exp() * kl_estimate(p, q, kind)).sum()  # type: ignore[arg-type]
        torch.testing.assert_close(found, true, rtol=1e-12, atol=0.0)
    assert (kl_estimate(p, q, "k3") >= 0).all() and (kl_estimate(p, q, "k2") >= 0).all()
    (expected,) = torch.autograd.grad(true, logits, retain_graph=True)
    (found,) = torch.autograd.grad((p.exp().detach() * kl_estimate(p, q, "k2")).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_unfinished_responses_lose_or_are_replaced() -> None:
    scores, ended = torch.tensor([2.0, 3.0]), torch.tensor([True, False])
    assert missing_end(scores, ended, penalty=1.0).tolist() == [2.0, 2.0]
    assert missing_end(scores, ended, penalty=1.0, replaces=True).tolist() == [2.0, -1.0]


def check_whitening(rank: int, world_size: int) -> None:
    """dp ranks with other numbers of tokens, one with none."""
    dp = Mesh.build().dp
    values, mask = rand(8, 5, seed=6) + 100.0, rand(8, 5, seed=7) > 0
    mask[:2] = False  # all of rank 0's
    own = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    kept = values[mask].tolist()
    mean, deviation = statistics.fmean(kept), statistics.stdev(kept)
    found = whiten(values[own], mask[own], dp)
    unshifted = whiten(values[own], mask[own], dp, shift_mean=False)
    expected = torch.where(mask, (values - mean) / deviation, 0.0)[own]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(unshifted, torch.where(mask[own], expected + mean, 0.0), rtol=1e-8, atol=1e-9)
    assert int(moments(values[own], mask[own], dp).count) == len(kept)
    error = explained_variance(values[own] + rand(8, 5, seed=8)[own] * 0.1, values[own], mask[own], dp)
    noise = [float(x) * 0.1 for x in rand(8, 5, seed=8)[mask]]
    assert error == pytest.approx(1 - statistics.variance(noise) / statistics.variance(kept), rel=1e-9)


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_whitening_is_over_all_ranks(dp: int) -> None:
    run_ranks(check_whitening, dp)


def test_one_token_has_no_variance() -> None:
    assert whiten(torch.tensor([[3.0]]), torch.tensor([[True]])).tolist() == [[0.0]]
    assert math.isnan(explained_variance(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2).bool()))


SCORES, GROUPS = torch.tensor([1.0, 0.0, 0.0, 5.0, 5.0, 2.0, -1.0]), torch.tensor([7, 3, 7, 9, 9, 3, 3])


def test_advantages_of_groups_wherever_their_members_lie() -> None:
    found = {kind: group_advantages(SCORES, GROUPS, kind=kind)[0] for kind in ("grpo", "dr_grpo", "rloo")}  # type: ignore[arg-type]
    for group in (3, 7, 9):
        places = [i for i in range(7) if GROUPS[i] == group]
        own = [float(SCORES[i]) for i in places]
        mean, deviation = statistics.fmean(own), statistics.stdev(own)
        for place, score in zip(places, own, strict=True):
            others = (sum(own) - score) / (len(own) - 1)
            assert float(found["grpo"][place]) == pytest.approx((score - mean) / (deviation + 1e-4), abs=1e-6)
            assert float(found["dr_grpo"][place]) == pytest.approx(score - mean, abs=1e-6)
            assert float(found["rloo"][place]) == pytest.approx(score - others, abs=1e-6)
    _, tells = group_advantages(SCORES, GROUPS)
    assert tells.tolist() == [True, True, True, False, False, True, True]


def test_returns_to_go_are_sums_of_what_comes() -> None:
    rewards = torch.tensor([[1.0, 9.0, 2.0, -4.0], [0.5, 0.25, 9.0, 9.0]])
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    assert returns_to_go(rewards, mask).tolist() == [[-1.0, 0.0, -2.0, -4.0], [0.75, 0.25, 0.0, 0.0]]
    assert returns_to_go(rewards, mask, gamma=0.5).tolist() == [[1.0, 0.0, 0.0, -4.0], [0.625, 0.25, 0.0, 0.0]]


def test_a_response_alone_in_its_group_tells_nothing() -> None:
    for kind in ("grpo", "dr_grpo", "rloo"):
        found, tells = group_advantages(torch.tensor([3.0]), torch.tensor([0]), kind=kind)  # type: ignore[arg-type]
        assert found.tolist() == [0.0] and tells.tolist() == [False]


@pytest.mark.parametrize(
    ("kl", "expected"), [(6.0, 0.2), (12.0, 0.201024), (6.6, 0.200512), (3.0, 0.198976), (0.0, 0.198976)]
)
def test_the_coefficient_follows_the_kl_by_a_fifth_at_most(kl: float, expected: float) -> None:
    assert AdaptiveKl(0.2, 6.0, 10_000.0).update(kl, episodes=256) == pytest.approx(expected, rel=1e-9)
