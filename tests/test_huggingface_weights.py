"""Weights of Hugging Face directories, slice by slice in and shard by shard out, against transformers' state dicts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megallm.checkpoint.huggingface import INDEX_FILE, SINGLE_FILE, HFWeights, HFWriter, load_into
from megallm.config.huggingface import model_config_from_hf, read_hf_config, with_family_biases
from megallm.config.model import FAMILIES, Family, ModelConfig
from megallm.model.hf_names import canonical_parameters, hf_places
from megallm.model.transformer import Transformer
from megallm.parallel.mesh import Mesh
from megallm.testing.tiny import tiny_config

VARIANTS: dict[str, ModelConfig] = {
    **{family: tiny_config(family) for family in FAMILIES},
    "llama_biased": tiny_config("llama", attention_bias=True, attention_out_bias=True, mlp_bias=True),
    "gpt2_untied": tiny_config("gpt2", tie_word_embeddings=False),
    "qwen3_scalar": tiny_config("qwen3", head="scalar"),
    "gpt2_scalar": tiny_config("gpt2", head="scalar", tie_word_embeddings=False),
}
SMALL_SHARD = 30_000


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_written_opens_in_transformers_with_the_same_weights(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, tensors = VARIANTS[name], _random_tensors(VARIANTS[name])
    _write(tmp_path / "hf", model, tensors, max_shard_bytes=SMALL_SHARD)
    assert len(list((tmp_path / "hf").glob("model-0000?-of-*.safetensors"))) > 2
    opener = transformers.AutoModelForSequenceClassification if model.head == "scalar" else (
        transformers.AutoModelForCausalLM
    )  # fmt: skip
    opened, report = opener.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    state = opened.state_dict()
    for parameter, place in hf_places(model).items():
        assert torch.equal(place.view(state[place.name]), tensors[parameter]), parameter
    num_parameters = sum(p.numel() for p in opened.parameters())
    assert num_parameters == sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("max_shard_size", ("1GB", "30KB"))
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_read_whole_and_in_slices(
    family: Family, max_shard_size: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    _write(tmp_path / "made", tiny_config(family), _random_tensors(tiny_config(family)))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    oracle.save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    assert (tmp_path / "saved" / INDEX_FILE).exists() == (max_shard_size == "30KB")
    model = model_config_from_hf(read_hf_config(tmp_path / "saved"))
    weights, state = HFWeights(tmp_path / "saved", model), oracle.state_dict()
    for name, shape in canonical_parameters(model).items():
        place = hf_places(model)[name]
        expected = place.view(state[place.name])
        whole = weights.read(name)
        assert tuple(whole.shape) == shape and whole.is_contiguous()
        assert torch.equal(whole, expected), name
        for dim, size in enumerate(shape):
            start, length = size // 3, size // 2
            part = weights.read(name, start=start, length=length, dim=dim)
            assert part.is_contiguous() and torch.equal(part, expected.narrow(dim, start, length)), (name, dim)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_transformers(family: Family, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_config(family)
    _write(tmp_path / "hf", model, _random_tensors(model))
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path / "hf"))
    expected = {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}
    assert {place.name: place.shape for place in hf_places(model).values()} == expected


def test_biases_that_the_model_lacks_are_written_as_zeros(tmp_path: Path) -> None:
    model = tiny_config("gpt2", attention_bias=False, attention_out_bias=False, mlp_bias=False)
    _write(tmp_path / "hf", model, _random_tensors(model), dtype=torch.bfloat16)
    read = model_config_from_hf(read_hf_config(tmp_path / "hf"))
    assert read == with_family_biases(model)
    weights = HFWeights(tmp_path / "hf", read)
    added = canonical_parameters(read).keys() - canonical_parameters(model).keys()
    assert len(added) == 6 * model.num_hidden_layers
    for name in added:
        assert weights.read(name).dtype == torch.bfloat16 and not weights.read(name).any()


def test_a_base_model_without_prefix_and_with_old_buffers_is_read(tmp_path: Path) -> None:
    model, tensors = tiny_config("gpt2"), _random_tensors(tiny_config("gpt2"))
    _write(tmp_path / "hf", model, tensors)
    stored = load_file(tmp_path / "hf" / SINGLE_FILE)
    base = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    base |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    base["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # tied, and stored all the same
    save_file(base, tmp_path / "hf" / SINGLE_FILE)
    weights = HFWeights(tmp_path / "hf", model)
    for name, tensor in tensors.items():
        assert torch.equal(weights.read(name), tensor), name


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path: Path) -> None:
    model, tensors = tiny_config("qwen2"), _random_tensors(tiny_config("qwen2"))
    _write(tmp_path / "hf", model, tensors)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "hf" / SINGLE_FILE)
    HFWeights(tmp_path / "hf", model)
    changed = head.clone()
    changed[-1, -1] += 1.0
    for other in (changed, head.bfloat16(), head[:-1].clone()):
        save_file({**tensors, "lm_head.weight": other}, tmp_path / "hf" / SINGLE_FILE)
        with pytest.raises(ValueError, match=r"ties lm_head\.weight .* set tie_word_embeddings to false"):
            HFWeights(tmp_path / "hf", model)


def test_rotary_buffers_are_ignored_and_a_second_copy_is_refused(tmp_path: Path) -> None:
    model = tiny_config("llama")
    _write(tmp_path / "hf", model, _random_tensors(model))
    path = tmp_path / "hf" / SINGLE_FILE
    stored = {**load_file(path), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    save_file(stored, path)
    HFWeights(tmp_path / "hf", model)
    save_file({**stored, "norm.weight": torch.ones(48)}, path)
    with pytest.raises(ValueError, match=r"holds norm\.weight twice"):
        HFWeights(tmp_path / "hf", model)


def test_missing_unexpected_and_misshapen_tensors_are_named_together(tmp_path: Path) -> None:
    model = tiny_config("llama")
    _write(tmp_path / "hf", model, _random_tensors(model))
    path = tmp_path / "hf" / SINGLE_FILE
    stored = load_file(path)
    del stored["model.layers.1.mlp.up_proj.weight"]
    stored["model.norm.bias"] = torch.zeros(48)
    stored["model.embed_tokens.weight"] = torch.zeros(104, 48)
    stored["lm_head.weight"] = torch.zeros(101, 48, dtype=torch.int8)
    save_file(stored, path)
    with pytest.raises(ValueError) as error:
        HFWeights(tmp_path / "hf", model)
    for part in (
        "missing: model.layers.1.mlp.up_proj.weight;",
        "unexpected: model.norm.bias;",
        "model.embed_tokens.weight is [104, 48] instead of [101, 48]",
        "lm_head.weight is stored as I8",
    ):
        assert part in str(error.value)


def test_long_lists_of_names_are_cut(tmp_path: Path) -> None:
    model = tiny_config("llama")
    _write(tmp_path / "hf", model, _random_tensors(model))
    with pytest.raises(ValueError, match=r"missing: .* and 1 more$"):
        HFWeights(tmp_path / "hf", model.replace(num_hidden_layers=4))


def test_a_head_may_be_missing_only_if_it_is_to_be_new(tmp_path: Path) -> None:
    model = tiny_config("llama")
    _write(tmp_path / "hf", model, _random_tensors(model))
    scalar = model.replace(head="scalar")
    with pytest.raises(ValueError, match=r"missing: score\.weight$"):
        HFWeights(tmp_path / "hf", scalar)
    assert HFWeights(tmp_path / "hf", scalar, new_head=True).missing == ("score.weight",)
    ours = _one_rank(scalar).initialize(7)
    before = ours.stage(0).score.detach().clone()
    assert load_into(ours, tmp_path / "hf", new_head=True) == ("score.weight",)
    assert torch.equal(ours.stage(0).score, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_fills_every_parameter_in_its_own_dtype(family: Family, tmp_path: Path) -> None:
    model, tensors = tiny_config(family), _random_tensors(tiny_config(family))
    _write(tmp_path / "hf", model, tensors, dtype=torch.bfloat16)
    ours = _one_rank(model)
    assert load_into(ours, tmp_path / "hf") == ()
    filled = set()
    for _, spec, parameter in ours.slices():
        assert parameter.dtype == torch.float32
        for piece in spec.pieces:
            assert torch.equal(piece.local(parameter), tensors[piece.name].bfloat16().float()), piece.name
            filled.add(piece.name)
    assert filled == set(tensors)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pickled weights \(pytorch_model\.bin\).*safe_serialization=True"):
        HFWeights(tmp_path, tiny_config("llama"))


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} holds no weights: looked for model\.safetensors and "):
        HFWeights(tmp_path, tiny_config("llama"))
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        HFWeights(tmp_path / "none", tiny_config("llama"))


def test_broken_files_are_refused(tmp_path: Path) -> None:
    model = tiny_config("llama")
    _write(tmp_path / "hf", model, _random_tensors(model), max_shard_bytes=SMALL_SHARD)
    folder = tmp_path / "hf"
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{shard.name} is not a complete safetensors file"):
        HFWeights(folder, model)
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=rf"{shard.name} is not a complete safetensors file"):
        HFWeights(folder, model)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"lists files that are not there: {shard.name}"):
        HFWeights(folder, model)
    for index in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}'):
        (folder / INDEX_FILE).write_text(index)
        with pytest.raises(ValueError, match="is not a safetensors index|must list files beside it"):
            HFWeights(folder, model)


def test_reads_outside_a_parameter_are_refused(tmp_path: Path) -> None:
    model = tiny_config("gpt2")
    _write(tmp_path / "hf", model, _random_tensors(model))
    weights = HFWeights(tmp_path / "hf", model)
    with pytest.raises(ValueError, match="has no range 39:41 in dimension 0"):
        weights.read("model.layers.0.self_attn.q_proj.weight", start=39, length=2)
    with pytest.raises(ValueError, match=r"holds no lm_head\.weight"):
        weights.read("lm_head.weight")


def test_the_writer_casts_and_its_index_says_the_total(tmp_path: Path) -> None:
    model = tiny_config("qwen2")
    _write(tmp_path / "hf", model, _random_tensors(model), max_shard_bytes=SMALL_SHARD, dtype=torch.float16)
    index = json.loads((tmp_path / "hf" / INDEX_FILE).read_text())
    stored: dict[str, torch.Tensor] = {}
    for file in set(index["weight_map"].values()):
        shard = load_file(tmp_path / "hf" / file)
        assert sum(t.numel() * 2 for t in shard.values()) <= SMALL_SHARD or len(shard) == 1
        assert all(index["weight_map"][name] == file for name in shard)
        stored |= shard
    assert {t.dtype for t in stored.values()} == {torch.float16}
    assert set(stored) == set(index["weight_map"]) == set(canonical_parameters(model))
    num_parameters = sum(t.numel() for t in stored.values())
    assert index["metadata"] == {"total_parameters": num_parameters, "total_size": 2 * num_parameters}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float16"


def test_the_writer_takes_copies_so_that_a_buffer_may_be_reused(tmp_path: Path) -> None:
    model, tensors = tiny_config("llama"), _random_tensors(tiny_config("llama"))
    buffer = torch.empty(max(t.numel() for t in tensors.values()))

    def through_the_buffer() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            yield name, buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)

    with HFWriter(tmp_path / "hf", model) as writer:
        for name, tensor in through_the_buffer():
            writer.add(name, tensor)
    assert all(torch.equal(t, tensors[name]) for name, t in load_file(tmp_path / "hf" / SINGLE_FILE).items())


def test_an_incomplete_or_failed_write_leaves_nothing(tmp_path: Path) -> None:
    model, tensors = tiny_config("gpt2"), _random_tensors(tiny_config("gpt2"))
    last = tensors.popitem()[0]
    with pytest.raises(ValueError, match=f"missing: {last}"):
        _write(tmp_path / "hf", model, tensors)
    for name, tensor, message in (
        ("lm_head.weight", torch.zeros(101, 40), "is no parameter of this gpt2 model"),
        (last, torch.zeros(7), r"is \[7\] instead of \[40\]"),
    ):
        with pytest.raises(ValueError, match=message), HFWriter(tmp_path / "hf", model) as writer:
            writer.add(name, tensor)
    with pytest.raises(ValueError, match="was given twice"), HFWriter(tmp_path / "hf", model) as writer:
        for _ in range(2):
            writer.add(last, torch.zeros(40))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_something_in_it_is_not_overwritten(tmp_path: Path) -> None:
    model = tiny_config("llama")
    _write(tmp_path / "hf", model, _random_tensors(model))
    with pytest.raises(ValueError, match="exists and is not empty"):
        HFWriter(tmp_path / "hf", model)
    shutil.rmtree(tmp_path / "hf")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf.partial").mkdir()
    (tmp_path / "hf.partial" / "part-9").write_bytes(b"left by a crash")
    _write(tmp_path / "hf", model, _random_tensors(model))
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == ["config.json", "generation_config.json", SINGLE_FILE]
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert len({p.stat().st_mode for p in (tmp_path / "hf").iterdir()}) == 1  # whoever reads one may read all


def _random_tensors(model: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in canonical_parameters(model).items()}


def _write(directory: Path, model: ModelConfig, tensors: dict[str, torch.Tensor], **options: Any) -> None:
    """In an order that keeps q, k and v apart."""
    with HFWriter(directory, model, **options) as writer:
        for name in sorted(tensors, key=lambda name: name[::-1]):
            writer.add(name, tensors[name])


def _one_rank(model: ModelConfig) -> Transformer:
    mesh = Mesh.build(tp=1, pp=1)
    return Transformer(model, mesh, partition=[range(model.num_hidden_layers)], dtype=torch.float32)
