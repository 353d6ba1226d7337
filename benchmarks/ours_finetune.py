"""The benchmark's worker for fine-tuning with MegaLLM: one engine, a new batch of finetune.py's rows every step."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import serve

from megallm.checkpoint.huggingface import load_into
from megallm.data.examples import Group
from megallm.data.finetune import PairDataset, SftDataset
from megallm.data.loader import BatchLoader
from megallm.data.masks import Example
from megallm.parallel import Engine, Mesh, ModelConfig, OptimConfig, language_model_loss
from megallm.trainers import dpo
from megallm.trainers.losses import Batch, count_labels
from megallm.trainers.preference_losses import DpoLoss, RewardLoss, count_prompts

BETA = 0.1


def main() -> None:
    """--folder of the protocol, --shape as JSON, --layout as JSON: kind, rows (a file)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--layout", type=json.loads, required=True)
    parser.add_argument("--weights", required=True, help="folder of lm/ and scalar/, the initial weights")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kind, shape = args.layout["kind"], args.shape
    dataset = dataset_of(kind, json.loads(Path(args.layout["rows"]).read_text()), shape)
    size = shape["micro_batch"] * shape["microbatches"]
    loader = BatchLoader(dataset, global_batch_size=size, prefetch=True)
    engine = engine_of(kind, shape, args.weights)
    loss_fn: Any = language_model_loss
    count_fn: Any = count_labels
    complete: Callable[[Batch], Batch] = dict
    if isinstance(dataset, PairDataset):
        loss_fn, count_fn = RewardLoss(), count_prompts
        if kind == "dpo":
            loss_fn, complete = DpoLoss(beta=BETA), referenced(dataset, shape, args.weights)
    taken = 0

    def step() -> float:
        nonlocal taken
        batch = complete(loader.batch(taken))
        taken += size
        return engine.train_step(batch, loss_fn, count_fn=count_fn).metrics()["loss"]

    first = [step() for _ in range(2)]
    serve(args.folder, rank=0, step=step, barrier=lambda: None, first=first)
    loader.close()


def engine_of(kind: str, shape: dict[str, int], weights: str, *, train: bool = True) -> Engine:
    """The model with the head of the kind, and the initial weights."""
    config = ModelConfig(
        family="llama",
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["hidden"] // shape["heads"],
        max_position_embeddings=shape["seq"],
        head="scalar" if kind == "reward" else "lm",
    )
    engine = Engine(
        config, Mesh.build(),
        optim=OptimConfig(learning_rate=1e-4, weight_decay=0.1, beta2=0.95, max_grad_norm=1.0),
        micro_batch_size=shape["micro_batch"] * (2 if kind in ("reward", "dpo") else 1), train=train,
    )  # fmt: skip
    groups = None if engine.flat is None else engine.flat.refill()
    load_into(engine.model, Path(weights) / config.head, groups=groups)
    if engine.optimizer is not None:
        engine.optimizer.refresh_master()
    return engine


def dataset_of(kind: str, content: dict[str, Any], shape: dict[str, int]) -> SftDataset | PairDataset:
    """The rows in the file's order; packs as their plan has them, which is what the file has for the peer."""
    made = [example(*row) for row in content["rows"]]
    if kind in ("reward", "dpo"):
        groups = [Group(examples=each, ranks=(0, 1)) for each in zip(made[0::2], made[1::2], strict=True)]
        return PairDataset(
            groups, seq_length=shape["seq"], pad_to_multiple=8, shuffle=False,
            outputs="ends" if kind == "reward" else "responses",
        )  # fmt: skip
    if kind == "packed":
        return SftDataset(made, seq_length=shape["seq"], pack=True)
    return SftDataset(made, seq_length=shape["seq"], pad_to_multiple=8, shuffle=False)


def example(ids: list[int], start: int) -> Example:
    """A row, trained from `start` on."""
    return Example(
        input_ids=np.array(ids, dtype=np.int32), is_trained=np.arange(len(ids)) >= start, prompt_length=start
    )


def referenced(dataset: PairDataset, shape: dict[str, int], weights: str) -> Callable[[Batch], Batch]:
    """What adds the reference's log-probabilities to a batch, computed here for all rows."""
    table = dpo.precompute(engine_of("dpo", shape, weights, train=False), dataset, batch_size=shape["micro_batch"])
    return lambda batch: batch | {"ref_logprobs": dpo.look_up(table, dataset, batch)}


if __name__ == "__main__":
    main()
