"""Losses of rollouts: values and gradients against the formulas, token by token, on any tp and layout of rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from training_cases import SEQ, VOCAB, Case, make_engine

from megallm.parallel.layout import shard_range
from megallm.parallel.linear import ColumnLinear
from megallm.parallel.logprobs import VocabLogits
from megallm.parallel.mesh import Axis, Mesh
from megallm.testing.pool import run_ranks
from megallm.trainers.policy_losses import PolicyLoss, ValueLoss
from megallm.trainers.rows import lay_end_to_end

B, S, V, H = 6, 9, 11, 5
LENGTHS = [9, 4, 6, 8, 0, 7]
CLOSE = {"rtol": 1e-11, "atol": 1e-12}
Batch = dict[str, torch.Tensor]

VARIANTS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "wide clips": {"clip_low": 0.9, "clip_high": 40.0},
    "clip higher": {"clip_high": 0.28, "temperature": 0.7},
    "dual clip": {"dual_clip": 1.5},
    "grpo": {"aggregation": "sequence", "kl_coefficient": 0.1, "temperature": 1.3},
    "dr_grpo": {"aggregation": "constant", "max_length": 12, "kl_coefficient": 0.2, "kl_estimator": "k2"},
    "gspo": {"aggregation": "sequence", "ratio": "sequence", "clip_low": 0.1},
    "entropy": {"entropy_coefficient": 0.3, "kl_coefficient": 0.1, "kl_estimator": "k1", "temperature": 0.8},
}


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rollout(ptx: bool = False) -> Batch:
    """Responses behind prompts of other lengths, one with a gap; a row without a response and one without anything.

    What is not a policy's token holds numbers that would be seen.
    """
    labels = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1))
    labels[torch.arange(S) >= torch.tensor(LENGTHS).unsqueeze(1)] = -100
    for row, start in enumerate([3, 2, 6, 1, 0, 4]):  # the third has none
        labels[row, :start] = -100
    labels[0, 5:7] = -100
    batch = {"input_ids": torch.randint(0, V, (B, S)), "labels": labels, "lengths": torch.tensor(LENGTHS)}
    dense = torch.log_softmax(logits_of(*head()).detach(), -1)
    near = dense.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    batch["old_logprobs"], batch["ref_logprobs"] = near + 0.3 * rand(B, S, seed=2), near + rand(B, S, seed=3)
    batch["advantages"], batch["returns"] = rand(B, S, seed=4), rand(B, S, seed=5)
    batch["old_values"] = rand(B, S, seed=6)
    for name in ("old_logprobs", "ref_logprobs", "advantages"):
        batch[name][labels == -100] = 77.0
    if ptx:
        batch["ptx_weights"] = torch.zeros(B, S, dtype=torch.float64)
        batch["ptx_weights"][3] = 2.5
    return batch


def head() -> tuple[torch.Tensor, torch.Tensor]:
    return rand(B, S, H, seed=7).requires_grad_(), rand(V, H, seed=8).requires_grad_()


def logits_of(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return hidden @ weight.t()


def own_tokens(batch: Batch) -> list[list[int]]:
    """The places of the policy's tokens of each row."""
    places = [[t for t in range(S) if batch["labels"][row, t] >= 0] for row in range(B)]
    text = batch.get("ptx_weights", torch.zeros(B, S))
    return [[] if text[row].any() else places[row] for row in range(B)]


