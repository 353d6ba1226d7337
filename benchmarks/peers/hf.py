"""The benchmark's worker for Hugging Face transformers on one rank: LlamaForCausalLM, SDPA, torch's fused AdamW.

Its initial weights are scaled as ours are (transformers does not do it), so that the losses of both are comparable.
"""

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
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--compile", action="store_true", help="run the model through torch.compile (a C++ compiler)")
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
        rms_norm_eps=1e-5,
        attn_implementation=args.attention,
    )
    model = LlamaForCausalLM(config)
    scale_residual_weights(model)
    forward = torch.compile(model) if args.compile else model
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
            logits = forward(input_ids=input_ids).logits
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


def scale_residual_weights(model: LlamaForCausalLM) -> None:
    """Divide what adds to the residual stream by sqrt(2 * layers) (GPT-2, section 2.3), as our model starts out."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.div_((2 * model.config.num_hidden_layers) ** 0.5)


if __name__ == "__main__":
    main()
