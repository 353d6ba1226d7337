r"""Offload trains like one rank, sends what it says and keeps on the device what it says.

Elements copied in a step by a rank whose shard has s elements, with m microbatches (arXiv 2101.06840, section 4: sums
down and parameters up, once each; further microbatches are added on the device):

    stage      to the host      to the device
    0, 1       s                s
    2, 3       m s              s + (m - 1) s            with parameters on the host: gathers + (m - 1) s
"""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
import torch
from training_cases import BATCH, GOLDEN, GOLDEN_STEPS, MODELS, Case, make_engine, once, own_batch, train
from training_cases import train_cases as train_all

from megallm.ops.backends import Backends
from megallm.testing.pool import run_ranks
from megallm.trainers.losses import language_model_loss
from megallm_kernels.cpu_adamw import why_absent

UNTIED, TIED, QWEN2, QWEN3 = list(MODELS)[:4]
KINDS: list[dict[str, Any]] = [
    *({"zero": z, "offload": "optimizer"} for z in (0, 1, 2, 3)),
    {"zero": 3, "offload": "optimizer+params"},
]
LAYOUTS: list[dict[str, Any]] = [
    {"dp": 2, "mbs": 2},
    {"dp": 4, "mbs": 1},
    {"tp": 2, "dp": 2, "mbs": 2},
    {"pp": 2, "dp": 2, "mbs": 1},
    {"pp": 2, "dp": 2, "v": 2, "mbs": 2},
    {"tp": 2, "pp": 2, "dp": 2, "mbs": 2},
    {"tp": 2, "pp": 2, "dp": 2, "v": 2, "mbs": 1},
]
CASES = [
    *(Case(model=(UNTIED, TIED)[(i + j) % 2], **a, **b) for i, a in enumerate(LAYOUTS) for j, b in enumerate(KINDS)),
    *(Case(model=QWEN3, tp=2, dp=2, mbs=2, **kind) for kind in KINDS[1::2]),
    *(Case(model=TIED, dp=4, shard=2, mbs=1, **kind) for kind in KINDS[1:]),
    Case(model=UNTIED, dp=2, mbs=1, keep=True, **KINDS[4]),
    *(Case(model=m, mbs=2, **kind) for m in (UNTIED, TIED) for kind in KINDS),  # one rank
]
FP32_CASES = [Case(model=m, dp=2, precision="fp32", mbs=2, **kind) for kind in KINDS for m in (UNTIED, TIED)]
BOTH_WAYS = [
    *(Case(model=m, dp=2, precision="fp32", **kind) for kind, m in zip(KINDS[1::2], (TIED, UNTIED), strict=False)),
    Case(model=QWEN3, tp=2, dp=2, precision="fp32", mbs=2, **KINDS[4]),
    Case(model=TIED, pp=2, dp=2, v=2, precision="fp32", mbs=2, **KINDS[2]),
]
COUNTED = [Case(model=UNTIED, dp=2, mbs=mbs, **kind) for kind in KINDS for mbs in (4, 1)]
HELD = [Case(model=UNTIED, dp=2, precision="bf16", mbs=2, **kind) for kind in KINDS]
Curve = list[tuple[float, float]]


@once
def curves(world_size: int, precision: str) -> dict[str, Curve]:
    wanted, steps = (CASES, GOLDEN_STEPS) if precision == "fp64" else (FP32_CASES, 5)
    cases = [case for case in wanted if case.world_size == world_size]
    results = run_ranks(train_all, world_size, cases, steps)
    assert all(other == results[0] for other in results), "ranks disagree on the numbers of the job"
    return results[0]


