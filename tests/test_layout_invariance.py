"""Every layout trains like one rank: losses and gradient norms of 20 steps equal committed one-rank curves.

The curves in tests/golden were made by tests/make_golden.py. In fp64 a layout changes only the order of sums; 20 steps
of AdamW amplify that to about 1e-12, and a missing or doubled gradient to 1e-3 and more: the bound of 1e-9 lies
between. In fp32 the same first losses are met to 1e-5.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from training_cases import GOLDEN, GOLDEN_STEPS, MODELS, OPTIM, Case, once, train_cases

from megallm.config.serialize import to_plain
from megallm.testing.pool import run_ranks

Curve = list[tuple[float, float]]
UNTIED, TIED, QWEN2, QWEN3, UNTIED_DEEP, TIED_DEEP = MODELS

# Every layout, schedule, microbatch size and recomputation appears with a tied and with an untied model.
CASES = [
    # one rank: what a single process may vary
    Case(model=UNTIED, mbs=1, schedule="gpipe", v=2, recompute="full"),
    Case(model=UNTIED, mbs=2, recompute="selective"),
    Case(model=TIED, mbs=1, recompute="selective"),
    Case(model=TIED, mbs=2, schedule="interleaved", v=2, recompute="full"),
    Case(model=QWEN2, mbs=8, recompute="full"),
    # tensor parallel
    Case(model=UNTIED, tp=2),
    Case(model=TIED, tp=2, recompute="full"),
    Case(model=QWEN2, tp=2, mbs=8, recompute="selective"),
    Case(model=QWEN3, tp=2),
    Case(model=UNTIED, tp=2, sp=False, recompute="full"),
    Case(model=TIED, tp=2, sp=False),
    Case(model=QWEN3, tp=2, sp=False),
    Case(model=UNTIED, tp=4, mbs=8, recompute="selective"),
    Case(model=TIED, tp=4),
    Case(model=QWEN3, tp=4),
    Case(model=QWEN3, tp=4, sp=False, mbs=8),
    # pipeline parallel
    Case(model=UNTIED, pp=2, schedule="1f1b"),
    Case(model=TIED, pp=2, schedule="1f1b", mbs=2, recompute="selective"),
    Case(model=QWEN2, pp=2, mbs=1),
    Case(model=UNTIED, pp=2, schedule="gpipe", recompute="full"),
    Case(model=TIED, pp=2, schedule="gpipe"),
    Case(model=UNTIED, pp=2, v=2, schedule="interleaved", mbs=2),
    Case(model=TIED, pp=2, v=2, schedule="interleaved", recompute="full"),
    Case(model=QWEN2, pp=2, v=2, schedule="gpipe", mbs=8),
    Case(model=UNTIED, pp=4),
    Case(model=TIED, pp=4, mbs=2),
    Case(model=QWEN2, pp=4, mbs=2),
    Case(model=QWEN2, pp=4, schedule="gpipe"),
    Case(model=UNTIED_DEEP, pp=4, v=2, mbs=2),
    Case(model=TIED_DEEP, pp=4, v=2, mbs=2),
    # data parallel
    Case(model=UNTIED, dp=2),
    Case(model=TIED, dp=2, mbs=1),
    Case(model=UNTIED, dp=4, mbs=2),
    Case(model=TIED, dp=4, mbs=1),
    # both, and all three
    Case(model=UNTIED, tp=2, pp=2),
    Case(model=TIED, tp=2, pp=2, recompute="selective"),
    Case(model=QWEN2, tp=2, pp=2, v=2),
    Case(model=QWEN3, tp=2, pp=2, sp=False),
    Case(model=UNTIED, tp=2, dp=2),
    Case(model=TIED, tp=2, dp=2),
    Case(model=UNTIED, pp=2, dp=2),
    Case(model=TIED, pp=2, dp=2, v=2, mbs=2),
    Case(model=UNTIED, tp=2, pp=2, dp=2),
    Case(model=TIED, tp=2, pp=2, dp=2, recompute="full"),
    Case(model=QWEN3, tp=4, pp=2),
]

FP32_CASES = [
    Case(model=UNTIED, precision="fp32"),
    Case(model=TIED, precision="fp32"),
    Case(model=QWEN3, precision="fp32", tp=4),
    Case(model=TIED, precision="fp32", pp=2, v=2),
    Case(model=UNTIED, precision="fp32", tp=2, dp=2),
    Case(model=QWEN2, precision="fp32", pp=2, dp=2),
    Case(model=TIED, precision="fp32", tp=2, pp=2),
]


def golden(model: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{model}.json").read_text())


@once
def curves(world_size: int) -> dict[str, Curve]:
    """All curves of this world size in fp64, by the case's name; one call of the pool."""
    return _measured([case for case in CASES if case.world_size == world_size], GOLDEN_STEPS)


@once
def fp32_curves(world_size: int) -> dict[str, Curve]:
    """Likewise the five steps in fp32."""
    return _measured([case for case in FP32_CASES if case.world_size == world_size], 5)


def _measured(cases: list[Case], steps: int) -> dict[str, Curve]:
    results = run_ranks(train_cases, cases[0].world_size, cases, steps)
    for other in results[1:]:
        assert other == results[0], "ranks disagree on the numbers of the job"
    return results[0]


def largest_relative_error(actual: list[float], expected: list[float]) -> float:
    return max(abs(a / e - 1.0) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_twenty_steps_equal_the_one_rank_curve(case: Case) -> None:
    expected = golden(case.model)
    losses, norms = zip(*curves(case.world_size)[case.name], strict=True)
    assert largest_relative_error(list(losses), expected["loss"]) < 1e-9
    assert largest_relative_error(list(norms), expected["grad_norm"]) < 1e-9


@pytest.mark.parametrize("case", FP32_CASES, ids=lambda case: case.name)
def test_five_steps_in_fp32_equal_the_one_rank_curve(case: Case) -> None:
    losses = [loss for loss, _ in fp32_curves(case.world_size)[case.name]]
    assert largest_relative_error(losses, golden(case.model)["loss"][:5]) < 1e-5


@pytest.mark.parametrize("model", MODELS)
def test_the_golden_curve_is_of_this_model_and_optimizer(model: str) -> None:
    content = golden(model)
    assert content["model"] == to_plain(MODELS[model])
    assert content["optim"] == to_plain(OPTIM)
    assert len(content["loss"]) == len(content["grad_norm"]) == GOLDEN_STEPS


@pytest.mark.parametrize("model", MODELS)
def test_the_golden_curve_learns_with_clipping_active(model: str) -> None:
    content = golden(model)
    assert sum(content["loss"][-3:]) < sum(content["loss"][:3]) - 1.0
    assert all(norm > OPTIM.max_grad_norm for norm in content["grad_norm"])


def test_every_value_of_every_option_appears_tied_and_untied() -> None:
    one_axis = {(2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 4, 1), (1, 1, 2), (1, 1, 4)}
    layouts = one_axis | {(2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)}
    for tied in (True, False):
        own = [case for case in CASES if MODELS[case.model].tie_word_embeddings is tied]
        assert layouts <= {(case.tp, case.pp, case.dp) for case in own}
        assert {(2, 2), (4, 2)} <= {(case.pp, case.v) for case in own if case.dp == case.tp == 1}
        assert {case.schedule for case in own} == {None, "gpipe", "1f1b", "interleaved"}
        assert {1, 2, 4} <= {case.mbs for case in own}
        assert {case.recompute for case in own} == {"none", "selective", "full"}
        assert any(case.sp is False for case in own)
