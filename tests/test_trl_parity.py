"""TRL's trainers are the oracle: rows, losses, gradient norms and metrics of three steps, on one rank and on eight.

What TRL computes is in fixtures/trl.json (make_trl.py writes it), so that nothing of it is needed here: the same
records go through our data layer, engine and losses, from the same weights.

Bounds, relative: RTOL for losses, norms and log-probabilities (measured, over both layouts: below 2e-6; 5e-6 for IPO
of sums, whose loss is their square). Rewards are differences of log-probabilities times beta, so that their rounding is
that of the log-probabilities, times beta: REWARD_RTOL of these (measured: 6e-8), and of 1 for scores (2e-7).
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from training_cases import once
from trl_cases import (
    BETA,
    CENTERING,
    LENGTH,
    MODELS,
    OPTIM,
    POLICY_SEED,
    REFERENCE_SEED,
    RESULTS,
    STEPS,
    VARIANTS,
    Variant,
    config_of,
    examples_of,
    groups_of,
    own_digest,
    variants_of,
)

from megallm.config.parallel import ParallelConfig
from megallm.config.serialize import to_plain
from megallm.data.finetune import PairDataset, SftDataset
from megallm.data.loader import Batch, ValidationLoader
from megallm.parallel.mesh import Mesh
from megallm.testing.pool import run_ranks
from megallm.trainers import dpo
from megallm.trainers.engine import Engine
from megallm.trainers.losses import count_labels, language_model_loss
from megallm.trainers.preference_losses import DpoLoss, RewardLoss, count_prompts

RTOL, REWARD_RTOL = 1e-5, 1e-6
NUM_RECORDS = 12
LAYOUTS = {"one_rank": (1, 1, 1), "tp2_pp2_dp2": (2, 2, 2)}
ROWS_AT_ONCE = 4
"""Batches are filled up to a multiple of it: two microbatches on two dp ranks."""
NAMES = {
    "rewards/chosen": "reward_chosen", "rewards/rejected": "reward_rejected", "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy", "logps/chosen": "logprob_chosen", "logps/rejected": "logprob_rejected",
    "accuracy": "reward_accuracy", "margin": "reward_margin",
}  # fmt: skip
"""TRL's names of metrics, and ours."""
Curve = list[dict[str, float]]


@once
def trl() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return content


def engine_of(model: str, variant: Variant, mesh: Mesh, *, rows: int, train: bool = True) -> Engine:
    """`rows` a forward."""
    return Engine(
        config_of(model, variant), mesh, parallel=ParallelConfig(tp=mesh.tp.size, pp=mesh.pp.size), optim=OPTIM,
        micro_batch_size=rows, seed=POLICY_SEED if train else REFERENCE_SEED, train=train,
    )  # fmt: skip


def batch_of(dataset: SftDataset | PairDataset, mesh: Mesh) -> tuple[Batch, int]:
    """(this rank's part of one batch of all samples, samples of a microbatch when there are two)."""
    number = dataset.num_samples
    size = number + -number % ROWS_AT_ONCE
    dp = mesh.dp
    loader = ValidationLoader(dataset, num_sequences=number, batch_size=size, dp_rank=dp.rank, dp_size=dp.size)
    (batch,) = loader
    return batch, size // dp.size // 2


def curve(model: str, variant: Variant, mesh: Mesh) -> Curve:
    """The metrics of three steps."""
    multiple = 8 * mesh.tp.size
    if variant.kind == "sft":
        packing: dict[str, Any] = {"pack": True} if variant.pack else {"pad_to_multiple": multiple}
        dataset = SftDataset(examples_of(variant), seq_length=LENGTH, shuffle=False, **packing)
        batch, rows = batch_of(dataset, mesh)
        loss_fn: Any = language_model_loss
        count_fn: Any = count_labels
    else:
        pairs = PairDataset(groups_of(variant), seq_length=LENGTH, pad_to_multiple=multiple, shuffle=False)
        batch, samples = batch_of(pairs, mesh)
        rows, count_fn = 2 * samples, count_prompts
        loss_fn = RewardLoss(**variant.loss) if variant.kind == "reward" else DpoLoss(**variant.loss)
    if variant.kind == "dpo" and not variant.loss.get("reference_free"):
        reference = engine_of(model, variant, mesh, rows=rows, train=False)
        batch["ref_logprobs"] = dpo.reference_logprobs(reference, batch)
    engine = engine_of(model, variant, mesh, rows=rows)
    return [engine.train_step(batch, loss_fn, count_fn=count_fn).metrics() for _ in range(STEPS)]


