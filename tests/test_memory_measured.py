"""What ranks hold is what was predicted: states and whole buckets byte for byte, activations within 5 %."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from training_cases import BATCH, MODELS, SEQ, Case, labelled, make_engine, once, own_batch

from megallm.config.model import ModelConfig
from megallm.config.numerics import NumericsConfig
from megallm.config.parallel import ParallelConfig
from megallm.model.transformer import Recompute
from megallm.monitor.memory import MeasuredMemory, MemoryWatch, held_states, largest
from megallm.ops.backends import Backends
from megallm.parallel.mesh import Mesh
from megallm.planner.memory import MemoryPlan, predict_memory
from megallm.testing.pool import run_ranks
from megallm.testing.tiny import tiny_config
from megallm.trainers.engine import Engine
from megallm.trainers.losses import language_model_loss
from megallm.trainers.memory import MemoryReport, watch_memory
from megallm_kernels.cpu_adamw import why_absent

UNTIED, TIED, QWEN2, QWEN3 = list(MODELS)[:4]
LAYOUTS: list[dict[str, Any]] = [{"dp": 2}, {"dp": 4}, {"tp": 2, "dp": 2}, {"pp": 2, "dp": 2}]
STAGES: list[dict[str, Any]] = [{"zero": zero} for zero in (0, 1, 2, 3)]
OFFLOADS: list[dict[str, Any]] = [
    *({"zero": zero, "offload": "optimizer"} for zero in (0, 1, 2, 3)),
    {"zero": 3, "offload": "optimizer+params"},
]
GLOO_COPIES = 3 * SEQ * 32 * 4
"""Bytes: gloo's collectives copy hidden states that they send, and these models are that small."""
CASES = [
    *(
        Case(model=model, precision=precision, mbs=1, **layout, **kind)
        for layout in LAYOUTS
        for kind in STAGES
        for model, precision in ((UNTIED, "fp32"), (TIED, "bf16"))
    ),
    *(
        Case(model=(UNTIED, TIED)[(i + j) % 2], precision=("fp32", "bf16")[(i + j) % 2], mbs=1, **layout, **kind)
        for i, layout in enumerate(LAYOUTS)
        for j, kind in enumerate(OFFLOADS)
    ),
    *(Case(model=UNTIED, precision="bf16", mbs=2, **kind) for kind in OFFLOADS),  # one rank
    *(Case(model=TIED, precision="bf16", grads="bf16", mbs=2, dp=2, **kind) for kind in (STAGES[2], OFFLOADS[2])),
    *(Case(model=m, zero=z, precision="bf16", mbs=2, dp=2) for m in (QWEN2, QWEN3) for z in (2, 3)),
    *(Case(model=m, zero=3, precision="fp32", mbs=1, dp=2, keep=True) for m in (UNTIED, TIED)),
    *(Case(model=m, zero=z, precision="bf16", mbs=1, pp=2, dp=2, v=2) for m in (UNTIED, TIED) for z in (0, 2, 3)),
    *(
        Case(model=m, zero=z, precision="fp32", mbs=1, pp=2, dp=2, schedule="gpipe")
        for m in (UNTIED, TIED)
        for z in (0, 3)
    ),
    Case(model=TIED, zero=2, precision="fp32", mbs=1, dp=4, shard=2),
    Case(model=UNTIED, precision="bf16", mbs=2, tp=2, sp=False),
    Case(model=QWEN3, precision="fp64", mbs=2, tp=2),
    Case(model=UNTIED, zero=3, precision="fp32"),  # one rank: nothing to share
]


def parallel_of(case: Case) -> ParallelConfig:
    """What make_engine uses."""
    return ParallelConfig(
        tp=case.tp, pp=case.pp, virtual_stages=case.v, schedule=case.schedule, sequence_parallel=case.sp,
        zero=case.zero, zero_keep=case.keep, zero_shard_size=case.shard, offload=case.offload, bucket_size=5000,
    )  # fmt: skip


def predicted(case: Case, *, pp_rank: int | None = None) -> MemoryPlan:
    return predict_memory(
        MODELS[case.model],
        parallel_of(case),
        dp=case.dp,
        micro_batch_size=case.mbs,
        seq_length=SEQ,
        num_microbatches=BATCH // case.dp // case.mbs,
        numerics=NumericsConfig(precision=case.precision, grad_dtype=case.grads),
        recompute=case.recompute,
        device_type="cpu",
        pp_rank=pp_rank,
    )


