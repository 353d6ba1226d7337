"""What the pictures of preferences show, and that they are drawn."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from megallm.monitor.plots import drawing, plot_loss
from megallm.monitor.preference_plots import calibration_error, plot_calibration, plot_preferences, reliability

PNG = b"\x89PNG\r\n"


def test_bins_are_of_equal_confidence_and_number() -> None:
    differences = [0.0, 0.2, -0.1, 3.0, -2.0, 4.0]
    predicted, observed, pairs = reliability(differences, bins=2)

    def sigmoid(x: float) -> float:
        return 1.0 / (1.0 + math.exp(-x))

    assert pairs.tolist() == [3, 3]
    assert observed.tolist() == [pytest.approx(1.5 / 3), pytest.approx(2 / 3)], "a tie is half of one"
    assert predicted.tolist() == [
        pytest.approx((sigmoid(0.0) + sigmoid(0.1) + sigmoid(0.2)) / 3),
        pytest.approx((sigmoid(2.0) + sigmoid(3.0) + sigmoid(4.0)) / 3),
    ]


def test_a_model_that_tells_the_truth_has_no_error_and_a_boaster_has() -> None:
    random = np.random.default_rng(0)
    confidence = random.uniform(0.0, 4.0, size=20_000)
    is_right = random.uniform(size=20_000) < 1.0 / (1.0 + np.exp(-confidence))
    differences = np.where(is_right, confidence, -confidence)
    assert calibration_error(differences.tolist()) < 0.01
    assert calibration_error((10 * differences).tolist()) > 0.1


def test_one_pair_is_enough(tmp_path: Path) -> None:
    plot_calibration([0.5], tmp_path / "one.png", title="1 held-out pair")
    plot_calibration([0.0, 0.0], tmp_path / "ties.png")
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in ("one.png", "ties.png"))


def test_a_picture_that_cannot_be_drawn_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with drawing(said.append):
        plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with drawing(said.append):
        plot_calibration([0.5], tmp_path / "one.png")
    assert "metrics.jsonl has no line with a loss" in said[0] and "needs matplotlib" in said[1] and len(said) == 2
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("valid", [False, True])
def test_accuracy_and_margin_are_drawn_with_and_without_validation(tmp_path: Path, valid: bool) -> None:
    lines = [{"step": step, "loss": 0.6, "reward_accuracy": 0.5, "reward_margin": 0.01 * step} for step in range(1, 31)]
    if valid:
        lines[9] |= {"valid_reward_accuracy": 0.7, "valid_reward_margin": 0.3}
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_preferences(file, tmp_path / "preferences.png", title="a run")
    assert (tmp_path / "preferences.png").read_bytes().startswith(PNG)
