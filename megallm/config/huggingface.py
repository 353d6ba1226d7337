"""Hugging Face's config.json to ModelConfig and back.

    read_hf_config         the JSON object of a model directory
    model_config_from_hf   its ModelConfig; whatever we could not compute exactly as transformers does is refused
    model_config_to_hf     the config.json of a ModelConfig, for transformers 4.43 and newer
    with_family_biases     the ModelConfig that this config.json describes

An absent key means transformers' default for that model_type, because save_pretrained leaves defaults out. Rotary
settings are read under their old names (`rope_theta`, `rope_scaling`) and their new one (`rope_parameters`), and
written under both.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megallm.config.check import check_model
from megallm.config.huggingface_defaults import DEFAULTS, GPT2_ALIASES
from megallm.config.huggingface_rope import read_rope, rope_keys
from megallm.config.model import FAMILIES, Family, ModelConfig, RopeScaling

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
_CLASS_NAMES: dict[Family, str] = {
    "gpt2": "GPT2",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
_NOT_IN_HF = ("scale_residual_init",)
"""Says how new weights are drawn, which no config.json can."""


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """The JSON object in the directory's config.json.

    FileNotFoundError if there is none, ValueError if it is not a JSON object.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        what = "holds no config.json" if Path(directory).is_dir() else "is not a directory"
        raise FileNotFoundError(f"{directory} {what}: give a Hugging Face model directory")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON or UTF-8
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def model_config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json, with transformers' defaults for absent keys; it passes `check_model`.

    A classifier (`...ForSequenceClassification`) with one label has head "scalar". Of several end-of-text ids the first
    is taken; ids outside the vocabulary count as none. ValueError lists everything that is not supported.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} in config.json is not supported: use one of {', '.join(FAMILIES)}")
    keys = _Keys(config, family)
    fields = _gpt2_fields(keys) if family == "gpt2" else _rotary_fields(family, keys)
    fields |= _head_fields(keys)
    for name in ("bos_token_id", "eos_token_id"):
        fields[name] = keys.token_id(name, vocab_size=fields["vocab_size"])
    if config.get("quantization_config"):
        keys.problems.append("quantization_config: quantized weights cannot be trained; use the original model")
    if keys.problems:
        raise ValueError(f"this {family} config.json is not supported: {'; '.join(keys.problems)}")
    model = ModelConfig(family=family, **fields)
    check_model(model)
    return model


def model_config_to_hf(model: ModelConfig, *, dtype: str | None = None) -> dict[str, Any]:
    """The config.json of `model`; `dtype` ("float32", "bfloat16", ...) is the one of the weights beside it.

    Reading it back gives `with_family_biases(model)`, but for how new weights are drawn, and dropout that the family
    does not have. ValueError names the fields that models of this family cannot have in transformers.
    """
    model = with_family_biases(model)
    head = "ForSequenceClassification" if model.head == "scalar" else "ForCausalLM"
    if model.family == "gpt2" and model.head == "lm":
        head = "LMHeadModel"
    config: dict[str, Any] = {
        "architectures": [_CLASS_NAMES[model.family] + head],
        "model_type": model.family,
        "vocab_size": model.vocab_size,
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": model.tie_word_embeddings,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
        "use_cache": True,
    }
    if model.head == "scalar":
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if dtype is not None:
        config |= {"dtype": dtype, "torch_dtype": dtype}
    config |= _gpt2_keys(model) if model.family == "gpt2" else _rotary_keys(model)
    _check_representable(model, config)
    return config


def with_family_biases(model: ModelConfig) -> ModelConfig:
    """`model` with the biases that its family always has in transformers; zeros in them change nothing."""
    if model.family == "gpt2":
        return model.replace(attention_bias=True, attention_out_bias=True, mlp_bias=True)
    if model.family == "qwen2":
        return model.replace(attention_bias=True)
    if model.family in ("llama", "qwen3"):
        biased = model.attention_bias or model.attention_out_bias
        return model.replace(attention_bias=biased, attention_out_bias=biased)
    return model