def measure(rank: int, world_size: int, cases: list[Case]) -> dict[str, tuple[int, MeasuredMemory]]:
    """(pipeline rank, what it held in a step)."""
    found = {}
    for case in cases:
        engine = make_engine(case)
        with watch_memory(engine) as watch:
            engine.train_step(labelled(own_batch(0, engine.mesh)), language_model_loss)
        found[case.name] = (engine.mesh.pp.rank, watch.result())
    return found


@once
def measured(world_size: int) -> list[dict[str, tuple[int, MeasuredMemory]]]:
    return run_ranks(measure, world_size, [c for c in CASES if c.world_size == world_size])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_hold_what_was_predicted(case: Case) -> None:
    if case.offload != "none" and why_absent():
        pytest.skip(f"torch's AdamW on the host keeps no bf16 weights to send: {why_absent()}")
    for rank in measured(case.world_size):
        pp_rank, held = rank[case.name]
        plan = predicted(case, pp_rank=pp_rank)
        for cause in ("parameters", "gradients", "optimizer"):
            assert getattr(held.device, cause) == getattr(plan.device, cause), cause
            assert getattr(held.host, cause) == getattr(plan.host, cause), cause
        assert plan.device.activations == pytest.approx(held.device.activations, rel=0.05, abs=GLOO_COPIES)
        assert held.device.buffers is not None and plan.device.buffers is not None
        if case.offload == "none":
            assert held.device.buffers == plan.device.buffers
        else:  # of which the sum that comes back from the host was seen among activations
            assert held.device.buffers <= plan.device.buffers <= 1.5 * held.device.buffers
        assert held.peak <= held.device.total <= 1.05 * plan.device.total


def test_the_plan_is_the_rank_s_that_needs_most() -> None:
    case = Case(model=UNTIED, precision="fp32", mbs=1, pp=2, dp=2, schedule="gpipe")
    totals = [predicted(case, pp_rank=rank).device.total for rank in range(2)]
    assert predicted(case).device.total == max(totals) > min(totals)
    assert predicted(case).pp_rank == totals.index(max(totals))


_WIDTHS: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": 301}
LLAMA = tiny_config("llama", num_key_value_heads=2, intermediate_size=172, head_dim=16, **_WIDTHS)
GPT2 = tiny_config("gpt2", num_key_value_heads=4, intermediate_size=256, head_dim=16, **_WIDTHS)
SHAPES: dict[str, ModelConfig] = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "gpt2_dropout": GPT2.replace(hidden_dropout=0.1),
    "gpt2_dropouts": GPT2.replace(hidden_dropout=0.1, attention_dropout=0.1),
    "llama_wide_head": LLAMA.replace(vocab_size=4100, num_hidden_layers=1),
    "llama_values": LLAMA.replace(head="scalar"),
    "mistral": tiny_config("mistral", num_key_value_heads=2, intermediate_size=172, head_dim=16, **_WIDTHS),
    "qwen3": tiny_config("qwen3", num_key_value_heads=2, intermediate_size=172, head_dim=12, **_WIDTHS),
}
RUNS = [
    *itertools.product(("llama", "gpt2"), ("fp32", "bf16"), ("none", "selective", "full")),
    *itertools.product(("gpt2_dropouts", "mistral", "qwen3"), ("bf16",), ("none", "selective", "full")),
    *itertools.product(("gpt2_dropout", "llama_wide_head", "llama_values"), ("fp32", "bf16"), ("none", "full")),
    ("llama", "fp64", "none"),
]


