"""What TRL's trainers and ours are both run on: tiny models, a tokenizer, a dozen records of each kind, variants.

    fixtures/trl_records.json    the records
    fixtures/trl.json            what TRL makes of them, written by make_trl.py; test_trl_parity.py holds us to it

Every variant takes STEPS steps of plain SGD, clipped, each on all records in two microbatches. SGD, since AdamW's first
step is nearly the sign of the gradient, which makes much of the rounding of small ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megallm.config.model import ModelConfig
from megallm.config.optim import OptimConfig
from megallm.data.chat_template import ChatTemplate
from megallm.data.convert import conversations, preferences
from megallm.data.examples import Construction, Group, TrainOn, comparison_groups, conversation_examples
from megallm.data.masks import Example
from megallm.data.templates import MARKS
from megallm.data.tokenizer import Tokenizer, train_bpe
from megallm.testing.tiny import tiny_config

FIXTURES = Path(__file__).parent / "fixtures"
RECORDS, RESULTS = FIXTURES / "trl_records.json", FIXTURES / "trl.json"
BOS, PAD = "<|begin_of_text|>", "<|pad|>"
BASE_VOCAB, VOCAB, LENGTH, STEPS = 290, 303, 208, 3
POLICY_SEED, REFERENCE_SEED = 7, 8
OPTIM = OptimConfig(optimizer="sgd", momentum=0.0, weight_decay=0.0, learning_rate=0.02, max_grad_norm=1.0)
BETA, LABEL_SMOOTHING, CENTERING = 0.1, 0.2, 0.05

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "head_dim": 8, "max_position_embeddings": LENGTH, "initializer_range": 0.1,
}  # fmt: skip
MODELS: dict[str, ModelConfig] = {
    "llama": tiny_config("llama", num_key_value_heads=2, **_SHAPE),
    "gpt2": tiny_config("gpt2", num_key_value_heads=4, **_SHAPE),
    "qwen2": tiny_config("qwen2", num_key_value_heads=2, **_SHAPE),
}
"""Untied; tied with learned positions; tied with biases. Weights are a function of the seed."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train."""

    kind: Literal["sft", "reward", "dpo"]
    records: Literal["conversations", "last_turns", "instructions", "preferences"]
    template: str | None = "chatml"
    construction: Construction = "all-turns"
    train_on: TrainOn = "answers"
    pack: bool = False
    margins: bool = False
    loss: dict[str, Any] = field(default_factory=dict)
    """Arguments of RewardLoss or DpoLoss."""
    oracle: Literal["trl", "torch"] = "trl"
    """Who computes it: TRL's trainer, or the formula in plain torch on transformers' model where TRL has none."""


def _dpo(oracle: Literal["trl", "torch"] = "trl", **loss: Any) -> Variant:
    # llama3: nothing stands behind the mark that ends an answer. TRL trains what does (chatml's line end), and reads a
    # reward there; ours ends a compared answer at its end mark.
    return Variant(
        kind="dpo", records="preferences", template="llama3", loss={"beta": BETA} | loss, oracle=oracle
    )


def _reward(*, margins: bool = False, **loss: Any) -> Variant:
    return Variant(kind="reward", records="preferences", template="llama3", margins=margins, loss=loss)


VARIANTS: dict[str, Variant] = {
    "sft_full": Variant(kind="sft", records="conversations", train_on="full"),
    "sft_assistant": Variant(kind="sft", records="conversations"),
    "sft_completion_text": Variant(kind="sft", records="instructions", template=None),
    "sft_completion_chat": Variant(
        kind="sft", records="last_turns", template="llama3", construction="last-turn"
    ),
    "sft_packed": Variant(kind="sft", records="conversations", pack=True),
    "sft_packed_full": Variant(kind="sft", records="conversations", train_on="full", pack=True),
    "dpo_sigmoid": _dpo(),
    "dpo_ipo": _dpo(kind="ipo"),
    "dpo_hinge": _dpo(kind="hinge"),
    "dpo_conservative": _dpo("torch", label_smoothing=LABEL_SMOOTHING),
    "dpo_reference_free": _dpo("torch", reference_free=True),
    "dpo_ipo_sums": _dpo("torch", kind="ipo", length_normalised=False),
    "reward": _reward(),
    "reward_centering": _reward(centering=CENTERING),
    "reward_margins": _reward(margins=True),
    "reward_margins_centering": _reward(margins=True, centering=CENTERING),
}


