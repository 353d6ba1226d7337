"""Frozen linears in 4 bits and files: checkpoints, Hugging Face directories, peft's adapters, merged models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gathered import Part, assembled, parts_of
from test_qlora import CONFIGS, KINDS, SINGLE, code_parts, engine_of, trained_parts
from training_cases import Case, own_batch, train

from megallm.checkpoint.huggingface import HFWeights
from megallm.checkpoint.peft import read_peft_config
from megallm.checkpoint.sharded import read_full_tensors
from megallm.checkpoint.slices import SliceFiles
from megallm.cli.main import run as megallm
from megallm.ops.nf4 import all_blocks, dequantize, quantize, quantize_scales
from megallm.testing.pool import run_ranks
from megallm.trainers.engine import Engine
from megallm.trainers.source import open_model

STOP, END = 2, 4
ONE = Case(model="llama")
LORA = replace(KINDS["double"], lora_dropout=0.0)  # masks follow from the seed, which weights must not be taken from
DENSE = replace(LORA, lora_base="model")


def logits(engine: Engine) -> list[torch.Tensor]:
    return engine.forward({"input_ids": own_batch(0, engine.mesh)["input_ids"]}, lambda out, _: out.local)


def saved_run(folder: Path, *, steps: int = STOP, case: Case = ONE) -> Engine:
    engine = engine_of(case, LORA)
    train(engine, 0, steps)
    engine.save(str(folder))
    return engine


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
@pytest.mark.parametrize("lora", [LORA, SINGLE], ids=["double", "single"])
def test_a_run_resumes_to_the_bit(lora: Any, precision: Any, tmp_path: Path) -> None:
    case = Case(model="qwen3", precision=precision, mbs=8)
    engine = engine_of(case, lora)
    train(engine, 0, STOP)
    engine.save(str(tmp_path))
    other = engine_of(case, lora, seed=99)
    other.load(str(tmp_path))
    assert train(other, STOP, END) == train(engine, STOP, END)
    names = SliceFiles(tmp_path / f"step-0000000{STOP}" / "model").shapes
    assert "model.layers.0.mlp.up_proj.weight.nf4" in names and "model.layers.0.mlp.up_proj.weight" not in names


def save_on_two(rank: int, world_size: int, folder: str) -> list[tuple[float, float]]:
    engine = engine_of(Case(model="qwen3", tp=2), LORA)
    train(engine, 0, STOP)
    engine.save(folder)
    return train(engine, STOP, END)


def resume_on_two(rank: int, world_size: int, folder: str) -> tuple[list[tuple[float, float]], list[Part]]:
    engine = engine_of(Case(model="qwen3", pp=2, mbs=2), LORA, seed=5)
    engine.load(folder)
    return train(engine, STOP, END), code_parts(engine.model)


def test_a_run_resumes_on_another_layout(tmp_path: Path) -> None:
    curve = run_ranks(save_on_two, 2, str(tmp_path))[0]
    one = engine_of(Case(model="qwen3"), LORA, seed=6)
    one.load(str(tmp_path))
    ranks = run_ranks(resume_on_two, 2, str(tmp_path))
    codes, own = assembled([rank[1] for rank in ranks]), assembled([code_parts(one.model)])
    assert set(codes) == set(own) and all(torch.equal(codes[name], own[name]) for name in own)
    for found in (ranks[0][0], train(one, STOP, END)):
        for step, expected in zip(found, curve, strict=True):
            assert step == pytest.approx(expected, rel=1e-9)


def test_a_checkpoint_with_weights_in_4_bits_is_a_fourth_of_a_dense_one(tmp_path: Path) -> None:
    case = replace(ONE, precision="bf16")
    sizes = []
    for lora in (LORA, DENSE):
        folder = tmp_path / lora.lora_base
        engine_of(case, lora, train=False).save(str(folder))
        files = SliceFiles(folder / "step-00000000" / "model")
        tensors = {name: tensor for name, tensor in files.whole() if "_proj.weight" in name}
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    assert sizes[0] / sizes[1] == pytest.approx(0.516 / 2, rel=0.01)


def test_other_frozen_weights_than_the_run_s_are_refused_but_for_a_new_start(tmp_path: Path) -> None:
    saved_run(tmp_path / "nf4")
    engine_of(ONE, DENSE).save(str(tmp_path / "model"))
    single = replace(LORA, lora_double_quant=False)
    for folder, lora in (("nf4", DENSE), ("nf4", single), ("model", LORA)):
        with pytest.raises(ValueError, match="has adapters beside .*lora_base.*weights only"):
            engine_of(ONE, lora).load(str(tmp_path / folder))
    dense = engine_of(ONE, DENSE)
    dense.load(str(tmp_path / "nf4"), weights_only=True)
    own = engine_of(ONE, LORA)
    own.load(str(tmp_path / "nf4"), weights_only=True)
    assert all(map(torch.equal, logits(dense), logits(own)))
    engine_of(ONE, single).load(str(tmp_path / "nf4"), weights_only=True)
    quantised = engine_of(ONE, LORA, seed=3)
    quantised.load(str(tmp_path / "model"), weights_only=True)
    fresh = assembled([code_parts(engine_of(ONE, LORA).model)])
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in assembled([code_parts(quantised.model)]).items())


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def load_codes(rank: int, world_size: int, folder: str, case: Case) -> list[Part]:
    source = open_model(folder)
    engine = engine_of(case, LORA, seed=13)
    source.load_weights(engine)
    return code_parts(engine.model)


def test_hugging_face_weights_are_quantised_matrix_by_matrix_on_any_layout(tmp_path: Path) -> None:
    engine_of(replace(ONE, model="qwen3"), None).save(str(tmp_path / "run"))
    assert megallm(["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--dtype", "bfloat16"]) == 0
    weights = HFWeights(tmp_path / "hf", CONFIGS["qwen3"])
    cases = [Case(model="qwen3", tp=2), Case(model="qwen3", dp=2, zero=3), Case(model="qwen3", precision="bf16")]
    for case in cases:
        codes = assembled(run_ranks(load_codes, case.world_size, str(tmp_path / "hf"), case))
        for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj"):
            full = f"model.layers.1.{name}.weight"
            packed = quantize(weights.read(full))
            scales = quantize_scales(packed.absmax)
            assert torch.equal(codes[f"{full}.nf4"].view(-1), packed.codes.double())
            assert torch.equal(codes[f"{full}.absmax"].view(-1), scales.values.double())
            assert scales.nested is not None
            assert torch.equal(codes[f"{full}.nested_absmax"], scales.nested.double())


def test_a_base_checkpoint_fills_the_base_and_leaves_fresh_adapters(tmp_path: Path) -> None:
    engine_of(ONE, None).save(str(tmp_path))
    engine = engine_of(ONE, LORA, seed=21)
    before = assembled([trained_parts(engine)])
    open_model(str(tmp_path)).load_weights(engine)
    after, fresh = assembled([trained_parts(engine)]), assembled([code_parts(engine_of(ONE, LORA).model)])
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in assembled([code_parts(engine.model)]).items())


# -- merged ------------------------------------------------------------------------------------------------------------


def merge_on_two(rank: int, world_size: int, folder: str, case: Case) -> tuple[list[Part], list[tuple[float, float]]]:
    """Merged weights of a run, which then trains on, saves and is read again."""
    engine = engine_of(case, LORA)
    train(engine, 0, STOP)
    engine.merge_adapters()
    assert not engine.model.quantized and engine.lora == DENSE
    engine.save(folder)
    again = engine_of(case, DENSE, seed=77)
    again.load(folder)
    if engine.flat is not None:
        engine.flat.gather()
    weights = parts_of(engine.model, {n: p.data for n, p in engine.model.named_parameters()})
    curve = train(engine, STOP, STOP + 1)
    assert train(again, STOP, STOP + 1) == curve
    return weights, curve


def test_a_merged_model_is_a_plain_one_on_every_layout(tmp_path: Path) -> None:
    engine = engine_of(ONE, LORA)
    train(engine, 0, STOP)
    before = logits(engine)
    merged = {}
    for case in (ONE, replace(ONE, tp=2), replace(ONE, dp=2, zero=3, mbs=2)):
        ranks = run_ranks(merge_on_two, case.world_size, str(tmp_path / case.name), case)
        merged[case.name] = assembled([rank[0] for rank in ranks])
        for name, tensor in merged[case.name].items():
            torch.testing.assert_close(tensor, merged[ONE.name][name], rtol=0, atol=1e-9)
    engine.merge_adapters()
    assert all(p.untyped_storage().size() for p in engine.model.parameters())
    for after, expected in zip(logits(engine), before, strict=True):
        assert torch.allclose(after, expected, rtol=0, atol=1e-12)


def test_merging_rounds_once_from_what_4_bits_stand_for(tmp_path: Path) -> None:
    case = Case(model="llama", precision="bf16")
    engine = saved_run(tmp_path / "run", steps=3, case=case)
    name = "stages.0.layers.1.mlp.down_proj.weight"
    wide = engine.model.quantized[name].dense(torch.float32)
    adapter = engine.model.get_submodule("stages.0.layers.1.mlp.down_adapter").low_rank
    up, down = (factor.detach().float() for factor in (adapter.ups()[0][1], adapter.lora_A))
    expected = torch.addmm(wide, up, down, alpha=LORA.scale).bfloat16()
    engine.merge_adapters()
    assert torch.equal(engine.model.get_parameter(name), expected)
    requantised = quantize(expected)
    scales = quantize_scales(requantised.absmax)
    lost = dequantize(requantised.codes, scales, all_blocks(expected.numel()), out=torch.empty_like(expected))
    assert not torch.equal(lost, expected)
    stored = dict(read_full_tensors(tmp_path / "run" / "step-00000003"))
    assert torch.equal(stored["model.layers.1.mlp.down_proj.weight"], expected)


def test_a_checkpoint_is_exported_with_its_adapters_added(tmp_path: Path) -> None:
    engine = saved_run(tmp_path / "run", steps=3)
    assert megallm(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    opened = engine_of(ONE, None, train=False)
    open_model(str(tmp_path / "hf")).load_weights(opened)
    plain = engine_of(ONE, None, train=False)
    plain.load(str(tmp_path / "run"), weights_only=True)
    for found in (opened, plain):
        for actual, expected in zip(logits(found), logits(engine), strict=True):
            assert torch.allclose(actual, expected, rtol=0, atol=1e-12)


def test_adapters_go_to_peft_and_come_back(tmp_path: Path) -> None:
    engine = saved_run(tmp_path / "run", steps=3)
    engine.save_adapters(str(tmp_path / "adapters"))
    assert megallm(["export", str(tmp_path / "run"), str(tmp_path / "exported"), "--adapters"]) == 0
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("adapters", "exported")]
    assert files[0] == files[1]
    assert "lora_base" not in json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    found = replace(read_peft_config(tmp_path / "adapters"), lora_base="nf4")
    other = engine_of(ONE, found)
    other.load_adapters(str(tmp_path / "adapters"))
    assert all(map(torch.equal, logits(other), logits(engine)))


# -- blocks that run over the ends of rows -----------------------------------------------------------------------------


def test_small_odd_models_are_stored_and_read_too(tmp_path: Path) -> None:
    """32 and 48 inputs: a block is one row and a third, or two rows."""
    from training_cases import make_engine

    case = Case(model="llama_untied")
    engine = make_engine(case, lora=LORA)
    train(engine, 0, 2)
    engine.save(str(tmp_path))
    again, plain = make_engine(case, lora=LORA, seed=8), make_engine(case, train=False)
    again.load(str(tmp_path))
    plain.load(str(tmp_path), weights_only=True)
    expected = logits(engine)
    assert all(map(torch.equal, logits(again), expected))
    for actual, wanted in zip(logits(plain), expected, strict=True):
        assert torch.allclose(actual, wanted, rtol=0, atol=1e-12)
    name = "model.layers.1.mlp.down_proj.weight"  # [32, 48]
    dense = dict(read_full_tensors(tmp_path / "step-00000002"))[name]
    whole = plain.model.get_parameter("stages.0.layers.1.mlp.down_proj.weight")
    torch.testing.assert_close(dense, whole.detach(), rtol=0, atol=1e-15)
