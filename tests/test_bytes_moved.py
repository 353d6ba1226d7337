r"""What one optimizer step moves between ranks, counted, equals what formulas say, element for element, on every axis.

Counted is what a rank sends with ring algorithms (megallm.parallel.recorder). Letters: b s tokens of a microbatch
(T = b s), h hidden, L layers of this rank, V' vocabulary padded to t, m microbatches, t p d sizes of tp, pp, dp,
v virtual stages; f = (t-1)/t. An all-reduce of n elements sends 2 n f, an all-gather to n or a reduce-scatter of n
sends n f.

tp, a microbatch:
    layer, without SP       forward: 2 row layers all-reduce T h; backward: 2 column layers likewise      8 T h f
    layer, with SP          forward: 2 gathers, 2 reduce-scatters; backward: likewise;                    8 T h f
                            backward also gathers the inputs of both column layers again                + 2 T h f
    full recomputation      the layer's forward once more                                               + 4 T h f
    embedding               without SP: all-reduce forward; with SP: reduce-scatter, gather backward      2 T h f
    head                    a column layer: without SP 2 T h f; with SP gather, reduce-scatter, gather    3 T h f
    loss                    gathers 2 numbers a token from each rank, 2 T t in all                        2 T t f
    both, in a microbatch   logits are made of the n tokens with labels alone, by who has gathered    2 T h f and
    that lacks labels       all inputs and keeps them: backward gathers nothing again                     2 n t f
tp, a step:
    gradients in common     one all-reduce of what tp ranks hold alike but compute in part: all norms and biases of
                            row layers under SP, q/k norms always, and K D H for k and for v a layer when t > K
    gradient norm           one number                                                                    2 f
pp, a step, all ranks:      every boundary between stages, forward and backward (/ t with SP)   2 (p v - 1) m T h
                            gradient norm: one number on every rank                             p 2 (p-1)/p
dp, a step:                 gradients of all local parameters, the counts of labels and tokens  2 (d-1)/d (n + 2)
embedding, a step:          the tied embedding's gradient, on the ranks of the first and the last stage    V'/t h
Nothing else moves: the total of each axis is the sum of its terms.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from training_cases import BATCH, MODELS, SEQ, Case, labelled, make_engine, once, own_batch

from megallm.config.model import ModelConfig
from megallm.testing.pool import run_ranks
from megallm.trainers.losses import language_model_loss

UNTIED, TIED, QWEN2, QWEN3 = list(MODELS)[:4]
AXES = ("tp", "pp", "dp", "cp", "embedding", "world")
CASES = [
    Case(model=UNTIED, tp=2),
    Case(model=UNTIED, tp=2, sp=False),
    Case(model=UNTIED, tp=2, recompute="full"),
    Case(model=UNTIED, tp=2, sp=False, recompute="full", mbs=2),
    Case(model=TIED, tp=2, recompute="selective"),
    Case(model=QWEN3, tp=2, sp=False),
    Case(model=QWEN3, tp=4),
    Case(model=UNTIED, tp=4, sp=False, mbs=8),
    Case(model=UNTIED, tp=4),  # 2 key/value heads on 4 ranks
    Case(model=UNTIED, pp=2),
    Case(model=TIED, pp=2, v=2),
    Case(model=UNTIED, pp=4, schedule="gpipe", mbs=2),
    Case(model=UNTIED, dp=2),
    Case(model=QWEN2, dp=4, mbs=2),
    Case(model=UNTIED, tp=2, pp=2),
    Case(model=TIED, tp=2, pp=2, sp=False, v=2),
    Case(model=QWEN2, tp=2, dp=2),
    Case(model=TIED, pp=2, dp=2),
    Case(model=UNTIED, tp=2, pp=2, precision="bf16"),
    Case(model=UNTIED, pp=2, dp=2, precision="bf16"),
    Case(model=TIED, tp=2, pp=2, dp=2),
]
IDS = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
TP_CASES = pytest.mark.parametrize("case", [c for c in CASES if c.tp > 1], ids=lambda case: case.name)
PP_CASES = pytest.mark.parametrize("case", [c for c in CASES if c.pp > 1], ids=lambda case: case.name)


def count_step(rank: int, world_size: int, cases: list[Case], has_all: bool) -> dict[str, dict[str, Any]]:
    """What this rank sent in one step, and the shape of what it holds, by the case's name."""
    found = {}
    for case in cases:
        engine = make_engine(case)
        batch = own_batch(0, engine.mesh)
        batch = labelled(batch) if has_all else batch
        with engine.mesh.recorder.recording() as recorder:
            engine.train_step(batch, language_model_loss)
        stages = [engine.model.stage(i) for i in range(engine.mesh.pp.rank, engine.num_stages, engine.mesh.pp.size)]
        found[case.name] = {
            "elements": {axis: recorder.elements(axis) for axis in AXES},
            "bytes": {axis: recorder.bytes(axis) for axis in AXES},
            "sent": recorder.elements("pp", "send"),
            "sent_bytes": recorder.bytes("pp", "send"),
            "labels": [int((part != -100).sum()) for part in batch["labels"].split(case.mbs)],
            "parameters": sum(p.numel() for p in engine.model.parameters()),
            "layers": sum(len(stage.layers) for stage in stages),
            "is_first": any(stage.is_first for stage in stages),
            "is_last": any(stage.is_last for stage in stages),
        }
    return found


@once
def measured(world_size: int, has_all: bool = True) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(count_step, world_size, [c for c in CASES if c.world_size == world_size], has_all)


def ranks_of(case: Case, *, has_all: bool = True) -> list[dict[str, Any]]:
    return [found[case.name] for found in measured(case.world_size, has_all)]


def uses_sp(case: Case) -> bool:
    return case.tp > 1 and case.sp is not False