def by_hand(logits: torch.Tensor, batch: Batch, loss: PolicyLoss) -> tuple[torch.Tensor, int, dict[str, float]]:
    """(sum, what it is divided by, some of the metrics), token by token."""
    z = torch.log_softmax(logits / loss.temperature, -1)
    high = loss.clip_low if loss.clip_high is None else loss.clip_high
    total, rows, tokens = logits.new_zeros(()), 0, 0
    metrics = dict.fromkeys(("policy_loss", "clip_fraction", "approx_kl", "ratio"), 0.0)
    for row, places in enumerate(own_tokens(batch)):
        if not places:
            continue
        rows, tokens = rows + 1, tokens + len(places)
        of_row = logits.new_zeros(())
        p = [z[row, t, batch["labels"][row, t]] for t in places]
        d = [x - batch["old_logprobs"][row, t] for x, t in zip(p, places, strict=True)]
        mean = float(torch.stack(d).detach().mean())
        for x, log_ratio, t in zip(p, d, places, strict=True):
            ratio = log_ratio.exp() if loss.ratio == "token" else math.exp(mean) * (x - x.detach()).exp()
            a = batch["advantages"][row, t]
            inside = min(max(float(ratio), 1 - loss.clip_low), 1 + high)
            is_clipped = -float(a) * inside > -float(a) * float(ratio)
            term = -a * (inside if is_clipped else ratio)
            if loss.dual_clip is not None and a < 0 and float(term) > -loss.dual_clip * float(a):
                term = -a * loss.dual_clip
            metrics["policy_loss"] += float(term)
            metrics["clip_fraction"] += is_clipped
            metrics["approx_kl"] += math.exp(float(log_ratio)) - 1 - float(log_ratio)
            metrics["ratio"] += float(ratio)
            to_ref = x - batch["ref_logprobs"][row, t]
            kl = {"k1": to_ref, "k2": to_ref**2 / 2, "k3": (-to_ref).exp() - 1 + to_ref}[loss.kl_estimator]
            entropy = -(z[row, t].exp() * z[row, t]).sum()
            of_row = of_row + term + loss.kl_coefficient * kl - loss.entropy_coefficient * entropy
        total = total + (of_row / len(places) if loss.aggregation == "sequence" else of_row)
    if "ptx_weights" in batch:
        z = torch.log_softmax(logits, -1)
        for row in range(B):
            for t in range(S):
                if batch["ptx_weights"][row, t] > 0 and batch["labels"][row, t] >= 0:
                    total = total - batch["ptx_weights"][row, t] * z[row, t, batch["labels"][row, t]]
    counts = {"token": tokens, "sequence": rows, "constant": rows * (loss.max_length or 0)}
    return total, counts[loss.aggregation], metrics


def ours(tp: Axis, batch: Batch, loss: PolicyLoss, layout: str, microbatches: int) -> Any:
    """(sum, count, metrics, gradient of the hidden states, that of the rows of the weight that this rank has)."""
    hidden, weight = (x.detach() for x in head())
    size, start, length = shard_range(V, tp)
    local = torch.zeros(size, H, dtype=torch.float64)
    local[:length] = weight[start : start + length]
    hidden.requires_grad_()
    column = ColumnLinear(nn.Parameter(local), None, tp=tp, sequence_parallel=False)
    total, count, metrics = torch.zeros((), dtype=torch.float64), 0, dict[str, float]()
    for rows in torch.arange(B).chunk(microbatches):
        part, x = {name: tensor[rows] for name, tensor in batch.items()}, hidden[rows].flatten(0, 1)
        if layout == "end to end":
            real = (torch.arange(S) < part["lengths"].unsqueeze(1)).flatten()
            part = lay_end_to_end(part, 8 * tp.size)[0]
            x = torch.cat([x[real], x.new_ones(part["labels"].numel() - int(real.sum()), H)])
        logits = VocabLogits(None, vocab_size=V, tp=tp, hidden=x, head=column, chunk_bytes=3 * 8 * size)
        loss_sum, loss_count, found = loss(logits, part)
        loss_sum.backward()
        total, count = total + loss_sum.detach(), count + int(loss_count)
        metrics = {name: metrics.get(name, 0.0) + float(value) for name, value in found.items()}
    assert hidden.grad is not None and column.weight.grad is not None
    return total, count, metrics, hidden.grad, column.weight.grad[:length]


