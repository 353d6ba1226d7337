"""Runs of the trainers that start from a model that exists: supervised fine-tuning, reward models, DPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megallm.config.lora import LoraConfig
from megallm.config.run import JobConfig


@dataclass(frozen=True, kw_only=True)
class ExamplesConfig:
    """Records, and how they become examples of at most `seq_length` tokens."""

    data: tuple[str, ...] = ()
    """Files of records, .jsonl or .json. Empty = the embedded ones, made of the running Python's standard library."""
    valid_data: tuple[str, ...] = ()
    """The same for validation. auto = the last `valid_fraction` of `data`, as shuffled by `seed`."""
    valid_fraction: float = 0.05
    """Share of the records kept for validation."""
    data_format: str | None = None
    """alpaca, sharegpt, messages, prompt_completion, preference, ranking or text. auto = by the keys of each record."""
    template: str | None = None
    """How conversations are written: a named template, or a file or directory with a Jinja chat template; `text` takes
    prompt and completion as they are. auto = the model's own, else alpaca."""
    tokenizer: str | None = None
    """A tokenizer.json, or a directory that holds one. auto = the one beside the model."""
    overflow: Literal["truncate", "drop", "refuse"] = "truncate"
    """What becomes of longer examples; cut ones keep the labels of what is left, and no end mark."""
    epochs: float | None = None
    """Passes over the data; decides `steps`. auto = as many steps as `steps` says."""


@dataclass(frozen=True, kw_only=True)
class SftOptions:
    """What supervised fine-tuning trains on."""

    construction: Literal["all-turns", "last-turn", "split"] = "all-turns"
    """Of a conversation with several answers: all in one pass, the last alone, or an example an answer."""
    train_on: Literal["answers", "full"] = "answers"
    """`full`: prompts are targets as well."""
    pack: bool = True
    """As many examples to a row as fit, isolated from each other."""
    neftune_alpha: float = 0.0
    """Uniform noise on the embeddings of a training step, of magnitude alpha / sqrt(tokens * hidden_size) (arXiv
    2310.05914); 5 to 15 where it is used."""


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """The Bradley-Terry loss."""

    centering: float = 0.0
    """Coefficient of (s_better + s_worse)^2, which keeps scores near 0 (0.01 where it is used)."""
    calibrate: bool = True
    """After training, the mean score of good responses is measured and kept beside the checkpoint; `megallm score`
    subtracts it."""


@dataclass(frozen=True, kw_only=True)
class DpoOptions:
    """The loss on pairs."""

    dpo_loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """`sigmoid`: DPO, conservative with label_smoothing. `ipo`: squared. `hinge`: SLiC's."""
    beta: float = 0.1
    """How strongly the policy is held to the reference (ipo: tau)."""
    label_smoothing: float = 0.0
    """sigmoid: the share of preferences that are taken to be wrong (cDPO), below 0.5."""
    reference: Literal["precomputed", "live", "none"] = "precomputed"
    """The model before training: its log-probabilities are computed once before the first step, or with every batch
    (its weights then stay in memory, unless adapters are trained), or taken as 0."""
    ipo_sums: bool = False
    """ipo: of the sums of log-probabilities of a response, not of their means over its tokens."""


@dataclass(frozen=True, kw_only=True)
class SftConfig(JobConfig):
    """Supervised fine-tuning."""

    data: ExamplesConfig = field(default_factory=ExamplesConfig)
    """What is trained on."""
    sft: SftOptions = field(default_factory=SftOptions)
    """Targets."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(JobConfig):
    """Training of a reward model."""

    data: ExamplesConfig = field(default_factory=ExamplesConfig)
    """What is trained on."""
    reward: RewardOptions = field(default_factory=RewardOptions)
    """The loss."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters."""


@dataclass(frozen=True, kw_only=True)
class DpoConfig(JobConfig):
    """Direct preference optimisation."""

    data: ExamplesConfig = field(default_factory=ExamplesConfig)
    """What is trained on."""
    dpo: DpoOptions = field(default_factory=DpoOptions)
    """The loss."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters."""