def microbatches(case: Case) -> int:
    return BATCH // case.dp // case.mbs


def tokens(case: Case) -> int:
    return case.mbs * SEQ


def in_common(case: Case, config: ModelConfig, held: dict[str, Any]) -> int:
    """Gradient elements that are summed over tp: held by several ranks, computed in part by each."""
    h, kv, dim = config.hidden_size, config.num_key_value_heads, config.head_dim
    total = 0
    per_norm = 2 * h if config.norm == "layernorm" else h
    if uses_sp(case):
        total += held["layers"] * (2 * per_norm + h * config.attention_out_bias + h * config.mlp_bias)
        total += per_norm * held["is_last"]
        if config.position_embedding == "learned" and held["is_first"]:
            total += config.max_position_embeddings * h
    if config.qk_norm:
        total += held["layers"] * 2 * dim
    if case.tp > kv:
        total += held["layers"] * 2 * kv * dim * (h + config.attention_bias)
    return total


def tp_terms(case: Case, held: dict[str, Any]) -> dict[str, Fraction]:
    """The formulas of this module's docstring for one rank and step, by term."""
    config, f = MODELS[case.model], Fraction(case.tp - 1, case.tp)
    sp, m, th = uses_sp(case), microbatches(case), tokens(case) * config.hidden_size
    per_layer = 8 + 2 * sp + 4 * (case.recompute == "full")
    num_whole = sum(number == tokens(case) for number in held["labels"])
    return {
        "layers": held["layers"] * m * per_layer * th * f,
        "embedding": m * 2 * th * f * held["is_first"],
        "head": (2 * m + sp * num_whole) * th * f * held["is_last"],
        "loss": 2 * sum(held["labels"]) * case.tp * f * held["is_last"],
        "gradients in common": 2 * f * in_common(case, config, held),
        "gradient norm": 2 * f,
    }


@TP_CASES
def test_tensor_parallel_traffic_is_the_sum_of_its_formulas(case: Case) -> None:
    for has_all in (True, False):
        for held in ranks_of(case, has_all=has_all):
            assert held["elements"]["tp"] == int(sum(tp_terms(case, held).values()))


@TP_CASES
def test_layers_send_8_bsh_and_10_with_sequence_parallelism(case: Case) -> None:
    """What is left when embedding, head, loss, common gradients and norm are taken away, a layer and microbatch."""
    for held in ranks_of(case):
        others = sum(value for name, value in tp_terms(case, held).items() if name != "layers")
        left = held["elements"]["tp"] - math.floor(others)  # the recorder's total is rounded down, too
        bsh = tokens(case) * MODELS[case.model].hidden_size * Fraction(case.tp - 1, case.tp)
        expected = (10 if uses_sp(case) else 8) + (4 if case.recompute == "full" else 0)
        assert left / (held["layers"] * microbatches(case) * bsh) == expected


@PP_CASES
def test_every_boundary_is_crossed_once_forward_and_once_backward(case: Case) -> None:
    h = MODELS[case.model].hidden_size
    per_message = tokens(case) * h // (case.tp if uses_sp(case) else 1)
    expected = 2 * (case.pp * case.v - 1) * microbatches(case) * per_message * case.tp * case.dp
    assert sum(held["sent"] for held in ranks_of(case)) == expected


@PP_CASES
def test_a_rank_sends_forward_for_all_stages_but_the_last_and_backward_for_all_but_the_first(case: Case) -> None:
    per_message = tokens(case) * MODELS[case.model].hidden_size // (case.tp if uses_sp(case) else 1)
    for held in ranks_of(case):
        messages = 2 * case.v - held["is_first"] - held["is_last"]
        assert held["sent"] == messages * microbatches(case) * per_message
        norm = Fraction(2 * (case.pp - 1), case.pp)
        assert held["elements"]["pp"] == int(held["sent"] + norm)


@IDS
def test_data_parallel_reduces_every_local_parameter_once(case: Case) -> None:
    for held in ranks_of(case):
        share = Fraction(2 * (case.dp - 1), case.dp)
        assert held["elements"]["dp"] == int(share * (held["parameters"] + 2))


@IDS
def test_the_tied_embedding_is_reduced_once_between_first_and_last_stage(case: Case) -> None:
    config = MODELS[case.model]
    rows = math.ceil(config.vocab_size / case.tp)
    for held in ranks_of(case):
        is_end = held["is_first"] or held["is_last"]
        is_shared = config.tie_word_embeddings and case.pp > 1 and is_end
        assert held["elements"]["embedding"] == (rows * config.hidden_size if is_shared else 0)


@IDS
def test_axes_of_size_one_and_the_world_carry_nothing(case: Case) -> None:
    for held in ranks_of(case):
        idle = {axis for axis in ("tp", "pp", "dp") if getattr(case, axis) == 1} | {"cp", "world"}
        assert {axis: held["elements"][axis] for axis in idle} == dict.fromkeys(idle, 0)


@pytest.mark.parametrize("case", [c for c in CASES if c.precision == "bf16"], ids=lambda case: case.name)
def test_bf16_sends_activations_in_2_bytes_and_gradients_in_4(case: Case) -> None:
    for held in ranks_of(case):
        assert held["sent_bytes"] == 2 * held["sent"]
        if case.dp > 1:  # the counts are int64
            share = Fraction(2 * (case.dp - 1), case.dp)
            assert held["bytes"]["dp"] == int(share * (4 * held["parameters"] + 16))
        if case.tp > 1:  # loss and common gradients fp32, the norm fp64
            sizes = {"loss": 4, "gradients in common": 4, "gradient norm": 8}
            terms = tp_terms(case, held)
            assert held["bytes"]["tp"] == int(sum(value * sizes.get(name, 2) for name, value in terms.items()))
