"""Logits of one rank equal those of transformers for every setting that a config.json can have, not only weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megallm.checkpoint.huggingface import load_into
from megallm.config.huggingface import model_config_from_hf, read_hf_config
from megallm.config.model import ModelConfig
from megallm.generate.sampling import Sampling
from megallm.parallel.mesh import Mesh
from megallm.trainers.engine import Engine

STORIES = Path(__file__).resolve().parents[2] / "shared/data/stories260k"
GPT2 = {"model_type": "gpt2", "vocab_size": 101, "n_embd": 40, "n_layer": 2, "n_head": 5, "n_positions": 64}
ROTARY = {
    "vocab_size": 101,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LLAMA = {"model_type": "llama", **ROTARY}
MISTRAL = {"model_type": "mistral", **ROTARY}
QWEN2 = {"model_type": "qwen2", **ROTARY}
QWEN3 = {"model_type": "qwen3", **ROTARY, "head_dim": 14}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
LINEAR = {"rope_type": "linear", "factor": 2.5}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2_untied": {**GPT2, "tie_word_embeddings": False},
    "gpt2_erf_gelu_narrow": {**GPT2, "activation_function": "gelu", "n_inner": 72, "layer_norm_epsilon": 1e-3},
    "llama": LLAMA,
    "llama_tied": {**LLAMA, "tie_word_embeddings": True},
    "llama_one_kv_head": {**LLAMA, "num_key_value_heads": 1},
    "llama_no_gqa": {**LLAMA, "num_key_value_heads": 4},
    "llama_head_dim": {**LLAMA, "head_dim": 6},
    "llama_biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama_gelu_tanh_eps": {**LLAMA, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-2},
    "llama_linear": {**LLAMA, "rope_scaling": LINEAR},
    "llama_linear_old_name": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 500.0},
    "llama_llama3": {**LLAMA, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    "mistral": {**MISTRAL, "sliding_window": None},
    "mistral_window": {**MISTRAL, "sliding_window": 5},
    "mistral_window_of_one": {**MISTRAL, "sliding_window": 1},
    "qwen2": QWEN2,
    "qwen2_tied": {**QWEN2, "tie_word_embeddings": True},
    "qwen2_window": {**QWEN2, **WINDOW},
    "qwen2_yarn": {**QWEN2, "rope_scaling": YARN, "rope_theta": 1e6},
    "qwen3": QWEN3,
    "qwen3_biases": {**QWEN3, "attention_bias": True},
    "qwen3_window_tied": {**QWEN3, **WINDOW, "tie_word_embeddings": True},
    "qwen3_yarn": {**QWEN3, "rope_scaling": {**YARN, "attention_factor": 1.3, "beta_fast": 8.0}},
    "qwen3_yarn_mscale": {
        **QWEN3,
        "rope_scaling": {
            **YARN,
            "beta_fast": 2.0,
            "beta_slow": 0.1,
            "mscale": 0.7,
            "mscale_all_dim": 1.1,
            "truncate": False,
        },
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = _random_oracle(transformers.AutoModelForCausalLM, CONFIGS[name])
    oracle.save_pretrained(tmp_path, max_shard_size="20KB")
    ids = _ids()
    with torch.no_grad():
        expected = oracle(ids).logits
    torch.testing.assert_close(_outputs(tmp_path, ids), expected.view(-1, 101), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", (GPT2, LLAMA, QWEN3), ids=lambda config: config["model_type"])
def test_scores_of_a_one_label_classifier_equal_those_of_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    classifier = {**config, "num_labels": 1, "pad_token_id": 100, "tie_word_embeddings": False}
    oracle = _random_oracle(transformers.AutoModelForSequenceClassification, classifier)
    oracle.save_pretrained(tmp_path)
    ids = _ids().clamp(max=99)  # no padding: transformers scores the last token
    with torch.no_grad():
        expected = oracle(ids).logits[:, 0]
    scores = _outputs(tmp_path, ids)  # [B, S]
    torch.testing.assert_close(scores[:, -1], expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"needs the trained model in {STORIES.parent.name}/{STORIES.name}")
def test_a_trained_model_gives_the_logits_loss_and_story_of_transformers() -> None:
    golden = json.loads((STORIES / "golden.json").read_text())
    engine = _loaded(STORIES)
    prompt, story = golden["prompt_ids"], golden["greedy_ids"]

    last = _forward(engine, torch.tensor([prompt]))[-1]
    values, ids = last.topk(5)
    assert ids.tolist() == [token for token, _ in golden["last_logits_top5"]]
    torch.testing.assert_close(values, torch.tensor([value for _, value in golden["last_logits_top5"]]))
    assert last.double().sum().item() == pytest.approx(golden["last_logits_sum_f64"], abs=1e-3)

    logits = _forward(engine, torch.tensor([story]))
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(story[1:]))
    assert loss.item() == pytest.approx(golden["loss_on_greedy_ids"], abs=1e-6)

    num_new = len(story) - len(prompt)
    new = engine.generate([prompt], max_new_tokens=num_new, sampling=Sampling(temperature=0.0))
    assert prompt + new[0] == story


def _random_oracle(opener: Any, config: dict[str, Any]) -> Any:
    """A model of transformers with random weights, norms and biases random too, without dropout."""
    from transformers import AutoConfig

    torch.manual_seed(4)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if config["model_type"] == "gpt2" else {}
    oracle = opener.from_config(AutoConfig.for_model(**config, **no_dropout)).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return oracle


def _ids() -> torch.Tensor:
    """[3, 23] int64: longer than the windows and than the length that the frequencies were stretched from."""
    return torch.randint(0, 101, (3, 23), generator=torch.Generator().manual_seed(5))


def _loaded(directory: Path) -> Engine:
    config: ModelConfig = model_config_from_hf(read_hf_config(directory))
    engine = Engine(config, Mesh.build(tp=1, pp=1), train=False)
    assert load_into(engine.model, directory) == ()
    return engine


def _outputs(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    return _forward(_loaded(directory), ids)


def _forward(engine: Engine, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B S, V] of a language model, scores [B, S] of a scalar one."""
    is_scalar = engine.config.head == "scalar"
    outputs = engine.forward({"input_ids": ids}, lambda out, _: out if is_scalar else out.gathered())
    return torch.cat(outputs)
