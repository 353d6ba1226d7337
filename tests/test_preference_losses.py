"""Preference losses against their formulas written out, pair by pair."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from megallm.parallel.logprobs import VocabLogits
from megallm.parallel.mesh import Mesh
from megallm.trainers.preference_losses import DpoLoss, RewardLoss, count_prompts
from megallm.trainers.rows import last_values

V, S = 11, 6


def pairs(num_pairs: int = 3, *, padding: bool = False) -> dict[str, torch.Tensor]:
    """Chosen and rejected responses of other lengths; with a last pair that is padding."""
    generator = torch.Generator().manual_seed(1)
    rows = 2 * num_pairs
    labels = torch.randint(0, V, (rows, S), generator=generator)
    for row in range(rows):
        labels[row, : 1 + row % 2] = -100
        labels[row, 3 + row % 3 :] = -100
    ranks = torch.arange(rows) % 2
    if padding:
        ranks[-2:], labels[-2:] = -1, -100
    return {
        "labels": labels,
        "ranks": ranks,
        "sample_ids": torch.arange(rows) // 2,
        "ref_logprobs": -torch.rand(rows, generator=generator) * 9,
        "logits": torch.randn(rows * S, V, generator=generator, dtype=torch.float64) * 2,
    }


def logits_of(batch: dict[str, torch.Tensor]) -> VocabLogits:
    return VocabLogits(batch["logits"], vocab_size=V, tp=Mesh.build().tp)


def by_hand(batch: dict[str, torch.Tensor]) -> tuple[list[float], list[int]]:
    """Log-probability and length of every row."""
    logprobs = torch.log_softmax(batch["logits"], -1).view(-1, S, V)
    sums, lengths = [], []
    for row, labels in enumerate(batch["labels"].tolist()):
        sums.append(sum(float(logprobs[row, t, label]) for t, label in enumerate(labels) if label >= 0))
        lengths.append(sum(label >= 0 for label in labels))
    return sums, lengths


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


LOSSES: list[tuple[dict[str, Any], Any]] = [
    ({}, lambda h, b: -math.log(sigmoid(b * h))),
    ({"label_smoothing": 0.3}, lambda h, b: -0.7 * math.log(sigmoid(b * h)) - 0.3 * math.log(sigmoid(-b * h))),
    ({"kind": "hinge"}, lambda h, b: max(0.0, 1 - b * h)),
    ({"kind": "ipo", "length_normalised": False}, lambda h, b: (h - 1 / (2 * b)) ** 2),
    ({"kind": "ipo"}, lambda h, b: (h - 1 / (2 * b)) ** 2),
    ({"reference_free": True}, lambda h, b: -math.log(sigmoid(b * h))),
]


@pytest.mark.parametrize(("options", "formula"), LOSSES, ids=lambda x: str(x) if isinstance(x, dict) else "")
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_is_its_formula(options: dict[str, Any], formula: Any, beta: float) -> None:
    batch = pairs()
    total, count, metrics = DpoLoss(beta=beta, **options)(logits_of(batch), batch)
    sums, lengths = by_hand(batch)
    references = [0.0] * 6 if options.get("reference_free") else batch["ref_logprobs"].tolist()
    d = [s - r for s, r in zip(sums, references, strict=True)]
    normalised = options == {"kind": "ipo"}
    per_token = [x / n for x, n in zip(d, lengths, strict=True)] if normalised else d
    expected = sum(formula(per_token[i] - per_token[i + 1], beta) for i in (0, 2, 4))
    assert float(total) == pytest.approx(expected, rel=1e-9) and int(count) == 3
    margins = [beta * (d[i] - d[i + 1]) for i in (0, 2, 4)]
    assert float(metrics["reward_margin"]) == pytest.approx(sum(margins), rel=1e-6)
    assert float(metrics["reward_accuracy"]) == sum(m > 0 for m in margins)
    assert float(metrics["logprob_chosen"]) == pytest.approx(sums[0] + sums[2] + sums[4], rel=1e-6)


def test_dpo_begins_at_ln_2() -> None:
    batch = pairs()
    batch["ref_logprobs"] = torch.tensor(by_hand(batch)[0], dtype=torch.float64)
    total, count, metrics = DpoLoss()(logits_of(batch), batch)
    assert float(total / count) == pytest.approx(math.log(2), rel=1e-12)
    assert float(metrics["reward_margin"]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("options", [options for options, _ in LOSSES], ids=str)
def test_pairs_of_padding_count_nothing(options: dict[str, Any]) -> None:
    padded = pairs(padding=True)
    shorter = {name: t[: 4 * S] if name == "logits" else t[:4] for name, t in padded.items()}
    loss = DpoLoss(**options)
    total, count, metrics = loss(logits_of(padded), padded)
    true_total, true_count, true_metrics = loss(logits_of(shorter), shorter)
    assert int(count) == int(true_count) == 2
    torch.testing.assert_close(total, true_total)
    torch.testing.assert_close(metrics, true_metrics)


def responses() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Prompts with 3, 2 and 4 ranked responses, shuffled in no way, and one row of padding."""
    values = torch.randn(10, S, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    batch = {
        "sample_ids": torch.tensor([7, 7, 7, 9, 9, 4, 4, 4, 4, 4]),
        "ranks": torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 3, -1]),
        "lengths": torch.tensor([6, 2, 1, 4, 4, 3, 6, 5, 2, 0]),
    }
    return values, batch


