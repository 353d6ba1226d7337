"""A downstream trainer of its own: your batches, your loss, no command line. One rank or many, the same file.

    python examples/custom_loop.py
    torchrun --standalone --nproc-per-node 4 examples/custom_loop.py
"""

import torch

from megallm.parallel import Engine, Mesh, OptimConfig, get_preset, start_process_group
from megallm.runtime.launch import device_for, launch_info, run_main


def make_batch(step, rank, size):
    """This dp rank's part of 8 sequences of 32 tokens; token 0 is given half the weight."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, 50, (8, 1), generator=generator)
    ids = (start + 3 * torch.arange(33)) % 50  # the task: count up in threes
    ids = ids.chunk(size)[rank]
    labels = ids[:, 1:]
    weights = torch.where(labels == 0, 0.5, 1.0)
    return {"input_ids": ids[:, :-1], "labels": labels, "weights": weights}


def weighted_loss(logits, batch):
    """(sum, count, metrics): the engine divides by the count of the whole step, over all ranks and microbatches."""
    losses = logits.cross_entropy(batch["labels"]) * batch["weights"]
    return losses.sum(), batch["weights"].sum(), {"unweighted": (losses / batch["weights"]).sum()}


def main():
    """Builds a mesh, an engine on it, and trains 30 steps."""
    info = launch_info()
    device = device_for(info.local_rank)
    start_process_group(rank=info.rank, world_size=info.world_size, device=device)
    tp, pp = (2, 2) if info.world_size == 4 else (1, 1)
    mesh = Mesh.build(tp=tp, pp=pp, device=device)
    config = get_preset("tiny").replace(vocab_size=50, num_hidden_layers=2, hidden_size=64, intermediate_size=128)
    engine = Engine(config, mesh, micro_batch_size=2, optim=OptimConfig(learning_rate=3e-3), seed=1)
    for step in range(30):
        batch = make_batch(step, mesh.dp.rank, mesh.dp.size)
        result = engine.train_step(batch, weighted_loss, count_fn=lambda b: b["weights"].sum())
        metrics = result.metrics()  # a collective: every rank calls it
        if mesh.world.rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1:3}   loss {metrics['loss']:.4f}   grad norm {metrics['grad_norm']:.3f}", flush=True)
    new = engine.generate([[3, 6, 9]], max_new_tokens=5)
    if mesh.world.rank == 0:
        print("3 6 9 is continued by", *new[0])
    return 0


if __name__ == "__main__":
    run_main(main)
