"""The benchmark's worker for our own generation on one rank."""

from __future__ import annotations

import argparse
import json

import torch
from protocol import serve
from workload import checksum, workload

from megallm.generate.rollout import Limits
from megallm.parallel import Engine, Mesh, open_model


def main() -> None:
    """--folder of the protocol, --shape as JSON, --weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--layout", type=json.loads)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = open_model(args.weights)
    engine = Engine(source.config, Mesh.build(), train=False)
    source.load_weights(engine)
    prompts, lengths = workload(args.shape["prompts"], args.shape["vocab"])
    limits = Limits(max_batch=args.shape["batch"])

    def step() -> float:
        return checksum(engine.rollout(prompts, max_new_tokens=lengths, limits=limits).token_ids)

    serve(args.folder, rank=0, step=step, barrier=lambda: None, first=[step()])


if __name__ == "__main__":
    main()
