"""Runs of reinforcement learning: PPO and GRPO.

A step is an iteration: rollout_batch_size prompts are answered, the answers scored, and the policy trained on them,
update_epochs times in minibatches of global_batch_size answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megallm.config.lora import LoraConfig
from megallm.config.run import JobConfig

KlEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """What is answered."""

    data: tuple[str, ...] = ()
    """Files of records with a prompt, .jsonl or .json; their other columns go to the reward functions. Empty = the
    embedded task."""
    valid_data: tuple[str, ...] = ()
    """Files of prompts that are held out: eval_sequences of them are answered greedily every eval_every iterations, and
    at the end. Empty = those of the embedded task, where that is answered."""
    template: str | None = None
    """How prompts are written: a named template, or a file or directory with a Jinja chat template; `text` takes them
    as they are. auto = the model's own, else alpaca; text for the embedded task of GRPO."""
    tokenizer: str | None = None
    """A tokenizer.json, or a directory that holds one. auto = the one beside the model."""


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """How answers are made."""

    rollout_batch_size: int = 32
    """Prompts of an iteration, whole job."""
    samples_per_prompt: int = 1
    """Answers to each; a group."""
    max_new_tokens: int = 64
    """Longest answer; prompts have seq_length minus this at most, longer ones are left out."""
    temperature: float = 1.0
    """Of the samples, and of every log-probability; other filters would bias the ratios, so there are none."""
    decode_batch: int = 64
    """Sequences decoded together, on each replica."""
    show_samples: int = 4
    """Answers of an iteration kept in samples.jsonl; the first one is printed now and then."""


@dataclass(frozen=True, kw_only=True)
class RewardsConfig:
    """What answers are worth."""

    reward: tuple[str, ...] = ()
    """Sources, which are added: a directory of a reward model, exact_answer, format, boxed, length, python_tests, or
    FILE.py:FUNCTION; `2*NAME` counts twice."""
    reward_timeout: float = 10.0
    """Seconds that a function may take for an answer."""
    reward_workers: int = 1
    """Processes on each rank that functions run in."""
    on_reward_error: Literal["stop", "skip", "zero"] = "stop"
    """Where a function fails: the run stops, and can be resumed; the answer is left out; or its part counts 0."""
    score_clip: float = 0.0
    """Scores are held in [-score_clip, score_clip]; 0 = as they are."""
    normalize_scores: Literal["none", "batch", "running"] = "none"
    """Scores minus their mean, over their standard deviation: those of the iteration, or of the run so far."""
    missing_end_penalty: float = 0.0
    """Taken off the score of an answer that does not end by itself."""
    missing_end_score: float | None = None
    """The score of such an answer instead; None = its own."""
    overlong: Literal["keep", "mask"] = "keep"
    """Answers that do not end by themselves: `mask` leaves them out of the loss."""
    overlong_buffer: int = 0
    """The last so many of max_new_tokens cost up to 1, in proportion (DAPO, arXiv 2503.14476); 0 = nothing."""


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """The loss of the policy."""

    update_epochs: int = 1
    """Passes over each rollout."""
    clip_low: float = 0.2
    """Ratios below 1 - clip_low say no more."""
    clip_high: float | None = None
    """Ratios above 1 + clip_high say no more; None = clip_low (DAPO: 0.28)."""
    dual_clip: float | None = None
    """Ratios of bad answers beyond this say no more (arXiv 1912.09729; 3 where it is used); None = no limit."""
    importance: Literal["token", "sequence"] = "token"
    """What has a ratio; `sequence`: GSPO (arXiv 2507.18071), whose clips are near 3e-4."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """A mean over tokens (DAPO), of the means of answers (GRPO), or over max_new_tokens a row (Dr.GRPO)."""
    entropy_coefficient: float = 0.0
    """Of the mean entropy of tokens, which is raised."""
    kl_coefficient: float = 0.0
    """Of the KL to the model before training; 0 = that model is not needed."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where it counts."""
    kl_estimator: KlEstimator = "k1"
    """How it is estimated (docs/rl.md)."""
    kl_target: float | None = None
    """KL of an answer, nats, that kl_coefficient is adapted to; None = it is fixed."""
    kl_horizon: float = 10_000.0
    """Answers over which it is adapted."""
    max_approx_kl: float | None = None
    """An iteration's updates end when the policy is so far from the one that answered (nats a token); None = never."""
    ptx_coefficient: float = 0.0
    """Of the cross-entropy of ptx_data, which is added (PPO-ptx; InstructGPT: 27.8)."""
    ptx_data: tuple[str, ...] = ()
    """Records trained on beside, in the formats of fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """Where the other models are."""

    critic_tp: int | None = None
    """Tensor-parallel ranks of the critic. auto = tp."""
    critic_pp: int | None = None
    """Pipeline ranks of the critic. auto = pp."""
    frozen_tp: int | None = None
    """Tensor-parallel ranks of reference and reward models. auto = tp."""
    frozen_pp: int | None = None
    """Pipeline ranks of reference and reward models. auto = pp."""
    offload_frozen: bool = False
    """They are in the host's memory while they have nothing to do."""


@dataclass(frozen=True, kw_only=True)
class PpoOptions:
    """Critic and advantages."""

    gamma: float = 1.0
    """Discount of a token."""
    lam: float = 0.95
    """Of generalised advantage estimation (arXiv 1506.02438)."""
    whiten_advantages: bool = True
    """To mean 0 and variance 1, over all answers of the iteration."""
    whiten_rewards: bool = False
    """To variance 1."""
    value_clip: float = 0.2
    """How far a value may move from the old one; 0 = as far as it likes."""
    critic: str | None = None
    """Reward model that the critic starts from. auto = the first among the rewards, else the policy's own weights with
    a new head."""
    critic_learning_rate: float | None = None
    """Peak. auto = learning_rate."""
    critic_warmup: int = 0
    """Iterations in which the critic alone trains."""


@dataclass(frozen=True, kw_only=True)
class GrpoOptions:
    """Advantages from groups."""

    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline"] = "grpo"
    """Of an answer over its group, or over all answers (docs/rl.md)."""
    dynamic_sampling: int = 0
    """Times that groups whose answers are all worth the same are replaced by those of other prompts (DAPO)."""


@dataclass(frozen=True, kw_only=True)
class RlConfig(JobConfig):
    """What PPO and GRPO have in common."""

    data: PromptsConfig = field(default_factory=PromptsConfig)
    """Prompts."""
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    """Answers."""
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    """Scores."""
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    """The loss."""
    meshes: MeshOptions = field(default_factory=MeshOptions)
    """The other models."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters."""

    @property
    def num_answers(self) -> int:
        """Of an iteration."""
        return self.rollout.rollout_batch_size * self.rollout.samples_per_prompt


@dataclass(frozen=True, kw_only=True)
class PpoConfig(RlConfig):
    """Proximal policy optimisation."""

    ppo: PpoOptions = field(default_factory=PpoOptions)
    """Critic and advantages."""


@dataclass(frozen=True, kw_only=True)
class GrpoConfig(RlConfig):
    """Group relative policy optimisation and its relatives."""

    grpo: GrpoOptions = field(default_factory=GrpoOptions)
    """Advantages."""
