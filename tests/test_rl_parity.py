"""Rewards, advantages and losses equal those of TRL 0.11.4 and 1.12.0, verl and OpenRLHF to 1e-6.

fixtures/rl.json holds inputs and what their own code makes of them (make_rl.py). Where one of them means something
else, the test says what, and compares after the stated conversion.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megallm.config.rl import GrpoOptions
from megallm.parallel.logprobs import IGNORE_INDEX, VocabLogits
from megallm.parallel.mesh import Mesh
from megallm.trainers.grpo import Groups
from megallm.trainers.policy_losses import PolicyLoss, ValueLoss
from megallm.trainers.rollout_maths import (
    AdaptiveKl,
    gae,
    group_advantages,
    kl_estimate,
    last_place,
    missing_end,
    returns_to_go,
    token_rewards,
    whiten,
)

FIXTURE: dict[str, Any] = json.loads((Path(__file__).parent / "fixtures" / "rl.json").read_text())
C: dict[str, Any] = FIXTURE["constants"]
X = {
    name: torch.tensor(value, dtype=torch.float64 if isinstance(torch.tensor(value).sum().item(), float) else None)
    for name, value in FIXTURE["inputs"].items()
}
MASKS = {name: torch.tensor(mask).bool() for name, mask in FIXTURE["masks"].items()}
TRL_011, TRL_112, VERL, OPENRLHF = (FIXTURE[name] for name in ("trl011", "trl112", "verl", "openrlhf"))
LOGPROBS = torch.log_softmax(X["logits"], -1).gather(-1, X["labels"].unsqueeze(-1)).squeeze(-1)
B, R, V = X["logits"].shape
SETTLED = pytest.mark.parametrize("name", ["ended", "gaps"])
"""Every row has tokens: without, TRL and verl cannot say where the score goes."""
EVERY = pytest.mark.parametrize("name", list(MASKS))


def near(actual: Any, expected: Any, mask: torch.Tensor | None = None) -> None:
    """Equal to 1e-6, where the mask is."""
    found, wanted = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    if mask is not None:
        found, wanted = found.masked_fill(~mask, 0.0), wanted.masked_fill(~mask, 0.0)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def spread(packed: list[list[float]], mask: torch.Tensor) -> torch.Tensor:
    """Rows without gaps, back at the mask's places."""
    found = torch.zeros(mask.shape, dtype=torch.float64)
    for row, values in enumerate(packed):
        found[row, mask[row]] = torch.tensor(values, dtype=torch.float64)[: int(mask[row].sum())]
    return found