OTHERS = ("sft_full", "sft_assistant", "sft_packed", "dpo_sigmoid", "dpo_ipo", "reward_margins_centering")
"""What is shown on the other models too."""


def variants_of(model: str) -> tuple[str, ...]:
    """The variants that a model is trained with."""
    return tuple(VARIANTS) if model == "llama" else OTHERS


def config_of(model: str, variant: Variant) -> ModelConfig:
    """The model with the head that the variant trains."""
    config = MODELS[model]
    return config.replace(head="scalar", tie_word_embeddings=False) if variant.kind == "reward" else config


def records_of(variant: Variant) -> list[dict[str, Any]]:
    """The variant's records, as both sides get them."""
    every = json.loads(RECORDS.read_text(encoding="utf-8"))
    if variant.records == "last_turns":
        messages = [record["messages"] for record in every["conversations"]]
        return [{"prompt": each[:-1], "completion": each[-1:]} for each in messages]
    found: list[dict[str, Any]] = every[variant.records]
    if variant.kind != "sft" and not variant.margins:
        found = [{key: value for key, value in record.items() if key != "margin"} for record in found]
    return found


@cache
def make_tokenizer() -> Tokenizer:
    """A small byte-level BPE of the records' own text, so that merges run over the ends of prompts, with the templates'
    marks and a padding token that is no end mark (transformers finds the end of a row by it)."""
    records = json.loads(RECORDS.read_text(encoding="utf-8"))
    texts = [json.dumps(record, ensure_ascii=False) for rows in records.values() for record in rows]
    return train_bpe(texts, BASE_VOCAB).with_control_tokens([BOS, PAD, *MARKS["chatml"], *MARKS["llama3"]])


def examples_of(variant: Variant) -> list[Example]:
    """Our data layer's examples of a variant of supervised fine-tuning."""
    tokenizer = make_tokenizer()
    made, dropped = conversations(records_of(variant))
    template = None if variant.template is None else ChatTemplate.named(variant.template, tokenizer)
    found, left_out = conversation_examples(
        made, tokenizer, template, max_length=LENGTH, construction=variant.construction, train_on=variant.train_on
    )
    assert not dropped.counts and not left_out.counts, "every record is of use"
    return found


def groups_of(variant: Variant) -> list[Group]:
    """Our data layer's pairs of a variant on preferences."""
    tokenizer = make_tokenizer()
    rows, dropped = preferences(records_of(variant))
    assert variant.template is not None
    template = ChatTemplate.named(variant.template, tokenizer)
    found, left_out = comparison_groups(rows, tokenizer, template, max_length=LENGTH)
    assert not dropped.counts and not left_out.counts, "every record is of use"
    return found


def digest(rows: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> str:
    """A hash of (ids, which are trained) of rows, in whatever order. A first token is no target, whatever is said."""
    plain = sorted([list(map(int, ids)), list(map(int, trained[1:]))] for ids, trained in rows)
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def own_digest(variant: Variant) -> str:
    """That of what our data layer makes of the variant. A reward model trains no token: all count as trained."""
    if variant.kind == "sft":
        return digest((example.input_ids, example.is_trained) for example in examples_of(variant))
    examples = [example for group in groups_of(variant) for example in group.examples]
    if variant.kind == "reward":
        return digest((example.input_ids, np.ones(len(example), dtype=bool)) for example in examples)
    return digest((example.input_ids, example.is_trained) for example in examples)
