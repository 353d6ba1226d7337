"""The benchmark's worker for Hugging Face's generate: LlamaForCausalLM, SDPA, its default (dynamic) cache.

A batch's prompts are padded on the left; it is decoded until its longest answer is done. `--save DIR` writes the model
that both sides load, and ends.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from hf import build_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from protocol import serve
from workload import checksum, workload


def main() -> None:
    """--folder of the protocol, --shape as JSON, --weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="of the protocol")
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--layout", type=json.loads)
    parser.add_argument("--save", help="write initial weights to this directory and end")
    parser.add_argument("--weights")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(args.shape, weights=args.weights).eval()
    if args.save:
        model.save_pretrained(args.save)
        return
    prompts, lengths = workload(args.shape["prompts"], args.shape["vocab"])
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    batches = [range(first, min(first + args.shape["batch"], len(prompts)))
               for first in range(0, len(prompts), args.shape["batch"])]  # fmt: skip

    @torch.inference_mode()
    def step() -> float:
        answers: list[list[int]] = []
        for batch in batches:
            longest = max(len(prompts[i]) for i in batch)
            ids = torch.tensor([[0] * (longest - len(prompts[i])) + prompts[i] for i in batch])
            mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
            found = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max(lengths[i] for i in batch),
                do_sample=False,
                use_cache=True,
            )
            answers += [row[longest:][: lengths[i]] for i, row in zip(batch, found.tolist(), strict=True)]
        return checksum(answers)

    serve(args.folder, rank=0, step=step, barrier=lambda: None, first=[step()])


if __name__ == "__main__":
    main()
