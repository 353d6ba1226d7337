"""Direct preference optimisation of a language model, on any layout of ranks.

    python examples/dpo.py                                                             embedded defaults
    python examples/dpo.py --model HF_DIR --data preferences.jsonl --epochs 2 --save runs/dpo
    torchrun --standalone --nproc-per-node 4 examples/dpo.py --model HF_DIR --data preferences.jsonl --tp 2 --pp 2
"""

from megallm.cli.finetuning import add_arguments, run_example
from megallm.config.checkpoint import CheckpointConfig
from megallm.config.finetune import DpoConfig
from megallm.config.optim import OptimConfig
from megallm.config.train import TrainConfig
from megallm.runtime.launch import run_main

__all__ = ["DEFAULTS", "add_arguments", "main"]

DEFAULTS = DpoConfig(
    train=TrainConfig(steps=60, micro_batch_size=2, global_batch_size=8, seq_length=256, eval_every=20),
    optim=OptimConfig(learning_rate=2e-5, warmup_steps=5, weight_decay=0.0),
    checkpoint=CheckpointConfig(save="runs/dpo"),
)


def main() -> int:
    """Reads the flags, checks everything, trains (megallm/trainers/dpo.py)."""
    return run_example("dpo", DEFAULTS, description=__doc__ or "")


if __name__ == "__main__":
    run_main(main)
