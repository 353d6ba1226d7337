"""Fine-tunes a language model on conversations, instructions or texts, on any layout of ranks.

    python examples/sft.py                                                             embedded defaults
    python examples/sft.py --model HF_DIR --data chats.jsonl --epochs 2 --save runs/sft
    torchrun --standalone --nproc-per-node 4 examples/sft.py --model HF_DIR --data chats.jsonl --tp 2 --pp 2
"""

import sys

from megallm.config.checkpoint import CheckpointConfig
from megallm.config.finetune import SftConfig
from megallm.config.flags import parse_run_config
from megallm.config.optim import OptimConfig
from megallm.config.train import TrainConfig
from megallm.runtime.environment import launch_info, user_cache_dir
from megallm.runtime.launch import device_for, run_main, usage_errors

DEFAULTS = SftConfig(
    train=TrainConfig(steps=60, micro_batch_size=2, global_batch_size=8, seq_length=256, eval_every=20),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=5, weight_decay=0.0),
    checkpoint=CheckpointConfig(save="runs/sft"),
)


def main() -> int:
    """Reads the flags, checks everything, trains."""
    with usage_errors():
        run, args = parse_run_config(defaults=DEFAULTS, description=__doc__ or "", extra=add_arguments)
        info = launch_info()
        device = device_for(info.local_rank)
        from megallm.trainers import finetune, sft  # after the flags: a mistyped one is answered at once
    run = finetune.with_base_model(run, info, device, cache_dir=user_cache_dir())
    with usage_errors():
        plan = sft.plan(run, world_size=info.world_size, local_world_size=info.local_world_size, device=device)
    if args.show_masks:
        if info.rank == 0:
            print(finetune.show(plan, args.show_masks, colour=sys.stdout.isatty()))
        return 0
    sft.train(plan, info, device, sample_prompt=args.sample_prompt)
    return 0


def add_arguments(parser) -> None:  # type: ignore[no-untyped-def]
    """The flags of this example alone."""
    parser.add_argument(
        "--show-masks", type=int, default=0, metavar="N", help="print N examples with what is trained in them, and stop"
    )
    parser.add_argument("--sample-prompt", default="", help="continued by the trained model at the end")


if __name__ == "__main__":
    run_main(main)
