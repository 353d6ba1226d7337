"""Greedy answers equal those of transformers' generate token for token, for every family, on several layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_huggingface_logits import GPT2, LLAMA, LLAMA3, MISTRAL, QWEN2, QWEN3, WINDOW, _random_oracle
from training_cases import once

from megallm.checkpoint.huggingface import load_into
from megallm.config.huggingface import model_config_from_hf, read_hf_config
from megallm.config.parallel import ParallelConfig
from megallm.generate.rollout import Limits
from megallm.generate.sampling import Sampling
from megallm.parallel.mesh import Mesh
from megallm.testing.pool import run_ranks
from megallm.trainers.engine import Engine

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {**GPT2, "n_head": 4},
    "llama": LLAMA,
    "llama_tied_one_kv_head": {**LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama3_rope": {**LLAMA, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    "mistral": {**MISTRAL, "sliding_window": None},
    "mistral_window": {**MISTRAL, "sliding_window": 5},
    "qwen2": QWEN2,
    "qwen2_window": {**QWEN2, **WINDOW},
    "qwen3": QWEN3,
}
LAYOUTS = {1: ((1, 1),), 2: ((2, 1), (1, 2)), 4: ((2, 2),)}
PROMPTS = [[5, 17, 3, 99, 42, 8, 60, 1, 77], [100], [12, 55, 31, 9], [64, 2]]
NEW = 16


@once
def oracle(name: str, folder: Path) -> list[list[int]]:
    """What transformers generates after each prompt alone; its model is left in `folder`."""
    from transformers import AutoModelForCausalLM

    model = _random_oracle(AutoModelForCausalLM, CONFIGS[name])
    model.save_pretrained(folder)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        found.append(out[0, len(prompt) :].tolist())
    return found


def generated(rank: int, world: int, folders: dict[str, Path]) -> dict[tuple[str, int, int], list[list[int]]]:
    found = {}
    for tp, pp in LAYOUTS[world]:
        mesh = Mesh.build(tp=tp, pp=pp)
        for name, folder in folders.items():
            config = model_config_from_hf(read_hf_config(folder))
            engine = Engine(config, mesh, parallel=ParallelConfig(tp=tp, pp=pp), train=False)
            load_into(engine.model, folder)
            found[name, tp, pp] = engine.rollout(
                PROMPTS, max_new_tokens=NEW, sampling=Sampling(), limits=Limits(max_batch=3)
            ).token_ids
    return found


@pytest.mark.parametrize("world", LAYOUTS)
def test_greedy_answers_equal_those_of_transformers(world: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("transformers")
    root = tmp_path_factory.getbasetemp() / "generate-oracles"
    folders = {name: root / name for name in CONFIGS}
    wanted = {name: oracle(name, folder) for name, folder in folders.items()}
    for name, answers in wanted.items():
        assert len({token for answer in answers for token in answer}) > 4, f"{name} says too little"
    for found in run_ranks(generated, world, folders):
        for (name, tp, pp), answers in found.items():
            assert answers == wanted[name], (name, tp, pp)
