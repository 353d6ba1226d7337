"""Precisions: how far they are from fp32, fp16's loss scale, and steps whose gradients are not finite.

Bound of a low-precision loss: a layer rounds its activations about 10 times, so that L layers, the embedding and the
head round n = 10 L + 5 times by at most half an ulp each, eps = 2^-9 (bf16) or 2^-12 (fp16) relatively; roundings are
independent, so that their sum has a deviation of sqrt(n) eps at most, and four of these are never passed. The weights
carry what earlier steps rounded: at step t the loss has seen the roundings of t forward passes, sqrt(t) as far away.
The root mean square over 20 steps is then sqrt(10.5) deviations, below four again.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import MODELS, Case, make_engine, once, own_batch, train

from megallm.config.numerics import NumericsConfig
from megallm.optim.clip import GradientSlice, global_norm
from megallm.optim.loss_scale import LossScale
from megallm.parallel.mesh import Mesh
from megallm.runtime.failure import RunStopped
from megallm.testing.pool import run_ranks
from megallm.trainers.bad_steps import BadSteps
from megallm.trainers.engine import Engine
from megallm.trainers.losses import Batch, language_model_loss

UNTIED, TIED, QWEN2, QWEN3 = list(MODELS)[:4]
STEPS = 20
EPS = {"bf16": 2.0**-9, "fp16": 2.0**-12}
LOW: list[tuple[Case, dict[str, Any]]] = [
    (Case(model=model, precision=precision, dp=2, mbs=2, **layout), numerics)
    for precision in ("bf16", "fp16")
    for model, layout in (
        (UNTIED, {}),
        (TIED, {"zero": 1}),
        (UNTIED, {"zero": 2, "offload": "optimizer"}),
        (TIED, {"zero": 3, "offload": "optimizer+params"}),
    )
    for numerics in ({}, {"grad_dtype": "bf16"})
    if precision == "bf16" or not numerics
]


def low_engine(case: Case, **numerics: Any) -> Engine:
    return make_engine(case, precision=NumericsConfig(precision=case.precision, **numerics))  # type: ignore[arg-type]


def low_curves(rank: int, world_size: int) -> list[list[tuple[float, float]]]:
    return [train(low_engine(case, **numerics), 0, STEPS) for case, numerics in LOW]


def wide_curves(rank: int, world_size: int) -> dict[str, list[tuple[float, float]]]:
    return {m: train(make_engine(Case(model=m, precision="fp32")), 0, STEPS) for m in (UNTIED, TIED)}


@once
def curves() -> tuple[list[list[tuple[float, float]]], dict[str, list[tuple[float, float]]]]:
    ranks = run_ranks(low_curves, 2)
    assert ranks[0] == ranks[1], "ranks disagree on the numbers of the job"
    return ranks[0], wide_curves(0, 1)


@pytest.mark.parametrize("number", range(len(LOW)), ids=lambda n: "-".join([LOW[n][0].name, *LOW[n][1]]))
def test_low_precision_follows_fp32(number: int) -> None:
    low, wide = curves()
    case, _ = LOW[number]
    bound = 4 * math.sqrt(10 * MODELS[case.model].num_hidden_layers + 5) * EPS[case.precision]
    errors = [loss / true_loss - 1 for (loss, _), (true_loss, _) in zip(low[number], wide[case.model], strict=True)]
    assert all(abs(error) < bound * math.sqrt(step) for step, error in enumerate(errors, start=1))
    assert math.sqrt(sum(error**2 for error in errors) / STEPS) < bound


def test_where_the_optimizer_is_does_not_change_a_bit() -> None:
    """The same update in the same order, on the device's memory or on the host's: stages 2 and 3 round alike."""

    def curve(**options: Any) -> list[tuple[float, float]]:
        return train(make_engine(Case(model=UNTIED, precision="bf16", **options)), 0, 5)

    assert curve(zero=0) == curve(zero=0, offload="optimizer") == curve(zero=3, offload="optimizer+params")


# fp16's scale


def scale(**options: Any) -> LossScale:
    return LossScale(NumericsConfig(precision="fp16", **options), torch.device("cpu"))


def after(loss_scale: LossScale, steps: str) -> list[float]:
    """The scale after each step: `.` good, `x` bad."""
    found = []
    for step in steps:
        loss_scale.update_(torch.tensor(float(step == "x")))
        found.append(float(loss_scale.value))
    return found


def test_the_scale_halves_when_patience_is_spent_and_at_every_bad_step_after_it() -> None:
    found = after(scale(loss_scale=64.0, loss_scale_hysteresis=2), "x.xx.x")
    assert found == [64.0, 64.0, 32.0, 16.0, 16.0, 8.0]


def test_the_scale_doubles_after_a_window_of_good_steps_which_restores_patience() -> None:
    loss_scale = scale(loss_scale=64.0, loss_scale_window=3, loss_scale_hysteresis=2)
    assert after(loss_scale, "..x...xx") == [64.0, 64.0, 64.0, 64.0, 64.0, 128.0, 128.0, 64.0]


def test_the_scale_stays_within_1_and_2_to_the_40() -> None:
    assert after(scale(loss_scale=2.0, loss_scale_hysteresis=1), "xxx") == [1.0, 1.0, 1.0]
    assert after(scale(loss_scale=2.0**39, loss_scale_window=1), "...") == [2.0**40] * 3


def overflow(rank: int, world_size: int) -> list[tuple[list[float], list[float], list[tuple[float, float]]]]:
    """fp16 from a scale that overflows: (scales, losses) and the curve of a run that never overflowed."""
    found = []
    for zero in (0, 2):
        case = Case(model=UNTIED, precision="fp16", dp=2, mbs=2, zero=zero)
        engine = low_engine(case, loss_scale=2.0**40, loss_scale_hysteresis=1)
        scales, losses, step = [], [], 0
        while step < 5:
            metrics = engine.train_step(own_batch(step, engine.mesh), language_model_loss).metrics()
            scales.append(metrics["loss_scale"])
            if math.isfinite(metrics["grad_norm"]):
                losses.append((metrics["loss"], metrics["grad_norm"]))
                step += 1
        found.append((scales, losses, train(low_engine(case, loss_scale=losses and scales[-1]), 0, 5)))
    return found  # type: ignore[return-value]


def test_a_scale_that_is_too_large_comes_down_and_costs_only_steps() -> None:
    """Powers of two change no bit but those of subnormal numbers, 2^-24 for gradients multiplied by 2^10 at least."""
    ranks = run_ranks(overflow, 2)
    assert ranks[0] == ranks[1]
    for scales, losses, straight in ranks[0]:
        assert scales[0] == 2.0**40 and 2.0**8 < scales[-1] < 2.0**30
        assert all(later in (before, before / 2) for before, later in itertools.pairwise(scales))
        for each, expected in zip(losses, straight, strict=True):
            assert each == pytest.approx(expected, rel=1e-6)


# Bad steps


def poisoned(output: Any, batch: Batch) -> Any:
    """The loss of the microbatch's first sequence is not a number."""
    loss_sum, count, metrics = language_model_loss(output, batch)
    return loss_sum * math.nan, count, metrics


