r"""ZeRO stages 1 to 3 train like one rank, send what the paper says and hold what the plan says.

Traffic of one step over the ranks that share shards, in elements a rank sends (arXiv 1910.02054, section 7; with m
microbatches; n parameters of this rank with padding, N shards, f = (N-1)/N):

    stage 1     gradients reduce-scattered once, parameters gathered once                          2 n f
    stage 2     gradients of every microbatch, parameters gathered once                    (m + 1) n f
    stage 3     gradients of every microbatch; layers gathered for forward and for
                backward, embedding and head for forward                       m (n + 2 layers + rest) f
                less the first layer, which the next microbatch finds still there   - (m - 1) first f
                kept until the update: every parameter once                                (m + 1) n f
    and         the gradient norm, the counts of labels and of tokens, one number each             6 f
"""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
import torch
from training_cases import BATCH, GOLDEN, GOLDEN_STEPS, MODELS, Case, make_engine, once, own_batch
from training_cases import train_cases as train_all

from megallm.planner.memory import state_bytes
from megallm.testing.pool import run_ranks
from megallm.trainers.evaluate import score_documents
from megallm.trainers.losses import language_model_loss

UNTIED, TIED, QWEN2, QWEN3 = list(MODELS)[:4]
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
    *(Case(model=m, zero=z, **layout) for layout in LAYOUTS for z in (1, 2, 3) for m in (UNTIED, TIED)),
    *(Case(model=m, zero=z, tp=2, dp=2, mbs=2) for z in (1, 2, 3) for m in (QWEN2, QWEN3)),
    *(Case(model=TIED, zero=z, dp=4, shard=2, mbs=1) for z in (1, 2, 3)),
    *(Case(model=m, zero=3, dp=2, mbs=1, keep=True) for m in (UNTIED, TIED)),
    *(Case(model=m, zero=3, dp=2, mbs=2, recompute="full") for m in (UNTIED, TIED)),
    Case(model=TIED, zero=3, pp=2, dp=2, mbs=1, recompute="selective", schedule="gpipe"),
    Case(model=UNTIED, zero=2),  # one rank: nothing to share
    Case(model=UNTIED, zero=3),
]
FP32_CASES = [Case(model=m, zero=z, dp=2, precision="fp32") for z in (1, 2, 3) for m in (UNTIED, TIED)]
COUNTED = [
    *(Case(model=m, zero=z, dp=2, mbs=mbs) for z in (1, 2, 3) for m, mbs in ((UNTIED, 4), (TIED, 1), (QWEN2, 2))),
    Case(model=UNTIED, zero=3, dp=2, mbs=1, keep=True),
    *(Case(model=TIED, zero=z, pp=2, dp=2, v=2, mbs=1) for z in (1, 2, 3)),
    *(Case(model=UNTIED, zero=z, dp=4, mbs=1) for z in (1, 2, 3)),
]
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
def test_five_steps_in_fp32_equal_the_one_rank_curve(case: Case) -> None:
    for (loss, _), expected in zip(curves(2, "fp32")[case.name], golden(case.model)["loss"], strict=False):
        assert abs(loss / expected - 1) < 1e-5


def count_step(rank: int, world_size: int, cases: list[Case]) -> dict[str, dict[str, Any]]:
    found = {}
    for case in cases:
        engine = make_engine(case)
        assert engine.flat is not None
        for _ in range(2):  # the second step begins with what the first left behind
            with engine.mesh.recorder.recording() as recorder:
                engine.train_step(own_batch(0, engine.mesh), language_model_loss)
        numel = {b.bucket.units[0]: b.bucket.numel for b in engine.flat.buckets}
        layers = sum(b.bucket.numel for b in engine.flat.buckets if b.bucket.units[0].split(".")[1].isdigit())
        is_tied = MODELS[case.model].tie_word_embeddings and case.pp == 1
        found[case.name] = {
            "elements": recorder.elements("dp"),
            "all": sum(b.bucket.numel for b in engine.flat.buckets),
            "layers": layers,
            "first": numel.get("0.0", 0),
            "tied": numel["0.head"] if is_tied else 0,
            "whole": sum(p.numel() for p in engine.flat.parameters.values()),
        }
    return found