def curves(rank: int, world_size: int, tp: int, pp: int, dp_size: int) -> dict[str, dict[str, Curve]]:
    """{model: {variant: metrics}}."""
    mesh = Mesh.build(tp=tp, pp=pp, dp=dp_size)
    return {
        model: {name: curve(model, VARIANTS[name], mesh) for name in variants_of(model)} for model in MODELS
    }


@once
def ours(layout: str) -> dict[str, dict[str, Curve]]:
    tp, pp, dp_size = LAYOUTS[layout]
    world_size = tp * pp * dp_size
    found: list[dict[str, dict[str, Curve]]] = run_ranks(curves, world_size, tp, pp, dp_size)
    assert all(of_rank == found[0] for of_rank in found)
    return found[0]


def allowed(name: str, step: dict[str, float]) -> float:
    """What a number of TRL's step may be missed by."""
    if name.startswith("rewards/") and name != "rewards/accuracies":
        return REWARD_RTOL * 2 * BETA * max(abs(step["logps/chosen"]), abs(step["logps/rejected"]))
    if name in ("margin", "mean_reward"):  # differences and means of scores, which are of the order of 1
        return REWARD_RTOL * max(1.0, abs(step[name]))
    return RTOL * abs(step[name])


def too_small(model: str, name: str, num_tokens: float) -> float:
    """What transformers divides by, over the number of trained tokens.

    `Trainer` counts labels from the second one of a row on where it knows that a model's loss shifts them. It does not
    know it of GPT2LMHeadModel (5.23, by the class's name), whose rows' first tokens are counted although nothing
    predicts them: with full sequences, loss and gradient come out small by this. Packed rows have them masked.
    """
    return 1.0 if (model, name) != ("gpt2", "sft_full") else (num_tokens + NUM_RECORDS) / num_tokens


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("model", "name"), [(model, name) for model in MODELS for name in variants_of(model)])
def test_three_steps_equal_those_of_trl(model: str, name: str, layout: str) -> None:
    expected = trl()["results"][model][name]
    for number, actual in enumerate(ours(layout)[model][name]):
        step = {key: values[number] for key, values in expected.items() if key != "rows"}
        for key in ("loss", "grad_norm"):  # steps are clipped to one length: what follows is the same
            step[key] *= too_small(model, name, actual["count"])
        for key, value in step.items():
            assert as_trl(actual)[key] == pytest.approx(value, rel=0, abs=allowed(key, step)), f"{key}, step {number}"


def as_trl(metrics: dict[str, float]) -> dict[str, float]:
    """Our metrics by TRL's names."""
    found = metrics | {theirs: metrics[own] for theirs, own in NAMES.items() if own in metrics}
    if "reward_chosen" in metrics:
        found["mean_reward"] = metrics["reward_chosen"] - metrics["reward_margin"] / 2
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_are_those_of_trl_token_by_token(name: str) -> None:
    assert own_digest(VARIANTS[name]) == trl()["results"]["llama"][name]["rows"]


def test_the_oracle_was_run_on_these_models() -> None:
    assert trl()["models"] == json.loads(json.dumps({name: to_plain(config) for name, config in MODELS.items()}))
    assert trl()["optim"] == json.loads(json.dumps(to_plain(OPTIM)))


def test_the_policy_differs_from_the_reference_and_variants_from_each_other() -> None:
    of_llama = trl()["results"]["llama"]
    assert abs(of_llama["dpo_sigmoid"]["rewards/margins"][0]) > 0.05
    losses = [variant["loss"][0] for name, variant in of_llama.items() if not name.startswith("sft_packed")]
    assert len({round(loss, 4) for loss in losses}) == len(losses)
    assert of_llama["reward_centering"]["loss"][0] > of_llama["reward"]["loss"][0] + 0.01 * CENTERING
