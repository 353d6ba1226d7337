"""The benchmark's worker for Hugging Face transformers on one rank: LlamaForCausalLM, SDPA, torch's fused AdamW."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from protocol import serve


def main() -> None:
    """--folder of the protocol, --shape as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--optimizer", choices=("fused", "foreach"), default="fused")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    shape = args.shape
    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=shape["seq"],
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, **{args.optimizer: True}
    )
    generator = torch.Generator().manual_seed(1)
    rows = shape["micro_batch"] * shape["microbatches"]
    ids = torch.randint(0, shape["vocab"], (rows, shape["seq"] + 1), generator=generator)
    microbatches = [(c[:, :-1].contiguous(), c[:, 1:].reshape(-1)) for c in ids.chunk(shape["microbatches"])]

    def step() -> float:
        total = 0.0
        for input_ids, labels in microbatches:
            logits = model(input_ids=input_ids).logits
            loss = torch.nn.functional.cross_entropy(logits.view(-1, shape["vocab"]), labels) / len(microbatches)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    for _ in range(2):
        step()
    serve(args.folder, rank=0, step=step, barrier=lambda: None)


if __name__ == "__main__":
    main()
