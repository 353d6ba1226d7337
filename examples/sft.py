"""Fine-tunes a language model on conversations, instructions or texts, on any layout of ranks.

    python examples/sft.py                                                             embedded defaults
    python examples/sft.py --model HF_DIR --data chats.jsonl --epochs 2 --save runs/sft
    torchrun --standalone --nproc-per-node 4 examples/sft.py --model HF_DIR --data chats.jsonl --tp 2 --pp 2
"""

from megallm.cli.finetuning import add_arguments, run_example
from megallm.config.checkpoint import CheckpointConfig
from megallm.config.finetune import SftConfig
from megallm.config.optim import OptimConfig
from megallm.config.train import TrainConfig
from megallm.runtime.launch import run_main

__all__ = ["DEFAULTS", "add_arguments", "main"]

DEFAULTS = SftConfig(
    train=TrainConfig(steps=60, micro_batch_size=2, global_batch_size=8, seq_length=256, eval_every=20),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=5, weight_decay=0.0),
    checkpoint=CheckpointConfig(save="runs/sft"),
)


def main() -> int:
    """Reads the flags, checks everything, trains (megallm/trainers/sft.py)."""
    return run_example("sft", DEFAULTS, description=__doc__ or "")


if __name__ == "__main__":
    run_main(main)