def held_in_a_step(
    config: ModelConfig, precision: str, recompute: Recompute = "none", *, fused: tuple[str, ...] = (), count: int = 2
) -> tuple[int, MemoryPlan]:
    """Measured activations of so many microbatches of 2 x 64 tokens on one rank, and the plan."""
    numerics = NumericsConfig(precision=precision)  # type: ignore[arg-type]
    backends = Backends(dict.fromkeys(fused, "triton"))
    engine = Engine(
        config, Mesh.build(), micro_batch_size=2, precision=numerics, recompute=recompute, backends=backends
    )
    ids = torch.randint(0, config.vocab_size, (2 * count, 65), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}

    def loss(output: Any, batch: dict[str, torch.Tensor]) -> Any:
        if config.head == "lm":
            return language_model_loss(output, batch)
        return output.square().sum(), torch.ones(()), {}

    with watch_memory(engine) as watch:
        engine.train_step(batch, loss)
    plan = predict_memory(
        config, ParallelConfig(), dp=1, micro_batch_size=2, seq_length=64, num_microbatches=count, recompute=recompute,
        numerics=numerics, device_type="cpu", fused=fused,
    )  # fmt: skip
    found = watch.result().device.activations
    assert found is not None
    return found, plan


@pytest.mark.parametrize(("shape", "precision", "recompute"), RUNS)
def test_activations_are_within_5_percent(shape: str, precision: str, recompute: Recompute) -> None:
    found, plan = held_in_a_step(SHAPES[shape], precision, recompute)
    assert plan.device.activations == pytest.approx(found, rel=0.05)


@pytest.fixture
def cycles_end_at_once() -> Iterator[None]:
    """Triton's interpreter leaves what a kernel was given in a cycle of references."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20, 1, 1)
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels, which a process with a GPU does not")
@pytest.mark.parametrize("fused", [("attention", "rope"), ("cross_entropy",)], ids="+".join)
def test_kernels_keep_what_was_predicted(fused: tuple[str, ...], cycles_end_at_once: None) -> None:
    pytest.importorskip("triton")
    config = LLAMA.replace(num_hidden_layers=1)
    found, plan = held_in_a_step(config, "fp32", fused=fused, count=1)
    plain = held_in_a_step(config, "fp32", count=1)[1]
    assert plan.device.activations == pytest.approx(found, rel=0.05)
    assert plan.device.activations != plain.device.activations


def test_a_watch_sees_the_most_at_once_and_what_is_freed() -> None:
    engine = Engine(LLAMA, Mesh.build())
    with watch_memory(engine) as watch:
        for _ in range(3):
            first = torch.ones(1000)
            second = first + 1  # 4000 bytes each: two at once
            del first, second
        flat = torch.ones(3000)
        flat[:1000].add_(1)  # a view is no second tensor
        flat.untyped_storage().resize_(0)
        torch.ones(2900)
        assert engine.flat is not None
        engine.flat.buckets[0].params.mul_(1.0)  # states are counted apart
    held = watch.result()
    assert held.device.activations == 12000
    assert held.peak == held.device.total
    assert held.allocator_peak is None


def report_three_steps(rank: int, world_size: int) -> tuple[list[int], str, MeasuredMemory, MeasuredMemory]:
    case = Case(model=TIED, precision="bf16", mbs=1, pp=2, zero=1)
    engine = make_engine(case)
    tables: list[str] = []
    report = MemoryReport(engine, predicted(case), announce=tables.append)
    counts = []
    for step in range(3):
        with report.step():
            engine.train_step(labelled(own_batch(step, engine.mesh)), language_model_loss)
        counts.append(len(tables))
    watch = watch_memory(engine)
    return counts, tables[0], watch.result(), largest(watch.result(), engine.mesh)


def test_the_report_comes_once_with_the_largest_of_all_ranks() -> None:
    (counts, table, first, most), (also_counts, also_table, second, also_most) = run_ranks(report_three_steps, 2)
    assert counts == also_counts == [0, 1, 1]
    assert table == also_table and "measured" in table
    assert most == also_most
    assert most.peak == max(first.peak, second.peak)
    assert most.device.parameters == max(first.device.parameters or 0, second.device.parameters or 0)
    assert most.allocator_peak is None


def test_states_that_were_not_watched_are_not_invented() -> None:
    engine = Engine(LLAMA, Mesh.build())
    assert engine.flat is not None and engine.gradients is not None and engine.optimizer is not None
    device, host = held_states(engine.flat, engine.gradients, engine.optimizer)
    assert device.activations is None and device.buffers is None
    assert device.parameters == sum(p.numel() * 4 for p in engine.model.parameters())
    assert host.total == 0
    assert isinstance(watch_memory(engine), MemoryWatch)