def check(rank: int, world_size: int) -> None:
    tp = Mesh.build(tp=world_size).tp
    _, start, length = shard_range(V, tp)
    for name, options in VARIANTS.items():
        for ptx in (False, True):
            batch, loss = rollout(ptx), PolicyLoss(**options)
            hidden, weight = head()
            total, count, expected = by_hand(logits_of(hidden, weight), batch, loss)
            total.backward()
            assert hidden.grad is not None and weight.grad is not None
            assert int(loss.count(batch)) == count
            rows = own_tokens(batch)
            expected |= {"num_tokens": sum(map(len, rows)), "num_sequences": sum(map(bool, rows))}
            for layout, microbatches in (("padded", 1), ("padded", 6), ("end to end", 1), ("end to end", 3)):
                where = f"{name}, {layout}, {microbatches} microbatches, ptx {ptx}"
                found = ours(tp, batch, loss, layout, microbatches)
                torch.testing.assert_close(found[0], total.detach(), **CLOSE, msg=where)
                torch.testing.assert_close(found[3], hidden.grad, **CLOSE, msg=where)
                torch.testing.assert_close(found[4], weight.grad[start : start + length], **CLOSE, msg=where)
                assert found[1] == count, where
                for key, value in expected.items():
                    assert found[2][key] == pytest.approx(value, rel=1e-9, abs=1e-9), f"{where}: {key}"
                sides = found[2]["clip_fraction_low"] + found[2]["clip_fraction_high"]
                assert 0 < found[2]["clip_fraction"] == sides or name == "wide clips", where
                assert ("ptx_loss" in found[2]) == ptx


@pytest.mark.parametrize("tp", [1, 2])
def test_policy_losses_and_their_gradients_are_those_of_the_formulas(tp: int) -> None:
    run_ranks(check, tp)


def logits_with(d: list[list[float]]) -> tuple[torch.Tensor, Batch]:
    """Logits of two tokens, and a batch with so much larger log-probabilities of the first than they were."""
    old = torch.full((len(d), len(d[0])), -2.0, dtype=torch.float64)
    p = (old + torch.tensor(d, dtype=torch.float64)).clamp(max=-1e-9).exp()
    logits = torch.stack([p, 1 - p], -1).log().flatten(0, 1).requires_grad_()
    labels = torch.zeros(old.shape, dtype=torch.int64)
    return logits, {"input_ids": labels, "labels": labels, "old_logprobs": old, "advantages": torch.ones_like(old)}


def test_ratios_beyond_all_measure_stay_finite() -> None:
    logits, batch = logits_with([[0.0, 1.0]])
    batch["old_logprobs"][0, 0], batch["advantages"][0, 0] = -1e4, -1.0
    loss_sum, _, metrics = PolicyLoss()(VocabLogits(logits, vocab_size=2, tp=Mesh.build().tp), batch)
    loss_sum.backward()
    assert float(loss_sum.detach()) == pytest.approx(math.exp(20.0) - 1.2)
    assert logits.grad is not None and not logits.grad[0].any(), "20 is where gradients end"
    assert metrics["approx_kl"].isfinite()


def test_without_old_log_probabilities_the_policy_is_the_one_that_wrote() -> None:
    """Ratio 1, KL 0, and the gradient of REINFORCE: -A d log p."""
    logits, batch = logits_with([[0.5, -0.5, 0.1]])
    del batch["old_logprobs"]
    for options in ({}, {"ratio": "sequence"}):
        logits.grad = None
        loss_sum, count, metrics = PolicyLoss(**options)(  # type: ignore[arg-type]
            VocabLogits(logits, vocab_size=2, tp=Mesh.build().tp), batch
        )
        loss_sum.backward()
        assert float(loss_sum.detach()) == -3.0 and int(count) == 3 == float(metrics["ratio"])
        assert not metrics["approx_kl"] and not metrics["clip_fraction"]
        p = torch.softmax(logits.detach(), -1)
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad, p - torch.tensor([1.0, 0.0], dtype=torch.float64), **CLOSE)


