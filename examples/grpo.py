"""Group relative policy optimisation of a language model on answers that can be checked, on any layout of ranks.

    python examples/grpo.py                                                            embedded defaults: sums
    python examples/grpo.py --model runs/sft --data questions.jsonl --reward boxed 0.1*my_rewards.py:format_score
    torchrun --standalone --nproc-per-node 4 examples/grpo.py --model runs/sft --data sums.jsonl --reward boxed --tp 2
"""

from megallm.cli.reinforcement import run_example
from megallm.config.checkpoint import CheckpointConfig
from megallm.config.optim import OptimConfig
from megallm.config.rl import GrpoConfig, PolicyOptions, RolloutOptions
from megallm.config.train import TrainConfig
from megallm.runtime.launch import run_main

__all__ = ["DEFAULTS", "main"]

DEFAULTS = GrpoConfig(
    train=TrainConfig(steps=400, micro_batch_size=16, global_batch_size=128, seq_length=32),
    optim=OptimConfig(learning_rate=3e-4, weight_decay=0.0, lr_schedule="cosine"),
    rollout=RolloutOptions(rollout_batch_size=16, samples_per_prompt=8, max_new_tokens=8),
    policy=PolicyOptions(clip_high=0.28, entropy_coefficient=0.01, kl_in="loss", kl_estimator="k3"),
    checkpoint=CheckpointConfig(save="runs/grpo", save_every=20),
)


def main() -> int:
    """Reads the flags, checks everything, trains (megallm/trainers/grpo.py)."""
    return run_example("grpo", DEFAULTS, description=__doc__ or "")


if __name__ == "__main__":
    run_main(main)