BAD = [
    *(Case(model=UNTIED, dp=2, mbs=2, precision="bf16", zero=z) for z in (0, 1, 2, 3)),
    Case(model=QWEN2, dp=2, mbs=2, precision="fp32", zero=3, offload="optimizer+params"),
    Case(model=UNTIED, pp=2, mbs=2, precision="fp64"),
    Case(model=QWEN2, tp=2, mbs=2, precision="fp16"),
]


def bad_step(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    """A bad step between good ones, and the same steps without it."""
    found = {}
    for case in BAD:
        straight = train(make_engine(case), 0, 4)
        engine = make_engine(case)
        before = train(engine, 0, 2)
        result = engine.train_step(own_batch(9, engine.mesh), poisoned)
        name, metrics = result.grad_norm.first_bad(), result.metrics()
        found[case.name] = {
            "same": [*before, *train(engine, 2, 4)] == straight,
            "norm": metrics["grad_norm"],
            "name": name,
        }
    return found


@once
def bad_steps() -> list[dict[str, dict[str, Any]]]:
    return run_ranks(bad_step, 2)


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_a_bad_step_changes_nothing_on_any_rank(case: Case) -> None:
    for rank in bad_steps():
        assert not math.isfinite(rank[case.name]["norm"])
        assert rank[case.name]["same"]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_the_first_bad_parameter_of_backward_is_named_alike_on_all_ranks(case: Case) -> None:
    names = {rank[case.name]["name"] for rank in bad_steps()}
    last = "lm_head.weight" if case.model == UNTIED else "model.layers.4.mlp.down_proj.weight"
    assert len(names) == 1 and names.pop() in (last, "model.norm.weight")


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_a_bad_gradient_inside_is_named(precision: str) -> None:
    engine = make_engine(Case(model=UNTIED, precision=precision, mbs=8))
    assert engine.gradients is not None
    sink = engine.gradients._sinks["stages.0.layers.1.mlp.down_proj.weight"]
    add_product = sink.add_product

    def spoil(dy: torch.Tensor, x: torch.Tensor) -> None:
        dy = dy.clone()
        dy[0, 3] = math.inf
        add_product(dy, x)

    sink.add_product = spoil  # type: ignore[method-assign]
    result = engine.train_step(own_batch(0, engine.mesh), language_model_loss)
    assert result.grad_norm.first_bad() == "model.layers.1.mlp.down_proj.weight"


def test_a_run_stops_after_so_many_bad_steps_in_a_row(tmp_path: Path) -> None:
    """A learning rate that throws bf16 weights out of range: one line, exit code 1, a null norm in the metrics."""
    arguments = [
        "--steps", "60", "--learning-rate", "1e38", "--weight-decay", "0", "--max-bad-steps", "3", "--seq-length", "32",
        "--global-batch-size", "8", "--save", str(tmp_path / "run"),
    ]  # fmt: skip
    example = Path(__file__).parents[1] / "examples" / "pretrain_gpt.py"
    done = subprocess.run(
        [sys.executable, str(example), *arguments], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 1
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error:")]
    assert "3 steps in a row were not finite (max_bad_steps)" in line and "Traceback" not in done.stderr
    notices = [text for text in done.stdout.splitlines() if "changed nothing" in text]
    assert len(notices) == 3 and "3 of at most 3 in a row" in notices[-1] and ".weight" in notices[-1]
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert '"grad_norm": null' in last and '"bad_steps": 3' in last


@pytest.mark.parametrize(
    ("loss_scale", "way_out"), [({}, "lower the learning rate"), ({"loss_scale": 8.0}, "smaller loss_scale")]
)
def test_bad_steps_in_a_row_that_ended_before_they_were_read_stop_the_run(
    loss_scale: dict[str, float], way_out: str
) -> None:
    engine, counter = make_engine(Case(model=UNTIED, mbs=8)), BadSteps(most_in_a_row=2)
    results = [engine.train_step(own_batch(i, engine.mesh), language_model_loss) for i in range(2)]
    for step, norm in enumerate([math.nan, math.inf, 1.0], start=1):
        line = counter.look(step, results[0].grad_norm, {"grad_norm": norm} | loss_scale)
        assert bool(line) == (step < 3)
    with pytest.raises(RunStopped, match="2 steps in a row were not finite") as stopped:
        counter.check(3)
    assert way_out in str(stopped.value)


def test_the_clip_coefficient_is_what_gradients_are_multiplied_by() -> None:
    engine = make_engine(Case(model=UNTIED, precision="fp64", mbs=8))
    metrics = engine.train_step(own_batch(0, engine.mesh), language_model_loss).metrics()
    assert metrics["grad_norm"] > 0.5
    assert metrics["clip_coefficient"] == pytest.approx(0.5 / metrics["grad_norm"], rel=1e-12)
    free = make_engine(Case(model=UNTIED, precision="fp64", mbs=8), optim=engine.optim.__class__(max_grad_norm=0.0))
    assert free.train_step(own_batch(0, free.mesh), language_model_loss).metrics()["clip_coefficient"] == 1.0


def test_the_norm_is_the_same_in_whatever_order_slices_are_kept() -> None:
    """Squares from 1e-8 to 1e8: added in another order, half of the sums would end in other bits."""
    generator = torch.Generator().manual_seed(5)
    tensors = [torch.randn(7 + n, generator=generator) * 10.0 ** (n % 9 - 4) for n in range(40)]
    slices = [GradientSlice(f"layer {n}", n, tensor) for n, tensor in enumerate(tensors)]
    orders = [slices, slices[::-1]] + [[slices[i] for i in torch.randperm(40, generator=generator)] for _ in range(8)]
    norms = {float(global_norm(order, Mesh.build(), is_sharded=False).value) for order in orders}
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(float(torch.cat(tensors).double().norm()), rel=1e-12)


def test_sums_of_gradients_in_bf16_take_half_the_memory() -> None:
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        engine = low_engine(Case(model=UNTIED, precision="bf16"), grad_dtype=dtype)
        assert engine.gradients is not None
        assert {bucket.whole.element_size() for bucket in engine.gradients.buckets} == {size}


