"""Supervised fine-tuning, reward models and DPO train like one rank on every layout: losses, norms and metrics.

Data are made of counting sequences without a tokenizer; every batch has rows of very different lengths.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from training_cases import MODELS, Case, make_engine, once

from megallm.data.examples import Group
from megallm.data.finetune import PairDataset, SftDataset
from megallm.data.loader import BatchLoader
from megallm.data.masks import Example
from megallm.testing.pool import run_ranks
from megallm.trainers import dpo
from megallm.trainers.engine import Engine
from megallm.trainers.losses import Batch, count_labels, language_model_loss
from megallm.trainers.preference_losses import DpoLoss, RewardLoss, count_prompts

UNTIED, TIED, QWEN2, QWEN3 = list(MODELS)[:4]
STEPS, SAMPLES, SEQ = 10, 8, 16
LAYOUTS: list[dict[str, Any]] = [
    {"tp": 2, "mbs": 2},
    {"tp": 4, "mbs": 4},
    {"pp": 2, "v": 2, "mbs": 2},
    {"dp": 2, "zero": 3, "mbs": 2},
    {"tp": 2, "dp": 2, "zero": 2, "mbs": 4},
    {"pp": 2, "dp": 2, "zero": 1, "offload": "optimizer", "mbs": 2},
    {"tp": 2, "pp": 2, "dp": 2, "zero": 1, "mbs": 2},
]
KINDS = {
    "sft": UNTIED, "sft-unpacked": TIED, "sft-noise": QWEN2, "reward": QWEN2, "ranking": UNTIED, "dpo": TIED,
    "dpo-live": UNTIED,
}  # fmt: skip
"""What is trained, and the model it is shown on."""
Curve = list[dict[str, float]]


def example(number: int) -> Example:
    generator = np.random.default_rng(number)
    length = int(generator.integers(4, SEQ + 1))
    ids = (generator.integers(0, 90) + np.arange(length) * generator.integers(1, 4)) % 101
    prompt = int(generator.integers(1, length - 1))
    return Example(input_ids=ids.astype(np.int32), is_trained=np.arange(length) >= prompt, prompt_length=prompt)


def pairs(number: int) -> Group:
    return Group(examples=(example(2 * number), example(2 * number + 1)), ranks=(0, 1), margin=0.1 * (number % 3))


def ranked(number: int) -> Group:
    size = 2 + number % 3
    return Group(examples=tuple(example(10 * number + i) for i in range(size)), ranks=tuple(range(size)))


def dataset_of(kind: str) -> SftDataset | PairDataset:
    if kind.startswith("sft"):
        examples = [example(i) for i in range(50)]
        return SftDataset(examples, seq_length=SEQ, seed=3, pack=kind != "sft-unpacked")
    groups = [ranked(i) if kind == "ranking" else pairs(i) for i in range(20)]
    return PairDataset(groups, seq_length=SEQ, seed=3, pad_to_multiple=8)


def engine_of(kind: str, case: Case, dataset: SftDataset | PairDataset) -> Engine:
    rows = dataset.rows_per_sample
    config = MODELS[case.model].replace(hidden_dropout=0.0, attention_dropout=0.0)
    if kind in ("reward", "ranking"):
        config = config.replace(head="scalar", tie_word_embeddings=False)
    noise = 5.0 if kind == "sft-noise" else 0.0
    return make_engine(case, config=config, micro_batch_size=case.mbs * rows, neftune_alpha=noise)


def reference_of(kind: str, engine: Engine, dataset: PairDataset) -> Any:
    """What gives a batch its reference log-probabilities: the weights that the policy begins with."""
    reference = Engine(
        engine.config, engine.mesh, micro_batch_size=engine.micro_batch_size, precision="fp64", seed=engine.seed,
        train=False,
    )  # fmt: skip
    if kind == "dpo-live":
        return lambda batch: dpo.reference_logprobs(reference, batch)
    table = dpo.precompute(reference, dataset, batch_size=SAMPLES)
    return lambda batch: dpo.look_up(table, dataset, batch)


def curve(kind: str, case: Case) -> Curve:
    dataset = dataset_of(kind)
    engine = engine_of(kind, case, dataset)
    dp = engine.mesh.dp
    loader = BatchLoader(dataset, global_batch_size=SAMPLES, dp_rank=dp.rank, dp_size=dp.size)
    loss_fn: Any = language_model_loss
    count_fn: Any = count_labels
    reference: Any = None
    if isinstance(dataset, PairDataset):
        loss_fn, count_fn = (RewardLoss(centering=0.01), count_prompts)
        if kind.startswith("dpo"):
            loss_fn, reference = DpoLoss(beta=0.5), reference_of(kind, engine, dataset)
    found = []
    for step in range(STEPS):
        batch: Batch = loader.batch(step * SAMPLES)
        if reference is not None:
            batch["ref_logprobs"] = reference(batch)
        found.append(engine.train_step(batch, loss_fn, count_fn=count_fn).metrics())
    return found


def curves(rank: int, world_size: int) -> dict[str, Curve]:
    layouts = [layout for layout in LAYOUTS if Case(model=UNTIED, **layout).world_size == world_size]
    cases = [(kind, Case(model=model, **layout)) for kind, model in KINDS.items() for layout in layouts]
    return {f"{kind}-{case.name}": curve(kind, case) for kind, case in cases}


@once
def of_ranks(world_size: int) -> list[dict[str, Curve]]:
    return run_ranks(curves, world_size)


@once
def of_one_rank(kind: str) -> Curve:
    return curve(kind, Case(model=KINDS[kind], mbs=SAMPLES))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: Case(model=UNTIED, **layout).name[len(UNTIED) + 1 :])
@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_equal_those_of_one_rank(kind: str, layout: dict[str, Any]) -> None:
    case = Case(model=KINDS[kind], **layout)
    expected = of_one_rank(kind)
    for of_rank in of_ranks(case.world_size):
        for actual, wanted in zip(of_rank[f"{kind}-{case.name}"], expected, strict=True):
            assert actual.keys() == wanted.keys()
            for name, value in wanted.items():
                if kind.startswith("dpo") and name == "reward_accuracy":
                    continue  # counts signs of margins, which are 0 but for rounding at first
                assert actual[name] == pytest.approx(value, rel=1e-9, abs=1e-10), name


@pytest.mark.parametrize("kind", ["dpo", "dpo-live"])
def test_the_first_loss_of_dpo_is_ln_2_and_training_lowers_it(kind: str) -> None:
    first, *_, last = of_one_rank(kind)
    assert first["loss"] == pytest.approx(math.log(2.0), abs=1e-12)
    assert first["reward_margin"] == pytest.approx(0.0, abs=1e-12)
    assert last["loss"] < first["loss"] and last["reward_margin"] > 0.0


def test_noise_on_embeddings_changes_the_loss_a_little() -> None:
    plain = curve("sft", Case(model=QWEN2, mbs=SAMPLES))[0]["loss"]
    noisy = of_one_rank("sft-noise")[0]["loss"]
    assert 0.0 < abs(noisy / plain - 1) < 0.2


def test_packing_trains_on_every_example_once_an_epoch() -> None:
    dataset = dataset_of("sft")
    assert isinstance(dataset, SftDataset)
    number = dataset.num_samples
    rows = dataset.collate(range(number), num_samples=number, whole=range(number))
    assert (rows["labels"] != -100).sum() == sum(example(i).num_trained for i in range(50))
    batch = {name: torch.from_numpy(array) for name, array in rows.items()}
    engine = make_engine(Case(model=UNTIED, mbs=1))
    packed = summed_loss(engine, batch)
    alone = SftDataset([example(i) for i in range(50)], seq_length=SEQ, shuffle=False)
    rows = alone.collate(range(50), num_samples=50, whole=range(50))
    batch = {name: torch.from_numpy(array) for name, array in rows.items()}
    assert packed == pytest.approx(summed_loss(engine, batch), rel=1e-12)


def summed_loss(engine: Engine, batch: Batch) -> float:
    return sum(float(loss) for loss, _, _ in engine.forward(batch, language_model_loss))
