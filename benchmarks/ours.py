"""The benchmark's worker for MegaLLM: one engine, steps on the same batch."""

from __future__ import annotations

import argparse
import json

import torch
from protocol import serve

from megallm.checkpoint.huggingface import load_into
from megallm.parallel import (
    Engine,
    Mesh,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    language_model_loss,
    start_process_group,
)
from megallm.parallel.collectives import barrier
from megallm.runtime.environment import launch_info


def main() -> None:
    """--folder of the protocol, --shape as JSON, --layout as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--layout", type=json.loads, default={})
    parser.add_argument("--weights", help="Hugging Face directory of the initial weights")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    info, shape, device = launch_info(), args.shape, torch.device("cpu")
    start_process_group(rank=info.rank, world_size=info.world_size, device=device)
    parallel = ParallelConfig(**args.layout)
    mesh = Mesh.build(tp=parallel.tp, pp=parallel.pp)
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
    )
    engine = Engine(
        config,
        mesh,
        parallel=parallel,
        optim=OptimConfig(learning_rate=1e-4, weight_decay=0.1, beta2=0.95, max_grad_norm=1.0),
        micro_batch_size=shape["micro_batch"],
    )
    if args.weights:
        load_into(engine.model, args.weights, groups=engine.flat.refill())
        engine.optimizer.refresh_master()
    generator = torch.Generator().manual_seed(1)
    rows = shape["micro_batch"] * shape["microbatches"]
    ids = torch.randint(0, shape["vocab"], (rows, shape["seq"] + 1), generator=generator)
    ids = ids.chunk(mesh.dp.size)[mesh.dp.rank]
    batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}

    def step() -> float:
        return engine.train_step(batch, language_model_loss).metrics()["loss"]

    first = [step() for _ in range(2)]
    serve(args.folder, rank=info.rank, step=step, barrier=lambda: barrier(mesh.world, device), first=first)


if __name__ == "__main__":
    main()