@pytest.mark.parametrize("centering", [0.0, 0.01])
@pytest.mark.parametrize("has_margins", [False, True])
def test_reward_is_the_mean_over_all_pairs_of_a_prompt(centering: float, has_margins: bool) -> None:
    values, batch = responses()
    margins = torch.tensor([0.3] * 3 + [0.7] * 2 + [0.1] * 5, dtype=torch.float64) * has_margins
    if has_margins:
        batch["margins"] = margins
    total, count, metrics = RewardLoss(centering=centering)(values, batch)
    scores = last_values(values, batch).tolist()
    expected = accuracy = 0.0
    for rows in ([0, 1, 2], [3, 4], [5, 6, 7, 8]):
        found = list(itertools.combinations(rows, 2))
        for i, j in found:
            x = scores[i] - scores[j] - float(margins[j])
            expected += (-math.log(sigmoid(x)) + centering * (scores[i] + scores[j]) ** 2) / len(found)
            accuracy += (scores[i] > scores[j]) / len(found)
    assert float(total) == pytest.approx(expected, rel=1e-12)
    assert int(count) == int(count_prompts(batch)) == 3
    assert float(metrics["reward_accuracy"]) == pytest.approx(accuracy, rel=1e-12)


def test_scores_far_apart_do_not_overflow() -> None:
    batch = {
        "sample_ids": torch.tensor([0, 0]), "ranks": torch.tensor([0, 1]), "lengths": torch.tensor([1, 1]),
    }  # fmt: skip
    values = torch.tensor([[-1e4], [1e4]], requires_grad=True)
    total, _, _ = RewardLoss()(values, batch)
    total.backward()
    assert float(total.detach()) == pytest.approx(2e4)
    assert values.grad is not None and bool(values.grad.isfinite().all())


def test_a_prompt_with_two_best_responses_is_one_prompt() -> None:
    batch = {
        "sample_ids": torch.tensor([5, 5, 5, 6, 6, 6, -1, -1, -1]),
        "ranks": torch.tensor([0, 0, 2, 0, 1, -1, -1, -1, -1]),
        "lengths": torch.tensor([1] * 5 + [0] * 4),
    }
    values = torch.tensor([3.0, 2.0, 1.0, 2.0, 0.5, 9.0, 9.0, 9.0, 9.0], dtype=torch.float64).unsqueeze(1)
    total, count, metrics = RewardLoss()(values, batch)
    expected = -(math.log(sigmoid(2.0)) + math.log(sigmoid(1.0))) / 2 - math.log(sigmoid(1.5))
    assert int(count) == int(count_prompts(batch)) == 2
    assert float(total) == pytest.approx(expected, rel=1e-9)
    assert float(metrics["reward_accuracy"]) == pytest.approx(2.0) and float(metrics["reward_chosen"]) == 5.0
