"""config.json to ModelConfig and back, with transformers' own config classes as the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megallm.config.huggingface import model_config_from_hf, model_config_to_hf, read_hf_config, with_family_biases
from megallm.config.model import FAMILIES, Family, ModelConfig, RopeScaling
from megallm.config.presets import get_preset, preset_names
from megallm.testing.tiny import tiny_config

SCALINGS = {
    "linear": RopeScaling(rope_type="linear", factor=2.0),
    "llama3": RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=32),
    "yarn": RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=20.0),
    "yarn-mscale": RopeScaling(
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=16,
        mscale=0.7,
        mscale_all_dim=1.0,
        truncate=False,
    ),
}
PLAIN_LLAMA = {"model_type": "llama", "vocab_size": 101, "hidden_size": 48, "num_attention_heads": 8}
LLAMA_3_1 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
"""Llama 3.1's, with a release's several end-of-text ids."""


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_survives_the_round_trip(name: str) -> None:
    model = get_preset(name)
    assert model_config_from_hf(json.loads(json.dumps(model_config_to_hf(model)))) == with_family_biases(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ("lm", "scalar"))
def test_every_family_and_head_survives_the_round_trip(family: Family, head: Any) -> None:
    model = tiny_config(family, head=head, **({"tie_word_embeddings": False} if head == "scalar" else {}))
    assert _without_init(model_config_from_hf(model_config_to_hf(model))) == _without_init(model)


@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scaling_survives_the_round_trip_under_old_and_new_keys(name: str) -> None:
    model = tiny_config("qwen3", rope_scaling=SCALINGS[name])
    both = model_config_to_hf(model)
    old = {key: value for key, value in both.items() if key != "rope_parameters"}
    new = {key: value for key, value in both.items() if key not in ("rope_scaling", "rope_theta")}
    for config in (both, old, new):
        assert model_config_from_hf(config) == model


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_we_write(family: Family, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    scaling = None if family == "gpt2" else SCALINGS["llama3"]
    model = tiny_config(family, rope_scaling=scaling, eos_token_id=7)
    (tmp_path / "config.json").write_text(json.dumps(model_config_to_hf(model, dtype="bfloat16")))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(config).model_type == family
    assert config.hidden_size == model.hidden_size
    assert (config.bos_token_id, config.eos_token_id) == (None, 7)
    assert str(config.dtype).removeprefix("torch.") == "bfloat16"
    assert config.tie_word_embeddings == model.tie_word_embeddings
    if family != "gpt2":
        assert config.rope_parameters["rope_type"] == "llama3" and config.rope_parameters["factor"] == 8.0
        assert config.rope_parameters["rope_theta"] == model.rope_theta
    if family != "llama" and family != "gpt2":
        assert config.sliding_window == model.sliding_window
    config.save_pretrained(tmp_path / "again")
    again = model_config_from_hf(read_hf_config(tmp_path / "again"))
    assert _without_init(again) == _without_init(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_take_the_defaults_of_transformers(family: Family) -> None:
    transformers = pytest.importorskip("transformers")
    full = transformers.AutoConfig.for_model(family).to_dict()
    assert model_config_from_hf({"model_type": family}) == model_config_from_hf(full)


def test_llama_3_1_reads_as_its_preset() -> None:
    assert model_config_from_hf(LLAMA_3_1) == get_preset("llama3.1-8b")


def test_the_old_name_of_the_rope_type_is_read() -> None:
    config = {**PLAIN_LLAMA, "rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 50000}
    model = model_config_from_hf(config)
    assert model.rope_scaling == RopeScaling(rope_type="linear", factor=2.0)
    assert model.rope_theta == 50000.0


def test_yarn_takes_its_factor_from_the_two_lengths_when_it_has_none() -> None:
    parameters = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512}
    model = model_config_from_hf({**PLAIN_LLAMA, "rope_parameters": parameters, "max_position_embeddings": 2048})
    assert model.rope_scaling is not None and model.rope_scaling.factor == 4.0


def test_token_ids_outside_the_vocabulary_count_as_none() -> None:
    model = model_config_from_hf({**PLAIN_LLAMA, "bos_token_id": 101, "eos_token_id": [5, 6]})
    assert (model.bos_token_id, model.eos_token_id) == (None, 5)


def test_biases_follow_the_family() -> None:
    def biases(family: str, **keys: Any) -> tuple[bool, bool, bool]:
        model = model_config_from_hf({**PLAIN_LLAMA, "model_type": family, "num_key_value_heads": 8, **keys})
        return model.attention_bias, model.attention_out_bias, model.mlp_bias

    assert biases("llama", attention_bias=True) == (True, True, False)
    assert biases("llama", mlp_bias=True) == (False, False, True)
    assert biases("mistral", attention_bias=True, mlp_bias=True) == (False, False, False)
    assert biases("qwen2") == (True, False, False)
    assert biases("qwen3", attention_bias=True) == (True, True, False)


@pytest.mark.parametrize("family", ("qwen2", "qwen3"))
def test_a_window_of_all_layers_is_read_and_a_mix_is_refused(family: str) -> None:
    config = {
        **PLAIN_LLAMA,
        "model_type": family,
        "num_key_value_heads": 8,
        "num_hidden_layers": 3,
        "sliding_window": 9,
    }
    assert model_config_from_hf({**config, "max_window_layers": 0}).sliding_window is None
    config["use_sliding_window"] = True
    assert model_config_from_hf({**config, "max_window_layers": 0}).sliding_window == 9
    assert model_config_from_hf({**config, "max_window_layers": 3}).sliding_window is None
    assert model_config_from_hf({**config, "layer_types": ["sliding_attention"] * 3}).sliding_window == 9
    for mixed in ({"max_window_layers": 2}, {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}):
        with pytest.raises(ValueError, match=r"layers of different attention \(full_attention, sliding_attention\)"):
            model_config_from_hf({**config, **mixed})


@pytest.mark.parametrize("model_type", ("mixtral", "bert", None, ["llama"]))
def test_an_unsupported_architecture_is_refused_with_those_that_are(model_type: Any) -> None:
    with pytest.raises(ValueError, match="not supported: use one of gpt2, llama, mistral, qwen2, qwen3"):
        model_config_from_hf({"model_type": model_type})


@pytest.mark.parametrize(
    ("keys", "message"),
    (
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not one of default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "without low_freq_factor, high_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "not one flat object"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor '2' of the rope parameters is not a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not one of silu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "48"}, "hidden_size '48' has the wrong type"),
        ({"attention_bias": 1}, "attention_bias 1 has the wrong type"),
        ({"hidden_size": 49}, r"hidden_size \(49\) is not divisible by num_attention_heads \(8\)"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "with 2 labels: only one"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(8\) is not divisible by num_key_value_heads \(3\)"),
    ),
)  # fmt: skip
def test_what_cannot_be_computed_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_config_from_hf({**PLAIN_LLAMA, **keys})


@pytest.mark.parametrize(
    "keys",
    (
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"add_cross_attention": True},
        {"embd_pdrop": 0.0},
        {"n_head": 7},
    ),
)
def test_variants_of_gpt2_are_refused_by_the_name_of_the_key(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(keys))):
        model_config_from_hf({"model_type": "gpt2", **keys})


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(ValueError, match="hidden_act 'relu'.*; quantization_config"):
        model_config_from_hf({**PLAIN_LLAMA, "hidden_act": "relu", "quantization_config": {"bits": 4}})


def test_missing_biases_are_those_that_the_family_always_has() -> None:
    assert with_family_biases(tiny_config("gpt2", attention_bias=False, mlp_bias=False)) == tiny_config("gpt2")
    assert with_family_biases(tiny_config("qwen2", attention_bias=False)) == tiny_config("qwen2")
    assert with_family_biases(tiny_config("llama", attention_bias=True)).attention_out_bias
    for family in FAMILIES:
        assert with_family_biases(tiny_config(family)) == tiny_config(family)


@pytest.mark.parametrize(
    ("model", "message"),
    (
        (tiny_config("llama", norm="layernorm", qk_norm=True), r"cannot have norm \('layernorm'\), qk_norm \(True\)"),
        (tiny_config("mistral", mlp_bias=True), r"cannot have mlp_bias \(True\)"),
        (tiny_config("gpt2", num_key_value_heads=4), r"cannot have num_key_value_heads \(4\)"),
        (tiny_config("llama", sliding_window=7), r"cannot have sliding_window \(7\)"),
    ),
)
def test_a_model_that_transformers_cannot_have_is_refused(model: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_config_to_hf(model)


def test_a_directory_without_a_readable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        read_hf_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        read_hf_config(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        read_hf_config(tmp_path)


def _without_init(model: ModelConfig) -> ModelConfig:
    """No config.json says how new residual projections are drawn."""
    return model.replace(scale_residual_init=True)
