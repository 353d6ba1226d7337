"""The benchmark's worker for DeepSpeed's ZeRO on CPU ranks: the model of hf.py in `deepspeed.initialize`, over gloo.

Its operators are compiled on first use, by one process: `--build` does that. (If a build was interrupted, remove the
file `lock` in the folder of torch's extensions, or the next one waits for it for ever.)
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from hf import build_model, own_microbatches

sys.path.insert(0, str(Path(__file__).parents[1]))
from protocol import serve

SETTINGS: dict[int, dict[str, Any]] = {
    1: {"contiguous_gradients": False, "reduce_scatter": False},
    2: {"contiguous_gradients": False},
    3: {"stage3_param_persistence_threshold": 0},
}
"""The fastest found here, against the defaults: 7 %, 9 % and 5 %. Tried as well, each alone: overlap_comm, bucket sizes
of 1 and 2 million, round robin, prefetching off, DeepSpeed's CPUAdam. (A threshold above every parameter is faster
still at stage 3, but then parameters are not sharded.)"""


def main() -> None:
    """--folder of the protocol, --shape and --layout as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="of the protocol")
    parser.add_argument("--shape", type=json.loads)
    parser.add_argument("--layout", type=json.loads, default={}, help="zero, and keys of zero_optimization")
    parser.add_argument("--weights", help="directory of the initial weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--optimizer", choices=("torch", "cpu_adam", "fused_adam"), default="torch")
    parser.add_argument("--build", action="store_true", help="compile the operators and end")
    args = parser.parse_args()
    if args.build:
        for name in ("ShareMemCommBuilder", "CPUAdamBuilder"):
            get_accelerator().create_op_builder(name).load()
        return
    torch.set_num_threads(args.threads)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo")
    rank, size, shape = dist.get_rank(), dist.get_world_size(), args.shape
    microbatches = own_microbatches(shape, rank=rank, size=size)
    model = build_model(shape, weights=args.weights)
    stage = args.layout.get("zero", 1)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(args.optimizer, model),
        config={
            "train_micro_batch_size_per_gpu": shape["micro_batch"],
            "gradient_accumulation_steps": len(microbatches),
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage}
            | SETTINGS[stage]
            | {key: value for key, value in args.layout.items() if key != "zero"},
            "steps_per_print": 1_000_000_000,
        },
    )

    def step() -> float:
        total = 0.0
        for input_ids, labels in microbatches:
            logits = engine(input_ids=input_ids).logits
            loss = torch.nn.functional.cross_entropy(logits.view(-1, shape["vocab"]), labels)
            engine.backward(loss)  # divides by the microbatches
            engine.step()  # does nothing before the last of them
            total += loss.item()
        return total / len(microbatches)

    first = [step() for _ in range(2)]
    serve(args.folder, rank=rank, step=step, barrier=dist.barrier, first=first)


def make_optimizer(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW: torch's fused one, DeepSpeed's for offload, or DeepSpeed's for accelerators in its CPU build."""
    given = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
    if name == "torch":
        return torch.optim.AdamW(model.parameters(), **given, fused=True)
    if name == "cpu_adam":
        return deepspeed.ops.adam.DeepSpeedCPUAdam(model.parameters(), **given, adamw_mode=True)
    return deepspeed.ops.adam.FusedAdam(model.parameters(), **given, adam_w_mode=True)


if __name__ == "__main__":
    main()
