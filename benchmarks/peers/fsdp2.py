"""The benchmark's worker for torch's FSDP2 on CPU ranks: the model of hf.py in `fully_shard`, over gloo.

Of `--layout`: `reshard` says whether a layer's parameters are freed between forward and backward (as ZeRO 3) or kept
until the backward of the step's last microbatch (nearest to ZeRO 2).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from hf import build_model, own_microbatches
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))
from protocol import serve


def main() -> None:
    """--folder of the protocol, --shape and --layout as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--layout", type=json.loads, default={})
    parser.add_argument("--weights", help="directory of the initial weights")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo")
    rank, size, shape, layout = dist.get_rank(), dist.get_world_size(), args.shape, args.layout
    microbatches = own_microbatches(shape, rank=rank, size=size)
    model = build_model(shape, weights=args.weights)
    reshard, sync_all = layout.get("reshard", True), layout.get("sync_all", False)
    mesh = dist.init_device_mesh("cpu", (size,))
    for layer in [] if layout.get("one") else model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    if layout.get("split_root", False):
        fully_shard(model.model.embed_tokens, mesh=mesh, reshard_after_forward=reshard)
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=layout.get("reshard_root", False))
    layers = list(model.model.layers)
    if layout.get("prefetch", False):
        for this, ahead in itertools.pairwise(layers):
            this.set_modules_to_forward_prefetch([ahead])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        total = 0.0
        for index, (input_ids, labels) in enumerate(microbatches):
            is_last = index == len(microbatches) - 1
            model.set_requires_gradient_sync(is_last or sync_all)
            if not reshard:
                model.set_reshard_after_backward(is_last)
            model.set_is_last_backward(is_last)
            logits = model(input_ids=input_ids).logits
            loss = torch.nn.functional.cross_entropy(logits.view(-1, shape["vocab"]), labels) / len(microbatches)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    first = [step() for _ in range(2)]
    serve(args.folder, rank=rank, step=step, barrier=dist.barrier, first=first)


if __name__ == "__main__":
    main()
