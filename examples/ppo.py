"""Proximal policy optimisation of a language model against reward models and functions, on any layout of ranks.

    python examples/ppo.py                                                             embedded defaults
    python examples/ppo.py --model runs/sft --data prompts.jsonl --reward runs/reward --save runs/ppo
    torchrun --standalone --nproc-per-node 4 examples/ppo.py --model runs/sft --reward runs/reward --tp 2 --pp 2
"""

from megallm.cli.reinforcement import run_example
from megallm.config.checkpoint import CheckpointConfig
from megallm.config.optim import OptimConfig
from megallm.config.rl import PolicyOptions, PpoConfig, PpoOptions, RolloutOptions
from megallm.config.train import TrainConfig
from megallm.runtime.launch import run_main

__all__ = ["DEFAULTS", "main"]

DEFAULTS = PpoConfig(
    train=TrainConfig(steps=20, micro_batch_size=4, global_batch_size=16, seq_length=192),
    optim=OptimConfig(learning_rate=2e-5, weight_decay=0.0, lr_schedule="constant"),
    rollout=RolloutOptions(rollout_batch_size=32, max_new_tokens=32),
    policy=PolicyOptions(update_epochs=4, kl_coefficient=0.05),
    ppo=PpoOptions(critic_learning_rate=5e-5),
    checkpoint=CheckpointConfig(save="runs/ppo", save_every=5),
)


def main() -> int:
    """Reads the flags, checks everything, trains (megallm/trainers/ppo.py)."""
    return run_example("ppo", DEFAULTS, description=__doc__ or "")


if __name__ == "__main__":
    run_main(main)