def golden(model: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{model}.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_twenty_steps_equal_the_one_rank_curve(case: Case) -> None:
    expected = golden(case.model)
    actual = curves(case.world_size, "fp64")[case.name]
    for (loss, norm), true_loss, true_norm in zip(actual, expected["loss"], expected["grad_norm"], strict=True):
        assert abs(loss / true_loss - 1) < 1e-9
        assert abs(norm / true_norm - 1) < 1e-9


@pytest.mark.parametrize("case", FP32_CASES, ids=lambda case: case.name)
def test_five_steps_of_the_cpu_s_own_adamw_equal_the_one_rank_curve(case: Case) -> None:
    if why_absent():
        pytest.skip(str(why_absent()))
    for (loss, _), expected in zip(curves(2, "fp32")[case.name], golden(case.model)["loss"], strict=False):
        assert abs(loss / expected - 1) < 1e-5


def update_both_ways(rank: int, world_size: int, cases: list[Case]) -> dict[str, Any]:
    """Curves and optimizer state of 20 steps, updated by the C++ AdamW and by torch's."""
    found: dict[str, Any] = {}
    for case in cases:
        for backend in ("cpu", "torch"):
            engine = make_engine(case, backends=Backends({"adamw": backend}))
            curve = train(engine, 0, GOLDEN_STEPS)
            assert engine.optimizer is not None
            state = {kind: [part.data for part in parts] for kind, parts in engine.optimizer.state().items()}
            found[case.name, backend] = (curve, state, float(engine.optimizer.num_steps))
    return found


@once
def updated(world_size: int) -> list[dict[str, Any]]:
    return run_ranks(update_both_ways, world_size, [c for c in BOTH_WAYS if c.world_size == world_size])


@pytest.mark.parametrize("case", BOTH_WAYS, ids=lambda case: case.name)
def test_the_cpu_s_own_adamw_leaves_what_torch_s_leaves(case: Case) -> None:
    if why_absent():
        pytest.skip(str(why_absent()))
    for found in updated(case.world_size):
        (curve, state, steps), (true_curve, true_state, true_steps) = (found[case.name, b] for b in ("cpu", "torch"))
        assert steps == true_steps == GOLDEN_STEPS
        torch.testing.assert_close(torch.tensor(curve), torch.tensor(true_curve), rtol=1e-5, atol=0.0)
        assert state.keys() == true_state.keys() >= {"exp_avg", "exp_avg_sq"}
        for kind, parts in state.items():
            for part, true_part in zip(parts, true_state[kind], strict=True):
                torch.testing.assert_close(part, true_part, rtol=1e-4, atol=1e-4 * float(true_part.abs().max()))


def count_step(rank: int, world_size: int, cases: list[Case]) -> dict[str, dict[str, int]]:
    found = {}
    for case in cases:
        engine = make_engine(case)
        assert engine.flat is not None
        for _ in range(2):
            with engine.mesh.recorder.recording() as recorder:
                engine.train_step(own_batch(0, engine.mesh), language_model_loss)
        found[case.name] = {
            "down": recorder.elements("to_host"),
            "up": recorder.elements("to_device"),
            "gathered": recorder.elements("dp", "all_gather"),
            "shard": sum(flat.range[1] - flat.range[0] for flat in engine.flat.buckets),
        }
    return found


@once
def counted() -> list[dict[str, dict[str, int]]]:
    return run_ranks(count_step, 2, COUNTED)


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.name)
def test_copies_are_those_of_the_plan(case: Case) -> None:
    rounds = BATCH // case.dp // case.mbs if case.zero >= 2 else 1
    for rank in counted():
        found = rank[case.name]
        shard = found["shard"]
        up = shard
        if case.offload == "optimizer+params":  # a gather of n elements over 2 ranks sends and fetches n / 2
            up = found["gathered"]
            assert up >= 2 * shard * rounds * Fraction(9, 10) - shard, "a layer is fetched for each pass"
        assert found["down"] == rounds * shard
        assert found["up"] == up + (rounds - 1) * shard


def hold(rank: int, world_size: int, cases: list[Case]) -> dict[str, dict[str, int]]:
    """Bytes on the device and on the host after two steps."""
    found = {}
    for case in cases:
        engine = make_engine(case)
        for step in range(2):
            engine.train_step(own_batch(step, engine.mesh), language_model_loss)
        assert engine.flat is not None and engine.gradients is not None and engine.optimizer is not None
        engine.flat.settle()
        flats, sums, optimizer = engine.flat.buckets, engine.gradients.buckets, engine.optimizer
        shards = [flat.shard for flat in flats]
        holds_params = case.offload == "optimizer+params"
        state: list[torch.Tensor] = [*optimizer.exp_avg, *optimizer.exp_avg_sq, *optimizer.master]  # type: ignore[attr-defined]
        device = [*(flat.params for flat in flats), *(b.whole for b in sums), *([] if holds_params else shards)]
        host = [*(b.shard for b in sums), *state, *optimizer._copies, *(shards if holds_params else [])]  # type: ignore[attr-defined]
        found[case.name] = {
            "numel": sum(p.numel() for p in engine.model.parameters()),
            "device": bytes_behind(device),
            "host": bytes_behind(host),
            "both": bytes_behind([*device, *host]),
        }
    return found


def bytes_behind(tensors: list[torch.Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().size() for t in tensors}.values())


@once
def held() -> list[dict[str, dict[str, int]]]:
    return run_ranks(hold, 2, HELD)


@pytest.mark.parametrize("case", HELD, ids=lambda case: case.name)
def test_memory_is_where_the_plan_says(case: Case) -> None:
    """bf16 over 2 ranks, bytes a parameter; the host has sums (4), masters and moments (12), and parameters (2)."""
    shards = 2 if case.zero else 1
    device = {0: 2 + 4, 1: 2 + 4, 2: 2, 3: 2 / 2}[case.zero] if case.offload == "optimizer" else 0
    for rank in held():
        found = rank[case.name]
        assert device * found["numel"] <= found["device"] <= (1.02 * device + 0.02) * found["numel"]
        copies = 0 if why_absent() and case.offload == "optimizer" else 2
        host = (16 + copies) / shards
        assert host * found["numel"] <= found["host"] <= 1.02 * host * found["numel"]
        assert found["both"] == found["device"] + found["host"], "what is on the host is nowhere else"
