"""The benchmark's worker for Hugging Face transformers on one rank: LlamaForCausalLM, SDPA, torch's fused AdamW.

Its initial weights are scaled as ours are (transformers does not do it), so that the losses of both are comparable.
`--save DIR` writes such a model and ends; the workers of zero.py, ours and peers', all begin with it.
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
    parser.add_argument("--folder", help="of the protocol")
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--save", help="write the initial weights to this directory and end")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--optimizer", choices=("fused", "foreach"), default="fused")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--compile", action="store_true", help="run the model through torch.compile (a C++ compiler)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = args.shape
    model = build_model(shape, attention=args.attention)
    if args.save:
        model.save_pretrained(args.save)
        return
    forward = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, **{args.optimizer: True}
    )
    microbatches = own_microbatches(shape)

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


def build_model(
    shape: dict[str, int], *, attention: str = "sdpa", weights: str | None = None
) -> LlamaForCausalLM:
    """The fp32 model with its initial weights, or with those of a directory."""
    if weights is not None:
        return LlamaForCausalLM.from_pretrained(weights, dtype=torch.float32, attn_implementation=attention)
    torch.manual_seed(1)
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
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config)
    scale_residual_weights(model)
    return model


def own_microbatches(
    shape: dict[str, int], *, rank: int = 0, size: int = 1
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(input ids [B, S], labels [B*S]) of each microbatch of one of `size` data-parallel ranks."""
    generator = torch.Generator().manual_seed(1)
    rows = shape["micro_batch"] * shape["microbatches"]
    ids = torch.randint(0, shape["vocab"], (rows, shape["seq"] + 1), generator=generator)
    own = ids.chunk(size)[rank].chunk(shape["microbatches"] // size)
    return [(part[:, :-1].contiguous(), part[:, 1:].reshape(-1)) for part in own]


def scale_residual_weights(model: LlamaForCausalLM) -> None:
    """Divide what adds to the residual stream by sqrt(2 * layers) (GPT-2, section 2.3), as our model starts out."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.div_((2 * model.config.num_hidden_layers) ** 0.5)


if __name__ == "__main__":
    main()