def _gpt2_fields(keys: _Keys) -> dict[str, Any]:
    hidden, heads = keys.integer("n_embd"), keys.integer("n_head")
    if hidden % max(heads, 1):
        keys.problems.append(f"n_embd ({hidden}) is not divisible by n_head ({heads})")
    dropout, embedding_dropout = keys.number("resid_pdrop"), keys.number("embd_pdrop")
    if dropout != embedding_dropout:
        keys.problems.append(
            f"resid_pdrop ({dropout}) and embd_pdrop ({embedding_dropout}) differ: set both to one value"
        )
    if not keys.config.get("scale_attn_weights", True):
        keys.problems.append("scale_attn_weights false: scores are always divided by sqrt(head_dim)")
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if keys.config.get(key):
            keys.problems.append(key)
    return {
        "vocab_size": keys.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": keys.integer("n_inner", absent=4 * hidden),
        "num_hidden_layers": keys.integer("n_layer"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden // max(heads, 1),
        "max_position_embeddings": keys.integer("n_positions"),
        "norm": "layernorm",
        "norm_eps": keys.number("layer_norm_epsilon"),
        "position_embedding": "learned",
        "hidden_act": keys.activation("activation_function"),
        "gated_mlp": False,
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "hidden_dropout": dropout,
        "attention_dropout": keys.number("attn_pdrop"),
        "initializer_range": keys.number("initializer_range"),
    }


def _rotary_fields(family: Family, keys: _Keys) -> dict[str, Any]:
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    if hidden % max(heads, 1) and (family == "llama" or keys.raw("head_dim") is None):
        keys.problems.append(f"hidden_size ({hidden}) is not divisible by num_attention_heads ({heads})")
    max_positions = keys.integer("max_position_embeddings")
    theta, scaling = keys.rope(max_positions)
    biased = family in ("llama", "qwen3") and keys.flag("attention_bias")
    num_layers = keys.integer("num_hidden_layers")
    return {
        "vocab_size": keys.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": keys.integer("intermediate_size"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("num_key_value_heads", absent=heads),
        "head_dim": keys.integer("head_dim", absent=hidden // max(heads, 1)),
        "max_position_embeddings": max_positions,
        "norm_eps": keys.number("rms_norm_eps"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "hidden_act": keys.activation("hidden_act"),
        "attention_bias": biased or family == "qwen2",
        "attention_out_bias": biased,
        "mlp_bias": family == "llama" and keys.flag("mlp_bias"),
        "qk_norm": family == "qwen3",
        "sliding_window": _read_sliding_window(family, keys, num_layers),
        "attention_dropout": keys.number("attention_dropout"),
        "initializer_range": keys.number("initializer_range"),
    }


def _head_fields(keys: _Keys) -> dict[str, Any]:
    """head and tie_word_embeddings."""
    architectures = keys.config.get("architectures") or [""]
    if not str(architectures[0]).endswith("ForSequenceClassification"):
        return {"head": "lm", "tie_word_embeddings": keys.flag("tie_word_embeddings")}
    num_labels = keys.config.get("num_labels") or len(keys.config.get("id2label") or (0, 1))
    if num_labels != 1:
        keys.problems.append(f"{architectures[0]} with {num_labels} labels: only one, a scalar, is supported")
    return {"head": "scalar", "tie_word_embeddings": False}


def _read_sliding_window(family: Family, keys: _Keys, num_layers: int) -> int | None:
    """The window of every layer; a mix of layers with and without one is a problem."""
    if family == "llama":  # transformers' llama has none, whatever config.json says
        return None
    window = None if keys.raw("sliding_window") is None else keys.integer("sliding_window")
    layer_types = keys.config.get("layer_types")
    if family == "mistral" and layer_types is None:
        return window
    if family != "mistral" and not keys.flag("use_sliding_window"):
        return None
    if layer_types is None:
        first = keys.integer("max_window_layers")
        layer_types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    kinds = sorted(set(layer_types))
    if kinds not in (["full_attention"], ["sliding_attention"]):
        keys.problems.append(f"layers of different attention ({', '.join(map(str, kinds))}): all must have the same")
    return window if kinds == ["sliding_attention"] else None


def _gpt2_keys(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": model.hidden_size,
        "n_inner": model.intermediate_size,
        "n_layer": model.num_hidden_layers,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_position_embeddings,
        "activation_function": "gelu_new" if model.hidden_act == "gelu_tanh" else model.hidden_act,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "layer_norm_epsilon": model.norm_eps,
    }


def _rotary_keys(model: ModelConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "gelu_pytorch_tanh" if model.hidden_act == "gelu_tanh" else model.hidden_act,
        "attention_dropout": model.attention_dropout,
        **rope_keys(model),
    }
    if model.family in ("llama", "qwen3"):
        keys["attention_bias"] = model.attention_bias
    if model.family == "llama":
        keys["mlp_bias"] = model.mlp_bias
    if model.family == "mistral":
        keys["sliding_window"] = model.sliding_window
    if model.family in ("qwen2", "qwen3"):
        has_window = model.sliding_window is not None
        keys |= {
            "use_sliding_window": has_window,
            "sliding_window": model.sliding_window,
            "max_window_layers": 0 if has_window else model.num_hidden_layers,
        }
    return keys


def _check_representable(model: ModelConfig, config: Mapping[str, Any]) -> None:
    """ValueError unless reading `config` back gives `model`."""
    expected: dict[str, Any] = {name: getattr(model, name) for name in _differing_by_design(model)}
    read = model_config_from_hf(config).replace(**expected)
    wrong = [
        f"{field.name} ({getattr(model, field.name)!r})"
        for field in dataclasses.fields(ModelConfig)
        if getattr(read, field.name) != getattr(model, field.name)
    ]
    if wrong:
        raise ValueError(
            f"a {model.family} model of transformers cannot have {', '.join(wrong)}: export it as another family, or "
            "change them"
        )


def _differing_by_design(model: ModelConfig) -> list[str]:
    names = list(_NOT_IN_HF)
    if model.family != "gpt2":
        names.append("hidden_dropout")
    scaling = model.rope_scaling
    if scaling is not None and scaling.original_max_position_embeddings is None:  # written out, since it must be
        names.append("rope_scaling")
    return names


class _Keys:
    """Typed reads of a config.json that collect what is wrong instead of stopping at the first."""

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        self.config = config
        self.problems: list[str] = []
        self._defaults = DEFAULTS[family]
        self._aliases = GPT2_ALIASES if family == "gpt2" else {}

    def raw(self, key: str) -> Any:
        """The value, or the family's default."""
        for name in (key, self._aliases.get(key, key)):
            if name in self.config:
                return self.config[name]
        return self._defaults.get(key)

    def integer(self, key: str, *, absent: int | None = None) -> int:
        """A whole number; null means `absent` where that is given."""
        value = self.raw(key)
        if value is None and absent is not None:
            return absent
        return self._typed(key, value, int, 1)

    def number(self, key: str) -> float:
        """A number; null means 0, as transformers has it for dropout."""
        value = self.raw(key)
        return float(self._typed(key, 0.0 if value is None else value, (int, float), 1.0))

    def flag(self, key: str) -> bool:
        """A truth value; null means false."""
        value = self.raw(key)
        return self._typed(key, False if value is None else value, bool, False)

    def activation(self, key: str) -> str:
        """ModelConfig's name of the activation."""
        value = self.raw(key)
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            self.problems.append(f"{key} {value!r} is not one of {', '.join(_ACTIVATIONS)}")
            return "silu"
        return _ACTIVATIONS[value]

    def rope(self, max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
        """(rope_theta, rope_scaling)."""
        try:
            return read_rope(self.config, max_position_embeddings=max_position_embeddings)
        except ValueError as error:
            self.problems.append(str(error))
            return 1.0, None

    def token_id(self, key: str, *, vocab_size: int) -> int | None:
        """An id of the vocabulary, the first of a list; None where there is none."""
        value = self.raw(key)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is None:
            return None
        token = self._typed(key, value, int, 0)
        return token if 0 <= token < vocab_size else None

    def _typed(self, key: str, value: Any, expected: Any, stand_in: Any) -> Any:
        is_bool = isinstance(value, bool)
        if isinstance(value, expected) and is_bool == (expected is bool):
            return value
        self.problems.append(f"{key} {value!r} has the wrong type")
        return stand_in
