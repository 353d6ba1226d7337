"""Adapters and peft: the same numbers, files that peft reads, files that peft wrote; and adapters in checkpoints.

tests/fixtures/peft_llama.json holds what peft itself computes and writes (tests/make_peft_fixture.py).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gathered import Part, assembled, parts_of
from peft_case import ADAPTERS, FIXTURE, SIZES, batch, numbers, tensor, weight
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_cases import MODELS, Case, make_engine, once, own_batch, train

from megallm.checkpoint.peft import adapter_shapes, read_peft_config
from megallm.checkpoint.sharded import read_full_tensors
from megallm.cli.main import run as megallm
from megallm.config.huggingface import model_config_from_hf
from megallm.config.lora import LoraConfig
from megallm.config.optim import OptimConfig
from megallm.config.parallel import ParallelConfig
from megallm.parallel.mesh import Mesh
from megallm.testing.pool import run_ranks
from megallm.trainers.engine import Engine
from megallm.trainers.losses import language_model_loss
from megallm.trainers.source import open_model

UNTIED, TIED, QWEN2, QWEN3 = list(MODELS)[:4]
PREFIX = "base_model.model."
HF = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False} | SIZES


def lora_of(kind: str) -> LoraConfig:
    options = ADAPTERS[kind]
    return LoraConfig(
        lora_rank=options["r"],
        lora_alpha=options["lora_alpha"],
        lora_rslora=options["use_rslora"],
        lora_targets=tuple(options["target_modules"] or ()),
    )


def filled(engine: Engine) -> Engine:
    """Weights and adapters of tests/peft_case.py, whatever this rank holds of them."""
    for _, spec, parameter in engine.model.slices():
        for piece in spec.pieces:
            name = f"{PREFIX}{piece.name}"
            whole = tensor(name, piece.shape) if spec.is_adapter else weight(piece.name, piece.shape)
            piece.local(parameter.data).copy_(whole.narrow(piece.dim, piece.start, piece.length))
    return engine


def peft_engine(kind: str, **layout: int) -> Engine:
    mesh = Mesh.build(**{"tp": 1, "pp": 1} | layout)
    parallel = ParallelConfig(tp=mesh.tp.size, pp=mesh.pp.size)
    return filled(
        Engine(
            model_config_from_hf(HF), mesh, parallel=parallel, optim=OptimConfig(max_grad_norm=0.0), micro_batch_size=2,
            precision="fp64", lora=lora_of(kind),
        )
    )  # fmt: skip


# -- the same numbers --------------------------------------------------------------------------------------------------


def compute(rank: int, world_size: int, tp: int, pp: int) -> dict[str, Any]:
    found = {}
    for kind in ADAPTERS:
        engine = peft_engine(kind, tp=tp, pp=pp)
        logits = engine.forward(batch(), lambda out, _: out.gathered())
        loss = engine.train_step(batch(), language_model_loss, learning_rate=0.0).metrics()["loss"]
        assert engine.gradients is not None
        gradients = parts_of(engine.model, engine.gradients.named())
        engine.merge_adapters()
        merged = engine.forward(batch(), lambda out, _: out.gathered())
        found[kind] = (logits, loss, gradients, merged)
    return found


@once
def computed(tp: int, pp: int) -> list[dict[str, Any]]:
    return run_ranks(compute, tp * pp, tp, pp)


@once
def expected() -> dict[str, Any]:
    content = json.loads(FIXTURE.read_text())
    assert content["sizes"] == SIZES
    return content["adapters"]


@pytest.mark.parametrize("layout", [(1, 1), (4, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_logits_loss_and_gradients_are_peft_s(kind: str, layout: tuple[int, int]) -> None:
    ranks, own = computed(*layout), expected()[kind]
    assert own["options"] == ADAPTERS[kind]
    logits, loss, _, merged = next(rank[kind] for rank in ranks if rank[kind][0])
    for name, found in (("logits", logits), ("merged_logits", merged)):
        last = found[0].view(2, 12, -1)[:, -1, :5].double()
        torch.testing.assert_close(last, torch.tensor(own[name]).double(), rtol=1e-6, atol=1e-6)  # gathered in fp32
    assert loss == pytest.approx(own["loss"], rel=1e-7)  # transformers' norms and rotary angles are made in fp32
    whole = assembled([rank[kind][2] for rank in ranks])
    actual = numbers({PREFIX + name: gradient for name, gradient in whole.items()})
    assert set(actual) == set(own["gradients"])
    for name, (norm, product) in own["gradients"].items():
        assert actual[name] == pytest.approx([norm, product], rel=1e-5, abs=1e-6 * norm), name


# -- the same files ----------------------------------------------------------------------------------------------------


def write_and_read(rank: int, world_size: int, folder: str, writer: Case, readers: list[Case]) -> list[list[Part]]:
    """The adapters of a run, written by `writer`, as each of the readers finds them (those of as many ranks)."""
    lora = LoraConfig(lora_rank=3, lora_targets=("q_proj", "k_proj", "o_proj", "up_proj"))
    engine = make_engine(writer, lora=lora)
    train(engine, 0, 2)
    engine.save_adapters(folder, base_model="some/base")
    found = [trained_parts(engine)]
    for case in readers:
        other = make_engine(case, lora=read_peft_config(folder), seed=99)
        other.load_adapters(folder)
        found.append(trained_parts(other))
    return found


def trained_parts(engine: Engine) -> list[Part]:
    if engine.flat is not None:
        engine.flat.gather()
    return parts_of(engine.model, {n: p.data for n, p in engine.model.named_parameters() if p.requires_grad})


FILES = [
    (Case(model=QWEN3, tp=4), [Case(model=QWEN3, pp=2, dp=2, zero=1), Case(model=QWEN3, dp=4, mbs=2, zero=3)]),
    (Case(model=UNTIED, dp=2, zero=3), [Case(model=UNTIED, tp=2), Case(model=UNTIED, pp=2, v=2)]),
]


@pytest.mark.parametrize(("writer", "readers"), FILES, ids=["tp4", "zero3"])
def test_peft_directories_go_from_any_layout_to_any_other(writer: Case, readers: list[Case], tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    ranks = run_ranks(write_and_read, writer.world_size, str(folder), writer, readers)
    first, *others = (assembled([rank[i] for rank in ranks]) for i in range(1 + len(readers)))
    for other in others:
        assert set(other) == set(first)
        assert all(torch.equal(other[name], first[name]) for name in first)
    stored = load_file(folder / "adapter_model.safetensors")
    assert set(stored) == {PREFIX + name for name in first}
    assert all(torch.equal(stored[PREFIX + name], first[name]) for name in first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters"]
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_files_have_the_names_shapes_and_settings_that_peft_writes(kind: str, tmp_path: Path) -> None:
    peft_engine(kind).save_adapters(str(tmp_path / "out"))
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", framework="pt") as file:
        stored = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
    assert stored == expected()[kind]["stored"]
    theirs = expected()[kind]["adapter_config"]
    ours = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {name: theirs[name] for name in ours} == ours | {"target_modules": sorted(ours["target_modules"])}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_peft_wrote_is_read(kind: str, tmp_path: Path) -> None:
    write_theirs(kind, tmp_path)
    found = read_peft_config(tmp_path)
    assert found == replace(lora_of(kind), lora_targets=found.lora_targets)
    engine = Engine(model_config_from_hf(HF), Mesh.build(tp=1, pp=1), precision="fp64", lora=found)
    engine.load_adapters(str(tmp_path))
    for name, adapter in assembled([trained_parts(engine)]).items():
        assert torch.equal(adapter, tensor(PREFIX + name, tuple(adapter.shape)))


def write_theirs(kind: str, folder: Path, **changes: Any) -> None:
    own = expected()[kind]
    (folder / "adapter_config.json").write_text(json.dumps(own["adapter_config"] | changes))
    tensors = {name: tensor(name, tuple(shape)) for name, shape in own["stored"].items()}
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "trained biases"),
        ({"modules_to_save": ["embed_tokens"]}, "whole modules"),
        ({"rank_pattern": {"q_proj": 2}}, "ranks that differ"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
    ],
)
def test_other_kinds_of_adapters_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_theirs("all", tmp_path, **changes)
    with pytest.raises(ValueError, match=words):
        read_peft_config(tmp_path)


def test_adapters_of_another_base_model_are_refused_before_anything_changes(tmp_path: Path) -> None:
    write_theirs("all", tmp_path)
    for changes, words in (({"num_hidden_layers": 3}, "is missing"), ({"intermediate_size": 64}, "instead of")):
        config = model_config_from_hf(HF | changes)
        engine = Engine(config, Mesh.build(tp=1, pp=1), lora=read_peft_config(tmp_path))
        before = [p.clone() for p in engine.model.parameters()]
        with pytest.raises(ValueError, match=f"another base model.*{words}"):
            engine.load_adapters(str(tmp_path))
        assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))
    engine = Engine(model_config_from_hf(HF), Mesh.build(tp=1, pp=1), lora=LoraConfig(lora_rank=8))
    with pytest.raises(ValueError, match="lora_rank 4.*lora_rank 8"):
        engine.load_adapters(str(tmp_path))


def test_pickled_and_missing_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        read_peft_config(tmp_path)
    write_theirs("all", tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickled"):
        read_peft_config(tmp_path)


def test_gpt2_has_no_peft_form(tmp_path: Path) -> None:
    engine = make_engine(Case(model=TIED), lora=LoraConfig(lora_rank=2))
    with pytest.raises(ValueError, match="GPT-2"):
        engine.save_adapters(str(tmp_path / "out"))


def test_a_reward_model_trains_its_head_beside_the_adapters(tmp_path: Path) -> None:
    config = MODELS[UNTIED].replace(head="scalar")
    lora = LoraConfig(lora_rank=2)
    engine = Engine(config, Mesh.build(tp=1, pp=1), lora=lora)
    specs = engine.model.specs
    others = {n for n, p in engine.model.named_parameters() if p.requires_grad and not specs[n].is_adapter}
    assert others == {"stages.0.score"}
    engine.save_adapters(str(tmp_path / "out"))
    plain = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert plain["modules_to_save"] == ["score"] and plain["task_type"] == "SEQ_CLS"
    other = Engine(config, Mesh.build(tp=1, pp=1), lora=read_peft_config(tmp_path / "out"), seed=5)
    other.load_adapters(str(tmp_path / "out"))
    assert torch.equal(*(dict(each.model.named_parameters())["stages.0.score"] for each in (engine, other)))
    assert "score.weight" in adapter_shapes(config, lora)


# -- checkpoints -------------------------------------------------------------------------------------------------------

LORA = LoraConfig(lora_rank=3, lora_alpha=9.0, lora_dropout=0.1)
STOP, END = 2, 5
RESUMES = [
    (Case(model=UNTIED), Case(model=UNTIED, dp=2, zero=3)),
    (Case(model=QWEN3, tp=2, dp=2, zero=1), Case(model=QWEN3, tp=4)),
    (Case(model=TIED, dp=4, mbs=2, zero=3), Case(model=TIED, tp=2, pp=2)),
]


def save_run(rank: int, world_size: int, folder: str, case: Case) -> list[tuple[float, float]]:
    engine = make_engine(case, lora=LORA)
    train(engine, 0, STOP)
    engine.save(folder)
    return train(engine, STOP, END)


def resume_run(rank: int, world_size: int, folder: str, case: Case) -> list[tuple[float, float]]:
    engine = make_engine(case, lora=LORA, seed=7)
    engine.load(folder)
    return train(engine, STOP, END)


@pytest.mark.parametrize(("first", "second"), RESUMES, ids=lambda case: case.name)
def test_a_run_resumes_on_another_layout(first: Case, second: Case, tmp_path: Path) -> None:
    expected_curve = run_ranks(save_run, first.world_size, str(tmp_path), first)[0]
    curve = run_ranks(resume_run, second.world_size, str(tmp_path), second)[0]
    for actual, true in zip(curve, expected_curve, strict=True):
        assert actual == pytest.approx(true, rel=1e-9)


def test_a_bf16_run_resumes_to_the_bit(tmp_path: Path) -> None:
    case = Case(model=UNTIED, precision="bf16")
    assert save_run(0, 1, str(tmp_path), case) == resume_run(0, 1, str(tmp_path), case)


def test_a_base_checkpoint_fills_the_base_and_leaves_fresh_adapters(tmp_path: Path) -> None:
    case = Case(model=UNTIED)
    base = make_engine(case)
    train(base, 0, 2)
    base.save(str(tmp_path / "run"))
    megallm(["export", str(tmp_path / "run"), str(tmp_path / "hf")])
    weights = {n: p.detach() for n, p in base.model.named_parameters()}
    for place in ("run", "hf"):
        engine, fresh = make_engine(case, lora=LORA), make_engine(case, lora=LORA)
        open_model(str(tmp_path / place)).load_weights(engine)
        unchanged = dict(fresh.model.named_parameters())
        for name, parameter in engine.model.named_parameters():
            assert torch.equal(parameter, weights.get(name, unchanged[name])), name
    with pytest.raises(ValueError, match="without adapters.*weights only"):
        make_engine(case, lora=LORA).load(str(tmp_path / "run"))


def load_at_stage_three(rank: int, world_size: int, folder: str) -> tuple[list[Part], list[Part]]:
    """What is new before and after base weights of a Hugging Face directory arrive in a sharded engine."""
    source = open_model(folder, head="scalar")
    mesh = Mesh.build(tp=1, pp=1)
    engine = Engine(source.config, mesh, precision="fp64", parallel=ParallelConfig(tp=1, pp=1, zero=3), lora=LORA)
    before = trained_parts(engine)
    source.load_weights(engine)
    return before, trained_parts(engine)


def test_new_adapters_and_a_new_head_outlive_the_loading_of_weights_into_shards(tmp_path: Path) -> None:
    make_engine(Case(model=UNTIED)).save(str(tmp_path / "run"))
    megallm(["export", str(tmp_path / "run"), str(tmp_path / "hf")])
    ranks = run_ranks(load_at_stage_three, 2, str(tmp_path / "hf"))
    before, after = (assembled([rank[i] for rank in ranks]) for i in range(2))
    assert after["score.weight"].any() and after["model.layers.0.mlp.down_proj.lora_A.weight"].any()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_checkpoint_with_adapters_is_read_and_exported_with_them_added(tmp_path: Path) -> None:
    case = Case(model=UNTIED)
    engine = make_engine(case, lora=LORA)
    train(engine, 0, 3)
    engine.save(str(tmp_path / "run"))
    data = own_batch(0, engine.mesh)
    merged = make_engine(case, train=False)
    merged.load(str(tmp_path / "run"), weights_only=True)
    engine.merge_adapters()
    weights = assembled([parts_of(engine.model, {n: p.data for n, p in engine.model.named_parameters()})])
    for name, whole in read_full_tensors(tmp_path / "run" / "step-00000003"):
        assert torch.allclose(whole, weights[name], rtol=0, atol=1e-14), name
    megallm(["export", str(tmp_path / "run"), str(tmp_path / "hf")])
    opened = make_engine(case, train=False)
    open_model(str(tmp_path / "hf")).load_weights(opened)
    true = engine.forward(data, lambda out, _: out.local)
    for other in (merged, opened):
        for actual, expected_logits in zip(other.forward(data, lambda out, _: out.local), true, strict=True):
            assert torch.allclose(actual, expected_logits, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="with adapters.*weights only"):
        make_engine(case).load(str(tmp_path / "run"))


def test_the_adapters_alone_are_exported_from_a_checkpoint(tmp_path: Path) -> None:
    engine = make_engine(Case(model=UNTIED), lora=LORA)
    train(engine, 0, 2)
    engine.save(str(tmp_path / "run"))
    engine.save_adapters(str(tmp_path / "expected"))
    assert megallm(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--adapters"]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


@pytest.mark.parametrize("change", [{"lora_rank": 4}, {"lora_alpha": 3.0}, {"lora_targets": ("q_proj",)}], ids=str)
def test_other_adapters_than_the_checkpoint_s_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    case = Case(model=UNTIED)
    make_engine(case, lora=LORA).save(str(tmp_path))
    for weights_only in (True, False):
        with pytest.raises(ValueError, match="lora_rank 3, lora_alpha 9.*export the checkpoint"):
            make_engine(case, lora=replace(LORA, **change)).load(str(tmp_path), weights_only=weights_only)
