"""`megallm export`: the directory it writes opens in transformers, tokenizer included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megallm.checkpoint.huggingface import SINGLE_FILE
from megallm.checkpoint.sharded import TrainState, save
from megallm.cli.main import run as megallm
from megallm.config.model import ModelConfig
from megallm.data.tokenizer import Tokenizer, byte_tokenizer, char_tokenizer, train_bpe
from megallm.model.context import TokenContext
from megallm.model.transformer import Transformer
from megallm.parallel.mesh import Mesh
from megallm.runtime.launch import UsageError
from megallm.testing.tiny import tiny_config

TEXT = "Now is the winter of our discontent\nMade glorious summer by this sun of York;\n"
TOKENIZERS = {
    "bytes": byte_tokenizer,
    "chars": lambda: char_tokenizer([TEXT], end_mark=True),
    "bpe": lambda: train_bpe([TEXT * 20], 300),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_exported_tokenizer_opens_in_transformers_and_encodes_alike(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = TOKENIZERS[kind]()
    _save(tmp_path / "run", tiny_config("llama", vocab_size=tokenizer.vocab_size), tokenizer)
    assert megallm(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opened(TEXT, add_special_tokens=False)["input_ids"] == tokenizer.encode(TEXT, add_special_tokens=False)
    assert opened.decode(tokenizer.encode(TEXT)) == TEXT
    assert opened.eos_token_id == tokenizer.eos_id
    assert opened.model_max_length == 64
    again = Tokenizer.from_path(tmp_path / "out")
    assert (again.eos_id, again.vocabulary_hash()) == (tokenizer.eos_id, tokenizer.vocabulary_hash())


def test_a_tokenizer_config_beside_the_tokenizer_is_taken_over(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    _save(tmp_path / "run", tiny_config("llama", vocab_size=257), tokenizer)
    given = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"})
    (tmp_path / "run" / "tokenizer_config.json").write_text(given)
    megallm(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == given


def test_the_eos_token_of_the_model_goes_before_the_usual_names(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 257, "content": "<|eot_id|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    _save(tmp_path, tiny_config("llama", vocab_size=258, eos_token_id=257), None)
    megallm(["export", str(tmp_path), str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "<|eot_id|>"


def test_a_dtype_is_cast_to_and_a_checkpoint_without_tokenizer_is_exported_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = _save(tmp_path / "run", tiny_config("llama"), None)
    step = tmp_path / "run" / "step-00000003"
    assert megallm(["export", str(step), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "without a tokenizer" in said and f"{sum(p.numel() for p in model.parameters()):,} parameters" in said
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", "generation_config.json", SINGLE_FILE]
    stored = load_file(tmp_path / "out" / SINGLE_FILE)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    norm = model.stage(0).norm.weight.detach()
    assert torch.equal(stored["model.norm.weight"], norm.bfloat16())


def test_a_gpt2_without_biases_gives_transformers_equal_logits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = tiny_config("gpt2", attention_bias=False, attention_out_bias=False, mlp_bias=False)
    model = _save(tmp_path / "run", config, None)
    megallm(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = opened(ids).logits.view(18, 101)
        got = _logits(model, ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("checkpoint", "out", "message"),
    (
        ("none", "out", "holds no complete checkpoint"),
        ("empty", "out", "holds no complete checkpoint"),
        ("run", "run", "exists and is not empty"),
        ("odd", "out", "cannot have qk_norm"),
    ),
)
def test_what_cannot_be_exported_is_a_usage_error_of_one_line(
    checkpoint: str, out: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    if checkpoint in ("run", "odd"):
        _save(tmp_path / checkpoint, tiny_config("llama", qk_norm=checkpoint == "odd"), None)
    with pytest.raises(UsageError, match=message) as error:
        megallm(["export", str(tmp_path / checkpoint), str(tmp_path / out)])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / f"{out}.partial").exists()


def _save(directory: Path, config: ModelConfig, tokenizer: Tokenizer | None) -> Transformer:
    """A checkpoint of random weights, norms and biases random too, with the tokenizer beside it."""
    model = Transformer(config, Mesh.build(tp=1, pp=1), partition=[range(config.num_hidden_layers)])
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.initialize(1).parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    save(directory, model, None, TrainState(step=3, consumed_samples=0, tokens=0))
    if tokenizer is not None:
        tokenizer.save(directory / "tokenizer.json")
    return model


def _logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    batch_size, seq_length = ids.shape
    return model.stage(0)(ids.view(-1), TokenContext(batch_size=batch_size, seq_length=seq_length)).local[:, :101]
