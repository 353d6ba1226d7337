"""Pretrains a GPT on text, on any layout of ranks.

    python examples/pretrain_gpt.py                                                   one rank, embedded defaults
    torchrun --standalone --nproc-per-node 8 examples/pretrain_gpt.py --tp 4 --pp 2   eight ranks of this machine
    torchrun --nnodes 8 --nproc-per-node 8 ... examples/pretrain_gpt.py --model llama3-8b --tp 4 --pp 2 --data ...
"""

from megallm.config.checkpoint import CheckpointConfig
from megallm.config.data import DataConfig
from megallm.config.flags import parse_run_config
from megallm.config.optim import OptimConfig
from megallm.config.run import RunConfig
from megallm.config.train import TrainConfig
from megallm.runtime.environment import launch_info, user_cache_dir
from megallm.runtime.launch import device_for, run_main, usage_errors

DEFAULTS = RunConfig(
    train=TrainConfig(steps=140, micro_batch_size=8, global_batch_size=16, seq_length=128, eval_every=35),
    optim=OptimConfig(learning_rate=2e-3, warmup_steps=5),
    data=DataConfig(tokenizer_vocab_size=2048),
    checkpoint=CheckpointConfig(save="runs/pretrain_gpt"),
)


def main() -> int:
    """Reads the flags, checks everything, trains."""
    with usage_errors():
        run, args = parse_run_config(defaults=DEFAULTS, description=__doc__ or "", extra=add_arguments)
        info = launch_info()
        device = device_for(info.local_rank)
        from megallm.trainers import pretrain  # after the flags: a mistyped one is answered at once

        plan = pretrain.plan(
            run, world_size=info.world_size, local_world_size=info.local_world_size, cache_dir=user_cache_dir(),
            device=device,
        )  # fmt: skip
    pretrain.pretrain(plan, info, device, sample_prompt=args.sample_prompt)
    return 0


def add_arguments(parser) -> None:  # type: ignore[no-untyped-def]
    """The flags of this example alone."""
    parser.add_argument("--sample-prompt", default="def ", help="continued by the trained model at the end")


if __name__ == "__main__":
    run_main(main)
