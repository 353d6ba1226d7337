"""Frozen linears in 4 bits (QLoRA): adapters train alike on every layout, beside bitsandbytes' numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gathered import Part, assembled, parts_of
from training_cases import BATCH, MODELS, SEQ, Case, make_engine, once, own_batch, train

from megallm.checkpoint.nf4 import code_slices
from megallm.config.check_lora import check_lora
from megallm.config.lora import LoraConfig
from megallm.config.model import ModelConfig
from megallm.config.numerics import NumericsConfig
from megallm.config.parallel import ParallelConfig
from megallm.model.transformer import Transformer
from megallm.monitor.memory import MemoryWatch, held_states
from megallm.ops.backends import Backends
from megallm.ops.nf4 import all_blocks, dequantize, quantize, quantize_scales
from megallm.optim.flat import refill
from megallm.parallel.mesh import Mesh
from megallm.planner.memory import predict_memory
from megallm.testing.pool import run_ranks
from megallm.testing.tiny import tiny_config
from megallm.trainers.engine import Engine

STEPS = 10
_WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 32}
CONFIGS: dict[str, ModelConfig] = {
    "llama": tiny_config("llama", num_hidden_layers=3, num_key_value_heads=2, **_WIDE),
    # A key/value head that both tp ranks hold; norms of q and k; a tied embedding.
    "qwen3": tiny_config("qwen3", num_hidden_layers=2, num_key_value_heads=1, **_WIDE),
}
LORA = LoraConfig(lora_rank=3, lora_alpha=7.0, lora_dropout=0.2, lora_base="nf4")
SINGLE = LoraConfig(lora_rank=4, lora_targets=("q_proj", "down_proj"), lora_base="nf4", lora_double_quant=False)
KINDS = {"double": LORA, "single": SINGLE}

# The one-rank runs are the first ones.
CASES = [
    (Case(model="llama"), "double"),
    (Case(model="qwen3"), "single"),
    (Case(model="llama", mbs=2, recompute="full"), "double"),
    (Case(model="llama", offload="optimizer"), "double"),
    (Case(model="llama", tp=2), "double"),
    (Case(model="llama", tp=2, sp=False), "double"),
    (Case(model="qwen3", tp=2, mbs=2), "single"),
    (Case(model="llama", pp=2, mbs=2), "double"),
    (Case(model="llama", dp=2, zero=2, mbs=2), "double"),
    (Case(model="llama", dp=2, zero=3), "double"),
    (Case(model="qwen3", dp=2, zero=3, mbs=2, offload="optimizer+params"), "single"),
    (Case(model="llama", tp=2, pp=2, mbs=2), "double"),
]


def engine_of(case: Case, lora: LoraConfig | None, **overrides: Any) -> Engine:
    return make_engine(case, config=CONFIGS[case.model], lora=lora, **overrides)


def trained_parts(engine: Engine) -> list[Part]:
    if engine.flat is not None:
        engine.flat.gather()
    return parts_of(engine.model, {n: p.data for n, p in engine.model.named_parameters() if p.requires_grad})


def code_parts(model: Transformer) -> list[Part]:
    """Codes and scales; in fp64, so that gaps can be found."""
    return [Part(s.name, s.shape, s.start, s.data.double()) for s in code_slices(model)]


def train_all(rank: int, world_size: int, cases: list[tuple[Case, str]]) -> dict[str, Any]:
    found = {}
    for case, kind in cases:
        engine = engine_of(case, KINDS[kind])
        curve = train(engine, 0, STEPS)
        found[case.name] = (curve, trained_parts(engine), code_parts(engine.model))
    return found


@once
def trained(world_size: int) -> dict[str, tuple[list[tuple[float, float]], dict[str, Any], dict[str, Any]]]:
    ranks = run_ranks(train_all, world_size, [each for each in CASES if each[0].world_size == world_size])
    return {
        name: (ranks[0][name][0], *(assembled([rank[name][i] for rank in ranks]) for i in (1, 2))) for name in ranks[0]
    }


@pytest.mark.parametrize(("case", "kind"), CASES, ids=lambda value: getattr(value, "name", value))
def test_ten_steps_equal_the_one_rank_run(case: Case, kind: str) -> None:
    expected_curve, expected, codes = trained(1)[case.model]
    curve, actual, own_codes = trained(case.world_size)[case.name]
    assert set(own_codes) == set(codes) and all(torch.equal(own_codes[name], codes[name]) for name in codes)
    for (loss, norm), (true_loss, true_norm) in zip(curve, expected_curve, strict=True):
        assert abs(loss / true_loss - 1) < 1e-9
        assert abs(norm / true_norm - 1) < 1e-9
    assert set(actual) == set(expected)
    assert all(torch.allclose(actual[name], expected[name], rtol=0, atol=1e-9) for name in expected)


@pytest.mark.parametrize("model", CONFIGS)
def test_the_runs_learn(model: str) -> None:
    losses = [loss for loss, _ in trained(1)[model][0]]
    assert sum(losses[-3:]) < sum(losses[:3])


# -- what is in 4 bits -------------------------------------------------------------------------------------------------


def with_dequantised_base(engine: Engine) -> Engine:
    """The one-rank engine, whose linears then hold, dense, what they would be in 4 bits."""
    with torch.no_grad():
        for name, spec, parameter in engine.model.slices():
            for piece in spec.pieces if name.endswith("_proj.weight") else ():
                view = piece.local(parameter.data)
                packed = quantize(view)
                scales = quantize_scales(packed.absmax)
                dequantize(packed.codes, scales, all_blocks(view.numel()), out=view)
    return engine


def test_a_run_is_that_of_dense_weights_with_the_same_numbers() -> None:
    """Each projection quantised by itself, on its own; to the bit, in the step and without adapters."""
    case = Case(model="llama")
    curve = trained(1)["llama"][0]
    dense = with_dequantised_base(engine_of(case, replace(LORA, lora_base="model")))
    assert train(dense, 0, STEPS) == curve
    plain = with_dequantised_base(engine_of(case, None))
    assert train(plain, 0, 1)[0][0] == pytest.approx(curve[0][0], rel=1e-12)


def logits(engine: Engine) -> list[torch.Tensor]:
    return engine.forward({"input_ids": own_batch(0, engine.mesh)["input_ids"]}, lambda out, _: out.local)


def test_adapters_off_gives_the_quantised_base_to_the_bit() -> None:
    case = Case(model="qwen3", precision="fp32")
    engine = engine_of(case, LORA)
    base = with_dequantised_base(engine_of(case, None, train=False))
    assert not torch.equal(logits(engine)[0], logits(engine_of(case, None))[0])
    train(engine, 0, 2)
    with engine.model.adapters_off():
        assert all(map(torch.equal, logits(engine), logits(base)))
    assert not torch.equal(logits(engine)[0], logits(base)[0])


def test_only_adapters_change_and_have_gradients() -> None:
    engine = engine_of(Case(model="llama", precision="bf16"), LORA)
    before = [tensor.clone() for held in engine.model.quantized.values() for tensor in held.tensors()]
    train(engine, 0, 2)
    after = [tensor for held in engine.model.quantized.values() for tensor in held.tensors()]
    assert all(map(torch.equal, before, after)) and len(engine.model.quantized) == 4 * 3
    assert engine.gradients is not None
    assert set(engine.gradients.named()) == {n for n, spec in engine.model.specs.items() if spec.is_adapter}


def test_a_bf16_run_follows_the_fp32_one() -> None:
    curves = [train(engine_of(Case(model="llama", precision=p), LORA), 0, 3) for p in ("fp32", "bf16")]
    for (loss, norm), (true_loss, true_norm) in zip(curves[1], curves[0], strict=True):
        assert loss == pytest.approx(true_loss, rel=0.01) and norm == pytest.approx(true_norm, rel=0.1)


def test_the_triton_kernel_gives_the_same_run_to_the_bit() -> None:
    case, said = Case(model="qwen3", precision="fp32", mbs=8), []
    forced = Backends({"nf4": "triton"}, announce=said.append)
    assert train(engine_of(case, LORA, backends=forced), 0, 1) == train(engine_of(case, LORA), 0, 1)
    assert "nf4: triton (asked for)" in said


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_model_of_50_million_parameters_holds_half_a_byte_for_each_of_its_linears() -> None:
    config = tiny_config(
        "llama", num_hidden_layers=14, num_key_value_heads=8, hidden_size=512, intermediate_size=1792,
        num_attention_heads=8, head_dim=64,
    )  # fmt: skip
    mesh = Mesh.build(tp=1, pp=1)
    model = Transformer(
        config, mesh, partition=[range(14)], dtype=torch.bfloat16, lora=LoraConfig(lora_rank=8, lora_base="nf4")
    )
    in_4_bits = sum(t.untyped_storage().size() for held in model.quantized.values() for t in held.tensors())
    linears = sum(held.parameter.numel() for held in model.quantized.values())
    assert linears > 50e6 and not any(held.parameter.untyped_storage().size() for held in model.quantized.values())
    assert 0.5156 < in_4_bits / linears < 0.517
    others = {n: p for n, p in model.named_parameters() if n not in model.quantized}
    held = sum(p.untyped_storage().size() for p in others.values()) + in_4_bits
    dense = 2 * (linears + sum(p.numel() for n, p in others.items() if not model.specs[n].is_adapter))
    assert held < 0.3 * dense


def test_filling_makes_one_weight_dense_at_a_time() -> None:
    case = Case(model="llama", precision="fp32")
    engine = engine_of(case, LORA)
    assert engine.flat is not None and engine.gradients is not None and engine.optimizer is not None
    weights = [held.parameter for held in engine.model.quantized.values()]
    with MemoryWatch(engine.flat, engine.gradients, engine.optimizer) as watch:
        train(engine, 0, 1)
    states, _ = held_states(engine.flat, engine.gradients, engine.optimizer)
    assert watch.result().device.parameters == states.parameters
    seen = 0
    for names in refill(engine.model, engine.flat):
        dense = [w for w in weights if w.untyped_storage().size()]
        seen += len(dense)
        assert len(dense) == len(names & set(engine.model.quantized)) <= 1
    assert seen == len(weights) and not any(w.untyped_storage().size() for w in weights)


PLANNED = [
    Case(model="llama", precision="bf16"),
    Case(model="qwen3", tp=2, precision="bf16"),
    Case(model="llama", pp=2, precision="fp32", mbs=2),
    Case(model="llama", dp=2, zero=3, precision="bf16", mbs=2),
    Case(model="llama", precision="bf16", offload="optimizer"),
]


def measure(rank: int, world_size: int, cases: list[tuple[Case, LoraConfig]]) -> list[tuple[Any, ...]]:
    found = []
    for case, lora in cases:
        engine = engine_of(case, lora)
        train(engine, 0, 1)
        assert engine.flat is not None and engine.gradients is not None and engine.optimizer is not None
        for bucket in engine.flat.buckets:
            bucket.release()
        plan = predict_memory(
            engine.config,
            ParallelConfig(tp=case.tp, pp=case.pp, zero=case.zero, offload=case.offload, bucket_size=5000),
            dp=case.dp, micro_batch_size=case.mbs, seq_length=SEQ, num_microbatches=BATCH // case.dp // case.mbs,
            numerics=NumericsConfig(precision=case.precision), lora=lora, device_type="cpu",
            pp_rank=engine.mesh.pp.rank,
        )  # fmt: skip
        found.append((*held_states(engine.flat, engine.gradients, engine.optimizer), plan))
    return found


@once
def measured(world_size: int) -> list[Any]:
    cases = [(case, lora) for case in PLANNED for lora in (LORA, SINGLE) if case.world_size == world_size]
    return run_ranks(measure, world_size, cases)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_plan_s_states_are_those_held(world_size: int) -> None:
    for rank in measured(world_size):
        for device, host, plan in rank:
            for name in ("parameters", "gradients", "optimizer"):
                assert getattr(device, name) == getattr(plan.device, name), name
                assert getattr(host, name) == getattr(plan.host, name), name


# -- rules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "changes", "options", "words"),
    [
        (replace(LORA, lora_rank=0), {}, {}, "with lora_rank 0.*lora_rank 16 for example, or lora_base model"),
        (LORA, {}, {"precision": "fp8"}, "precision fp8.*use precision bf16"),
        (LORA, {}, {"tp": 4}, r"tp 4: of o_proj \[128, 128\] a rank holds \[128, 32\].*use tp 1 or 2, or lora_base"),
        (LORA, {"intermediate_size": 160}, {"tp": 2}, r"of down_proj \[128, 160\] a rank holds \[128, 80\].*use tp 1"),
        (LORA, {"intermediate_size": 257}, {}, "down_proj has 257 inputs, an odd number"),
    ],
)
def test_what_cannot_be_is_refused_in_words(lora: LoraConfig, changes: Any, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_lora(lora, CONFIGS["llama"].replace(**changes), **options)


def test_an_engine_refuses_fp8_and_small_models_are_welcome_on_one_rank() -> None:
    with pytest.raises(ValueError, match="lora_base nf4 with precision fp8"):
        Engine(CONFIGS["llama"], Mesh.build(tp=1, pp=1), precision="fp8", lora=LORA)
    engine = make_engine(Case(model="llama_untied"), lora=LORA)  # 32 and 48 inputs: blocks run over the ends of rows
    assert train(engine, 0, 1) and set(MODELS) > {"llama_untied"}