@once
def counted(world_size: int) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(count_step, world_size, [c for c in COUNTED if c.world_size == world_size])


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.name)
def test_traffic_is_the_paper_s(case: Case) -> None:
    m, share = BATCH // case.dp // case.mbs, Fraction(case.dp - 1, case.dp)
    for rank in counted(case.world_size):
        held = rank[case.name]
        n, rest = held["all"], held["all"] - held["layers"]
        if case.zero == 1:
            sent = 2 * n
        elif case.zero == 2 or case.keep:
            sent = (m + 1) * n
        else:
            sent = m * (n + 2 * held["layers"] + rest + held["tied"])
            if case.pp > 1:  # what is found still there depends on the schedule
                assert int(share * (m * n + 6)) < held["elements"] <= int(share * (sent + 6))
                continue
            sent -= (m - 1) * held["first"]
        assert held["elements"] == int(share * (sent + 6))
        assert held["whole"] <= n < 1.02 * held["whole"], "padding"


def hold(rank: int, world_size: int, cases: list[Case]) -> dict[str, dict[str, int]]:
    """Bytes of memory behind parameters, gradients and optimizer state after two steps."""
    found = {}
    for case in cases:
        engine = make_engine(case)
        for step in range(2):
            engine.train_step(own_batch(step, engine.mesh), language_model_loss)
        assert engine.flat is not None and engine.gradients is not None and engine.optimizer is not None
        optimizer, flats, sums = engine.optimizer, engine.flat.buckets, engine.gradients.buckets
        engine.flat.settle()
        state = [*optimizer.exp_avg, *optimizer.exp_avg_sq, *optimizer.master]
        found[case.name] = {
            "numel": sum(p.numel() for p in engine.model.parameters()),
            "parameters": bytes_behind([t for flat in flats for t in (flat.params, flat.shard)]),
            "gradients": bytes_behind([t for bucket in sums for t in (bucket.whole, bucket.shard)]),
            "optimizer": bytes_behind(state),
        }
    return found


def bytes_behind(tensors: list[torch.Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().size() for t in tensors}.values())


HELD = [
    Case(model=UNTIED, zero=z, dp=4, mbs=1, precision="bf16", grads=grads)
    for z in (0, 1, 2, 3)
    for grads in (None, "bf16")
]


@once
def held() -> list[dict[str, dict[str, int]]]:
    return run_ranks(hold, 4, HELD)


@pytest.mark.parametrize("case", HELD, ids=lambda case: case.name)
def test_memory_is_the_paper_s(case: Case) -> None:
    """bf16 parameters, fp32 or bf16 sums of gradients, fp32 masters and moments; what is sharded, divided by 4."""
    for rank in held():
        found = rank[case.name]
        planned = state_bytes(
            found["numel"], zero=case.zero, num_shards=4, gradient_bytes=2 if case.grads == "bf16" else 4
        )
        for name in ("parameters", "gradients", "optimizer"):
            assert getattr(planned, name) <= found[name] <= 1.02 * getattr(planned, name), name


def use(rank: int, world_size: int, cases: list[Case]) -> dict[str, tuple[list[float], list[list[int]], list[float]]]:
    """Losses of this rank's microbatches, of which ranks have different numbers, samples, and losses of documents."""
    found = {}
    for case in cases:
        engine = make_engine(case, train=case.keep)
        batch = own_batch(0, engine.mesh)
        parts = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(1 + 2 * engine.mesh.dp.rank)]
        losses = engine.forward(parts, lambda logits, part: float(logits.cross_entropy(part["labels"]).sum()))
        prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15]]
        samples = engine.generate(prompts, max_new_tokens=4)
        documents = [[i, i + 1, i + 2] * (1 + i) for i in range(5)]
        found[case.name] = (losses, samples, [loss for loss, _ in score_documents(engine, documents, tokens_at_once=9)])
    return found


USED = [Case(model=m, zero=z, dp=2, keep=k) for m in (UNTIED, TIED) for z, k in ((0, False), (3, False), (3, True))]


def test_models_in_shards_are_evaluated_and_sampled_alike() -> None:
    """With and without an optimizer, whatever number of microbatches each rank brings."""
    ranks = run_ranks(use, 2, USED)
    for found in ranks:
        for case in USED:
            whole = found[Case(model=case.model, dp=2).name]
            losses, samples, scores = found[case.name]
            assert losses == pytest.approx(whole[0], rel=1e-12) and len(losses) in (1, 3)
            assert samples == whole[1]
            assert scores == pytest.approx(whole[2], rel=1e-12)
