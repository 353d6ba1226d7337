"""Everything from text to a policy, and a report: pretraining, SFT, a reward model, PPO, DPO beside it, evaluation.

    python examples/pipeline.py                               4 ranks of this machine (tp 2 x pp 2), embedded data
    python examples/pipeline.py --tp 1 --pp 1 ppo.steps=20    one rank, a setting of one stage
    python examples/pipeline.py --report-only                 runs/pipeline/report.html of what is there
    torchrun --nnodes 4 --nproc-per-node 8 ... examples/pipeline.py --preset cluster --save /shared/runs/pipeline

Started again it goes on where it was: a stage that is finished is not run again.
"""

from pathlib import Path

from megallm.cli.end_to_end import run_example
from megallm.config.checkpoint import CheckpointConfig
from megallm.config.data import DataConfig
from megallm.config.end_to_end import EndToEndConfig
from megallm.config.finetune import DpoConfig, DpoOptions, ExamplesConfig, RewardConfig, SftConfig
from megallm.config.optim import OptimConfig
from megallm.config.parallel import ParallelConfig
from megallm.config.rl import PolicyOptions, PpoConfig, PpoOptions, PromptsConfig, RewardsConfig, RolloutOptions
from megallm.config.run import RunConfig
from megallm.config.train import TrainConfig
from megallm.runtime.launch import run_main

__all__ = ["DEFAULTS", "PRESETS", "main"]

PRESETS = {"cluster": Path(__file__).with_name("pipeline_cluster.yaml")}
LAYOUT, RECORDS, KEEP = ParallelConfig(tp=2, pp=2), ExamplesConfig(template="plain"), CheckpointConfig(save_every=50)
DEFAULTS = EndToEndConfig(
    base=RunConfig(
        parallel=LAYOUT, checkpoint=KEEP, data=DataConfig(tokenizer_vocab_size=2048),
        train=TrainConfig(steps=500, micro_batch_size=8, global_batch_size=16, seq_length=128, eval_every=125),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=30),
    ),
    sft=SftConfig(
        parallel=LAYOUT, checkpoint=KEEP, data=RECORDS,
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=5, weight_decay=0.0),
        train=TrainConfig(
            steps=100, micro_batch_size=8, global_batch_size=16, seq_length=256, eval_every=25, eval_sequences=200
        ),
    ),
    reward=RewardConfig(
        parallel=LAYOUT, checkpoint=KEEP, data=RECORDS,
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=5, weight_decay=0.0),
        train=TrainConfig(
            steps=140, micro_batch_size=8, global_batch_size=16, seq_length=128, eval_every=35, eval_sequences=200
        ),
    ),
    ppo=PpoConfig(
        parallel=LAYOUT, checkpoint=CheckpointConfig(save_every=8), data=PromptsConfig(template="plain"),
        train=TrainConfig(steps=32, micro_batch_size=8, global_batch_size=16, seq_length=128),
        optim=OptimConfig(learning_rate=1e-4, weight_decay=0.0, lr_schedule="constant"),
        rollout=RolloutOptions(rollout_batch_size=32, max_new_tokens=32),
        rewards=RewardsConfig(normalize_scores="running", missing_end_penalty=1.0),
        policy=PolicyOptions(update_epochs=2, kl_coefficient=0.05),
        ppo=PpoOptions(critic_learning_rate=2e-4, critic_warmup=2),
    ),
    dpo=DpoConfig(
        parallel=LAYOUT, checkpoint=KEEP, data=RECORDS,
        optim=OptimConfig(learning_rate=3e-5, warmup_steps=5, weight_decay=0.0),
        train=TrainConfig(
            steps=45, micro_batch_size=8, global_batch_size=16, seq_length=128, eval_every=15, eval_sequences=200
        ),
        dpo=DpoOptions(reference="live"),
    ),
)  # fmt: skip


def main() -> int:
    """Reads the settings, checks everything, runs the stages (megallm/trainers/end_to_end.py)."""
    return run_example(DEFAULTS, presets=PRESETS, description=__doc__ or "")


if __name__ == "__main__":
    run_main(main)
