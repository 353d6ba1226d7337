"""Hugging Face's own models are the oracle: loss and every gradient, on one rank and at tp 2 x pp 2; and back.

Bounds: the loss to 1e-4 relative (measured: below 1e-6), every gradient to 1e-4 of its largest element, logits of the
exported model to 1e-5.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from gathered import Part, assembled, parts_of

from megallm.checkpoint.huggingface import load_into
from megallm.checkpoint.sharded import TrainState, save
from megallm.cli.main import run as megallm
from megallm.config.huggingface import model_config_from_hf, read_hf_config
from megallm.config.optim import OptimConfig
from megallm.config.parallel import ParallelConfig
from megallm.model.hf_names import hf_places
from megallm.parallel.mesh import Mesh
from megallm.testing.pool import run_ranks
from megallm.trainers.engine import Engine
from megallm.trainers.losses import language_model_loss

transformers = pytest.importorskip("transformers", reason="the oracle is Hugging Face's own models")

SIZES = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 10000.0}  # fmt: skip
FAMILIES = {
    "gpt2": ("GPT2Config", {"vocab_size": 101, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "llama": ("LlamaConfig", SIZES | {"tie_word_embeddings": False}),
    "llama31_tied": ("LlamaConfig", SIZES | {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama_one_kv_head": ("LlamaConfig", SIZES | {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "mistral_window": ("MistralConfig", SIZES | {"sliding_window": 5, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", SIZES | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", SIZES | {"head_dim": 12, "tie_word_embeddings": False}),
}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def batch() -> dict[str, torch.Tensor]:
    """Four sequences of 16 tokens; every fifth label is missing."""
    ids = torch.randint(0, 101, (4, 17), generator=torch.Generator().manual_seed(5))
    labels = ids[:, 1:].clone()
    labels.view(-1)[::5] = -100
    return {"input_ids": ids[:, :-1].contiguous(), "labels": labels}


def save_oracle(name: str, folder: Path) -> None:
    """A random model of the family as a directory of several safetensors files."""
    config_class, sizes = FAMILIES[name]
    torch.manual_seed(3)
    config = getattr(transformers, config_class)(**sizes, **(NO_DROPOUT if name == "gpt2" else {}))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: 1 and 0 would hide a mistake
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    model.save_pretrained(folder, max_shard_size="20KB")


def oracle_gradients(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """(mean loss, gradients by stored name) of transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    data = batch()
    logits = model(input_ids=data["input_ids"]).logits
    loss = torch.nn.functional.cross_entropy(logits.view(-1, 101), data["labels"].reshape(-1))
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}


def our_gradients(
    rank: int, world_size: int, folders: dict[str, str], tp: int, pp: int, save_to: str | None = None
) -> dict[str, tuple[float, list[Part]]]:
    """{family: (mean loss, gradient slices)} of one step without clipping; saves the loaded weights if asked."""
    results = {}
    for name, folder in folders.items():
        engine = Engine(
            model_config_from_hf(read_hf_config(folder)),
            Mesh.build(tp=tp, pp=pp),
            parallel=ParallelConfig(tp=tp, pp=pp),
            optim=OptimConfig(learning_rate=0.0, max_grad_norm=0.0),
            micro_batch_size=2,
        )
        load_into(engine.model, folder)
        if save_to is not None:
            save(f"{save_to}/{name}", engine.model, None, TrainState(step=0, consumed_samples=0, tokens=0))
        loss = engine.train_step(batch(), language_model_loss).metrics()["loss"]
        assert engine.gradients is not None
        results[name] = (loss, parts_of(engine.model, engine.gradients.named()))
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("huggingface")
    for name in FAMILIES:
        save_oracle(name, root / name)
    return {name: str(root / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def ours(folders: dict[str, str], checkpoints: Path):  # type: ignore[no-untyped-def]
    @cache
    def at(tp: int, pp: int) -> list[dict[str, tuple[float, list[Part]]]]:
        save_to = str(checkpoints) if tp * pp > 1 else None
        return run_ranks(our_gradients, tp * pp, folders, tp, pp, save_to)

    return at


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)], ids=["one_rank", "tp2_pp2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_every_gradient_equal_huggingface(ours, folders, name, tp, pp) -> None:  # type: ignore[no-untyped-def]
    ranks = ours(tp, pp)
    expected_loss, expected = oracle_gradients(Path(folders[name]))
    assert ranks[0][name][0] == pytest.approx(expected_loss, rel=1e-4)
    got = assembled([rank[name][1] for rank in ranks])
    places = hf_places(model_config_from_hf(read_hf_config(folders[name])))
    assert set(got) == set(places)
    for parameter, place in places.items():
        reference = place.view(expected[place.name])
        scale = reference.abs().max()
        if name == "gpt2" and parameter.endswith("k_proj.bias"):
            # Zero in exact arithmetic: without rope a key bias adds one constant to all scores of a query, which
            # softmax ignores. What is left is rounding, so it is held to the scale of the weight's gradient.
            weight = places[parameter.replace("bias", "weight")]
            scale = weight.view(expected[weight.name]).abs().max()
        assert ((got[parameter] - reference).abs().max() / scale).item() < 1e-4, parameter


@pytest.mark.parametrize("name", FAMILIES)
def test_export_of_a_sharded_checkpoint_opens_in_transformers_with_equal_logits(
    ours, folders, checkpoints, tmp_path, name, capsys
) -> None:  # type: ignore[no-untyped-def]
    ours(2, 2)  # saved at tp 2 x pp 2
    assert megallm(["export", str(checkpoints / name), str(tmp_path / "out")]) == 0
    before = transformers.AutoModelForCausalLM.from_pretrained(folders[name])
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = batch()["input_ids"]
    torch.testing.assert_close(after(ids).logits, before(ids).logits, rtol=0, atol=1e-5)