def biased(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What was whitened with the unbiased variance, with the biased one, as OpenRLHF has it."""
    count = int(mask.sum())
    return values * (count / (count - 1)) ** 0.5


# rewards and KL


def test_estimates_of_the_kl() -> None:
    for kind in ("k1", "k2", "k3"):
        found = kl_estimate(LOGPROBS, X["ref_logprobs"], kind)  # type: ignore[arg-type]
        near(found, VERL[kind])
        near(found, OPENRLHF[kind])
        if kind != "k3":
            near(found, TRL_011[f"gaps/{kind}"])


def own_rewards(mask: torch.Tensor) -> torch.Tensor:
    kl = kl_estimate(LOGPROBS, X["ref_logprobs"])
    return token_rewards(X["scores"], kl, mask, kl_coefficient=C["KL_COEFFICIENT"])


@SETTLED
def test_rewards_of_tokens(name: str) -> None:
    near(own_rewards(MASKS[name]), TRL_011[f"{name}/rewards"], MASKS[name])
    near(own_rewards(MASKS[name]), VERL[f"{name}/rewards"], MASKS[name])


def test_unfinished_responses_lose_what_trl_takes_off() -> None:
    found = missing_end(X["scores"], X["has_ended"], penalty=C["PENALTY"])
    near(found, TRL_112["ppo/k1/scores"])


@pytest.mark.parametrize("peer", [TRL_011, VERL, OPENRLHF], ids=["trl 0.11", "verl", "openrlhf"])
def test_adaptive_coefficients(peer: dict[str, Any]) -> None:
    c = C["CONTROLLER"]
    own = AdaptiveKl(c["coefficient"], c["target"], c["horizon"])
    near([own.update(kl, episodes=c["episodes"]) for kl in c["kls"]], peer["controller"])


# advantages


@SETTLED
def test_whitening(name: str) -> None:
    for shift in (False, True):
        found = whiten(X["values"], MASKS[name], shift_mean=shift)
        near(found, TRL_011[f"{name}/whiten/{shift}"], MASKS[name])
        near(found, VERL[f"{name}/whiten/{shift}"], MASKS[name])


@SETTLED
def test_advantages_and_returns(name: str) -> None:
    """verl carries values over gaps as ours does; TRL 0.11 and OpenRLHF put zeros there, so they were given rows
    without the gaps, which is the same. OpenRLHF whitens with the biased variance."""
    mask = MASKS[name]
    advantages, returns = gae(own_rewards(mask), X["values"], mask, gamma=C["GAMMA"], lam=C["LAMBDA"])
    near(whiten(advantages, mask), VERL[f"{name}/advantages"], mask)
    near(returns, VERL[f"{name}/returns"], mask)
    near(whiten(advantages, mask), spread(TRL_011[f"{name}/advantages/False"], mask))
    near(returns, spread(TRL_011[f"{name}/returns/False"], mask))
    near(biased(whiten(advantages, mask), mask), spread(OPENRLHF[f"{name}/advantages/gae"], mask))
    near(returns, spread(OPENRLHF[f"{name}/returns/gae"], mask))


def test_whitened_rewards_leak_out_of_the_padding_of_trl_011() -> None:
    """Its padding becomes mean - mean / deviation and not 0, and is summed into the returns of all rows that end early.
    With that put in, ours is theirs; without, only of the row that fills its places. (TRL 1.12 has it right, below.)"""
    mask, step = MASKS["ended"], {"gamma": C["GAMMA"], "lam": C["LAMBDA"]}
    plain = own_rewards(mask)
    rewards = whiten(plain, mask, shift_mean=False)
    mean, deviation = plain[mask].mean(), plain[mask].std()
    leaking = torch.where(mask, rewards, mean - mean / deviation)
    theirs = torch.tensor(TRL_011["ended/returns/True"], dtype=torch.float64)
    near(gae(leaking, X["values"] * mask, torch.ones_like(mask), **step)[1], theirs, mask)
    returns = gae(rewards, X["values"], mask, **step)[1]
    full = mask.all(dim=1)
    near(returns[full], theirs[full])
    assert full.any() and (returns - theirs)[mask & ~full.unsqueeze(1)].abs().min() > 1e-3


@pytest.mark.parametrize("case", ["k1", "k3", "whitened"])
def test_trl_112_puts_the_score_one_place_later(case: str) -> None:
    """Behind the stop token, where its value mask has one place more if there is room. With that mask ours is theirs,
    and with the right one it is not."""
    mask, score = MASKS["ended"], missing_end(X["scores"], X["has_ended"], penalty=C["PENALTY"])
    longer = torch.zeros_like(mask)
    longer[:, 0], longer[:, 1:] = True, mask[:, :-1]
    kl = kl_estimate(LOGPROBS, X["ref_logprobs"], "k3" if case == "k3" else "k1") * mask  # none behind the end
    rewards = token_rewards(score, kl, longer, kl_coefficient=C["KL_COEFFICIENT"])
    if case == "whitened":
        rewards = whiten(rewards, longer, shift_mean=False)
    near(rewards, TRL_112[f"ppo/{case}/rewards"])
    advantages, returns = gae(rewards, X["values"], longer, gamma=C["GAMMA"], lam=C["LAMBDA"])
    near(returns, TRL_112[f"ppo/{case}/returns"], longer)
    near(whiten(advantages, mask), TRL_112[f"ppo/{case}/advantages"])
    short = token_rewards(score, kl, mask, kl_coefficient=C["KL_COEFFICIENT"])
    at_end = gae(short, X["values"], mask, gamma=C["GAMMA"], lam=C["LAMBDA"])[1]
    assert (at_end - returns)[:, 0].abs().max() > 0.05


def test_advantages_of_groups_of_one_size() -> None:
    """TRL (eps 1e-4) and OpenRLHF (1e-9); theirs of "batch" divides by the deviation of the scores, not of what is left
    of them behind the group's mean, and is no baseline of ours."""
    groups = X["groups"]
    near(group_advantages(X["scores"], groups)[0], TRL_112["advantages/group"])
    near(group_advantages(X["scores"], groups, kind="dr_grpo")[0], TRL_112["advantages/none"])
    near(group_advantages(X["scores"], groups, kind="rloo")[0], TRL_112["rloo"])
    near(group_advantages(X["scores"], groups, kind="rloo")[0], TRL_011["rloo"])
    mask = MASKS["ended"]
    kinds = {"group_norm": "grpo", "dr_grpo": "dr_grpo", "rloo": "rloo"}
    for theirs, kind in kinds.items():
        found = group_advantages(X["scores"], groups, kind=kind, eps=1e-9)[0]  # type: ignore[arg-type]
        near(found.unsqueeze(1).expand(B, R), OPENRLHF[f"ended/advantages/{theirs}"], mask)


@SETTLED
def test_advantages_of_groups_of_unlike_sizes(name: str) -> None:
    """verl (eps 1e-6). A response alone in its group tells nothing; verl gives it its bare score."""
    groups, mask = X["scattered_groups"], MASKS[name]
    alone = torch.tensor([int((groups == group).sum()) == 1 for group in groups])
    assert int(alone.sum()) == 1
    for kind in ("grpo", "dr_grpo", "rloo"):
        found, tells = group_advantages(X["scores"], groups, kind=kind, eps=1e-6)  # type: ignore[arg-type]
        assert tells.tolist() == (~alone).tolist() and not found[alone].any()
        found = torch.where(alone, X["scores"], found)
        near(found.unsqueeze(1).expand(B, R), VERL[f"{name}/{kind}"], mask)


def advantages_of(kind: str, mask: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """What GRPO's trainer makes of the scores."""
    rows = {"labels": torch.where(mask, 1, IGNORE_INDEX)}
    Groups(GrpoOptions(advantage=kind)).add_to(rows, X["scores"], X["groups"], cost)  # type: ignore[arg-type]
    return rows["advantages"]


@SETTLED
def test_reinforce_with_a_baseline_is_whitened_over_tokens(name: str) -> None:
    mask = MASKS[name]
    found = advantages_of("reinforce++_baseline", mask, torch.zeros(B, R).double())
    near(found, VERL[f"{name}/reinforce++/baseline"], mask)
    near(biased(found, mask), OPENRLHF[f"{name}/advantages/reinforce_baseline"], mask)


@SETTLED
def test_reinforce_without_a_critic(name: str) -> None:
    """Of discounted returns, as verl has them; the trainer does not discount."""
    mask, cost = MASKS[name], C["KL_COEFFICIENT"] * kl_estimate(LOGPROBS, X["ref_logprobs"])
    returns = returns_to_go(own_rewards(mask), mask, gamma=C["GAMMA"])
    near(returns, VERL[f"{name}/reinforce++/returns"], mask)
    near(whiten(returns, mask), VERL[f"{name}/reinforce++"], mask)
    near(advantages_of("reinforce++", mask, cost), whiten(returns_to_go(own_rewards(mask), mask), mask))


# losses


def batch_of(mask: torch.Tensor, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
    names = "old_logprobs", "ref_logprobs", "returns", "old_values"
    labels = X["labels"].masked_fill(~mask, -100)
    return {"labels": labels, "advantages": advantages} | {name: X[name] for name in names}


def own_loss(name: str, *, rows: bool = False, **options: Any) -> dict[str, Any]:
    """{"loss": divided, "grad": of the logits, other metrics by token}; rows: one advantage for a row."""
    advantages = X["row_advantages"].unsqueeze(1).expand(B, R) if rows else X["advantages"]
    logits, batch = X["logits"].clone().requires_grad_(), batch_of(MASKS[name], advantages)
    output = VocabLogits(logits.view(-1, V) * 1, vocab_size=V, tp=Mesh.build().tp)
    loss_sum, count, metrics = PolicyLoss(**options)(output, batch)
    loss = loss_sum / count
    loss.backward()
    by_token = {key: float(value) / float(metrics["num_tokens"]) for key, value in metrics.items()}
    return by_token | {"loss": loss.detach(), "grad": logits.grad}


def same_loss(own: dict[str, Any], theirs: dict[str, Any], factor: float = 1.0) -> None:
    """Value, and the gradient of every logit: theirs is of log-probabilities."""
    near(own["loss"], torch.tensor(theirs["loss"]) * factor)
    one_hot = torch.nn.functional.one_hot(X["labels"], V) - torch.softmax(X["logits"], -1)
    near(own["grad"], torch.tensor(theirs["grad"], dtype=torch.float64).unsqueeze(-1) * one_hot * factor)


HIGH = {"clip_low": C["CLIP_LOW"], "clip_high": C["CLIP_HIGH"]}
LENGTH = {"aggregation": "constant", "max_length": C["MAX_LENGTH"]}


@SETTLED
def test_clipped_policies(name: str) -> None:
    """TRL 0.11; its approximate KL is k2 of the old policy, ours k3, verl's k1."""
    own = own_loss(name, clip_low=C["CLIP_LOW"])
    same_loss(own, TRL_011[f"{name}/policy"])
    near(own["clip_fraction"], TRL_011[f"{name}/clipfrac"])
    mask = MASKS[name]
    near(kl_estimate(LOGPROBS, X["old_logprobs"], "k2")[mask].mean(), TRL_011[f"{name}/k2_old"])
    near(own["approx_kl"], kl_estimate(X["old_logprobs"], LOGPROBS, "k3")[mask].mean())


def with_response(name: str) -> float:
    """The share of rows with a response: TRL's means over rows are of all rows, the others' and ours of these."""
    return float(MASKS[name].any(dim=1).double().mean())


@EVERY
def test_means_of_tokens(name: str) -> None:
    own = own_loss(name, **HIGH)
    for theirs in (VERL[f"{name}/token"], OPENRLHF[f"{name}/token"], TRL_112[f"{name}/dapo"], TRL_112[f"{name}/bnpo"]):
        same_loss(own, theirs)
    near(own["clip_fraction"], VERL[f"{name}/token"]["clipfrac"])
    near(own["clip_fraction_low"] + own["clip_fraction_high"], own["clip_fraction"])
    near(kl_estimate(X["old_logprobs"], LOGPROBS)[MASKS[name]].mean(), VERL[f"{name}/token"]["k1"])


@EVERY
def test_means_of_rows(name: str) -> None:
    own = own_loss(name, aggregation="sequence", **HIGH)
    same_loss(own, VERL[f"{name}/sequence"])
    same_loss(own, OPENRLHF[f"{name}/sequence"])
    same_loss(own, TRL_112[f"{name}/grpo"], 1 / with_response(name))


@EVERY
def test_sums_over_a_constant(name: str) -> None:
    own = own_loss(name, **LENGTH, **HIGH)
    same_loss(own, VERL[f"{name}/constant"])
    same_loss(own, TRL_112[f"{name}/dr_grpo"], 1 / with_response(name))


@EVERY
def test_dual_clips(name: str) -> None:
    own = own_loss(name, dual_clip=C["DUAL_CLIP"], **HIGH)
    same_loss(own, VERL[f"{name}/dual"])
    same_loss(own, OPENRLHF[f"{name}/dual"])
    near(own["dual_clip_fraction"], VERL[f"{name}/dual"]["dual_clipfrac"])
    assert own["dual_clip_fraction"] > 0
    of_rows = own_loss(name, dual_clip=C["DUAL_CLIP"], aggregation="sequence", **HIGH)
    same_loss(of_rows, TRL_112[f"{name}/dual"], 1 / with_response(name))


@EVERY
def test_ratios_of_rows(name: str) -> None:
    """GSPO; OpenRLHF and TRL let the gradient through the row's mean, verl and ours by token: with one advantage for a
    row that is the same."""
    own = own_loss(name, rows=True, ratio="sequence", aggregation="sequence", clip_low=C["SEQUENCE_CLIP"])
    same_loss(own, VERL[f"{name}/gspo"])
    same_loss(own, OPENRLHF[f"{name}/gspo"])
    same_loss(own, TRL_112[f"{name}/gspo"], 1 / with_response(name))
    near(own["clip_fraction"], VERL[f"{name}/gspo"]["clipfrac"])
    assert 0 < own["clip_fraction"] < 1


@EVERY
def test_a_kl_in_the_loss(name: str) -> None:
    own = own_loss(name, aggregation="sequence", kl_coefficient=C["BETA"], **HIGH)
    same_loss(own, TRL_112[f"{name}/kl"], 1 / with_response(name))


@EVERY
def test_entropies(name: str) -> None:
    own = own_loss(name, entropy_coefficient=0.1)
    near(own["entropy"], VERL[f"{name}/entropy"])
    near(own["entropy"], torch.tensor(OPENRLHF["entropies"])[MASKS[name]].mean())
    if f"{name}/entropy" in TRL_011:
        near(own["entropy"], TRL_011[f"{name}/entropy"])


def test_log_probabilities_at_a_temperature() -> None:
    logits = VocabLogits(X["logits"].view(-1, V), vocab_size=V, tp=Mesh.build().tp)
    near(logits.tempered(C["TEMPERATURE"]).token_logprobs(X["labels"]), OPENRLHF["tempered"])


@EVERY
def test_values(name: str) -> None:
    batch = batch_of(MASKS[name], X["advantages"])
    loss_sum, count, metrics = ValueLoss(clip=C["VALUE_CLIP"])(X["values"], batch)
    clipped = metrics["value_clip_fraction"] / metrics["num_tokens"]
    near(loss_sum / count, VERL[f"{name}/value_loss"])
    near(loss_sum / count, OPENRLHF[f"{name}/value_loss"])
    near(clipped, VERL[f"{name}/value_clipfrac"])
    if f"{name}/value_loss" in TRL_011:
        near(loss_sum / count, TRL_011[f"{name}/value_loss"])
        near(clipped, TRL_011[f"{name}/value_clipfrac"])


def test_the_inputs_show_what_they_are_for() -> None:
    """Clipped on both sides, gaps within rows, a row without tokens."""
    own = own_loss("gaps", **HIGH)
    assert own["clip_fraction_low"] > 0.03 and own["clip_fraction_high"] > 0.03
    assert last_place(MASKS["gaps"]).tolist() != (MASKS["gaps"].sum(1) - 1).tolist()
    assert with_response("empty") < 1 == with_response("gaps")