def test_a_constant_needs_a_length() -> None:
    with pytest.raises(ValueError, match="max_length"):
        PolicyLoss(aggregation="constant")


@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("layout", ["padded", "end to end"])
def test_value_losses_are_those_of_the_formula(clip: float | None, layout: str) -> None:
    batch, values, loss = rollout(ptx=True), rand(B, S, seed=9).requires_grad_(), ValueLoss(clip=clip)
    expected, clipped, tokens = torch.zeros((), dtype=torch.float64), 0, 0
    for row, places in enumerate(own_tokens(batch)):
        for t in places:
            v, r, old = values[row, t], batch["returns"][row, t], batch["old_values"][row, t]
            near = v if clip is None else torch.minimum(torch.maximum(v, old - clip), old + clip)
            is_clipped = bool((near - r) ** 2 > (v - r) ** 2)
            expected = expected + 0.5 * ((near if is_clipped else v) - r) ** 2
            clipped, tokens = clipped + is_clipped, tokens + 1
    expected.backward()
    assert values.grad is not None
    grad, values.grad, part, given = values.grad, None, batch, values
    if layout == "end to end":
        part = lay_end_to_end(batch, 8)[0]
        real = torch.arange(S) < batch["lengths"].unsqueeze(1)
        fill = part["labels"].numel() - int(real.sum())
        given = torch.cat([values[real], torch.full((fill,), 5.0, dtype=torch.float64)]).unsqueeze(0)
    loss_sum, count, metrics = loss(given, part)
    loss_sum.backward()
    torch.testing.assert_close(loss_sum.detach(), expected.detach(), **CLOSE)
    torch.testing.assert_close(values.grad, grad, **CLOSE)
    assert int(count) == int(loss.count(batch)) == tokens == int(metrics["num_tokens"])
    assert int(metrics["value_clip_fraction"]) == clipped and (clipped > 0) == (clip is not None)
    assert float(metrics["value_loss"]) == pytest.approx(float(expected.detach()))


def step_metrics(rank: int, world_size: int, tp: int, pp: int, mbs: int, options: dict[str, Any]) -> dict[str, float]:
    """Of a step of an engine on 8 rows of unlike lengths."""
    engine = make_engine(Case(model="llama_untied", tp=tp, pp=pp, dp=world_size // tp // pp, mbs=mbs))
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, SEQ + 1, (8,), generator=generator)
    batch = {
        "input_ids": torch.randint(0, VOCAB, (8, SEQ), generator=generator),
        "labels": torch.randint(0, VOCAB, (8, SEQ), generator=generator),
        "lengths": lengths,
        "old_logprobs": torch.full((8, SEQ), -math.log(VOCAB)),
        "ref_logprobs": torch.full((8, SEQ), -math.log(VOCAB) + 0.1),
        "advantages": rand(8, SEQ, seed=4),
    }
    places = torch.arange(SEQ)
    batch["labels"][(places < 2) | (places >= lengths.unsqueeze(1))] = -100
    own = {name: tensor.chunk(engine.mesh.dp.size)[engine.mesh.dp.rank] for name, tensor in batch.items()}
    loss = PolicyLoss(**options)
    return engine.train_step(own, loss, count_fn=loss.count).metrics()


@pytest.mark.parametrize("name", ["ppo", "grpo", "dr_grpo", "gspo", "entropy"])
def test_a_step_is_the_same_on_every_layout(name: str) -> None:
    expected = run_ranks(step_metrics, 1, 1, 1, 8, VARIANTS[name])[0]
    assert expected["grad_norm"] > 0 and expected["num_tokens"] > 0
    for world_size, tp, pp, mbs in ((1, 1, 1, 2), (4, 2, 2, 1), (4, 2, 1, 2)):
        for found in run_ranks(step_metrics, world_size, tp, pp, mbs, VARIANTS[name]):
            assert found == pytest.approx(expected, rel=1e-9), (tp, pp, mbs)
