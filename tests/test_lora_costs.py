"""What adapters send over tp, and what the planner says a rank holds of them and of frozen weights."""

from __future__ import annotations

from fractions import Fraction

import pytest
from training_cases import BATCH, MODELS, SEQ, Case, make_engine, once, own_batch, train

from megallm.config.lora import LoraConfig
from megallm.config.numerics import NumericsConfig
from megallm.config.parallel import ParallelConfig
from megallm.monitor.memory import held_states
from megallm.planner.memory import CauseBytes, MemoryPlan, predict_memory
from megallm.testing.pool import run_ranks
from megallm.trainers.losses import language_model_loss

UNTIED, TIED, QWEN2, QWEN3 = list(MODELS)[:4]
SOME = LoraConfig(lora_rank=4, lora_targets=("v_proj", "q_proj", "down_proj"), lora_rslora=True)

# -- traffic -----------------------------------------------------------------------------------------------------------

RANK = 3
SENT = [Case(model=UNTIED, tp=2), Case(model=UNTIED, tp=2, sp=False, mbs=2)]
ADDED = {"k_proj": "column", "up_proj": "column", "o_proj": "row", "down_proj": "row"}


def count(rank: int, world_size: int) -> dict[tuple[str, str], int]:
    """Elements sent over tp in a step, with adapters of q_proj and of one more projection ("" = none)."""
    found = {}
    for case in SENT:
        for added in ("", *ADDED):
            targets = ("q_proj", added) if added else ("q_proj",)
            engine = make_engine(case, lora=LoraConfig(lora_rank=RANK, lora_targets=targets))
            with engine.mesh.recorder.recording() as recorder:
                engine.train_step(own_batch(0, engine.mesh), language_model_loss)
            found[case.name, added] = recorder.elements("tp")
    return found


@once
def counted() -> list[dict[tuple[str, str], int]]:
    return run_ranks(count, 2)


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("case", SENT, ids=lambda case: case.name)
def test_an_adapter_sends_its_rank_a_token(case: Case, added: str) -> None:
    """u forward and its gradient backward, or twice as much one way; and partial gradients of what all ranks hold."""
    model, share = MODELS[case.model], Fraction(1, 2)
    tokens = 2 * BATCH * SEQ * RANK * share * model.num_hidden_layers
    partial = 0 if case.sp is False else 2 * model.hidden_size * RANK * share * model.num_hidden_layers
    for rank in counted():
        assert rank[case.name, added] - rank[case.name, ""] == tokens + partial


# -- memory ------------------------------------------------------------------------------------------------------------

PLANNED = [
    Case(model=UNTIED, precision="bf16"),
    Case(model=QWEN3, tp=4, precision="bf16"),
    Case(model=TIED, pp=2, dp=2, zero=1, precision="bf16"),
    Case(model=UNTIED, dp=2, zero=2, precision="fp32"),
    Case(model=QWEN2, dp=2, zero=3, precision="bf16", mbs=2),
    Case(model=UNTIED, dp=2, zero=3, offload="optimizer+params", precision="bf16"),
]


def measure(rank: int, world_size: int, cases: list[Case]) -> list[tuple[CauseBytes, CauseBytes, MemoryPlan]]:
    found = []
    for case in cases:
        engine = make_engine(case, lora=SOME)
        train(engine, 0, 1)
        assert engine.flat is not None and engine.gradients is not None and engine.optimizer is not None
        for bucket in engine.flat.buckets:
            bucket.release()
        plan = predict_memory(
            engine.config,
            ParallelConfig(tp=case.tp, pp=case.pp, zero=case.zero, offload=case.offload, bucket_size=5000),
            dp=case.dp,
            micro_batch_size=case.mbs,
            seq_length=SEQ,
            num_microbatches=BATCH // case.dp // case.mbs,
            numerics=NumericsConfig(precision=case.precision),
            lora=SOME,
            device_type="cpu",
            pp_rank=engine.mesh.pp.rank,
        )
        found.append((*held_states(engine.flat, engine.gradients, engine.optimizer), plan))
    return found


@once
def measured(world_size: int) -> list[list[tuple[CauseBytes, CauseBytes, MemoryPlan]]]:
    return run_ranks(measure, world_size, [case for case in PLANNED if case.world_size == world_size])


@pytest.mark.parametrize("case", PLANNED, ids=lambda case: case.name)
def test_the_plan_s_states_are_those_held(case: Case) -> None:
    place = [each for each in PLANNED if each.world_size == case.world_size].index(case)
    for rank in measured(case.world_size):
        device, host, plan = rank[place]
        for name in ("parameters", "gradients", "optimizer"):
            assert getattr(device, name) == getattr(plan.device, name), name
            assert getattr(host, name) == getattr(plan.host, name), name
