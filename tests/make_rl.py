"""Writes tests/fixtures/rl.json: what TRL, verl and OpenRLHF make of seeded rollouts.

    pip install --no-deps --target FOLDER/trl011 trl==0.11.4            and likewise FOLDER/trl112 trl==1.12.0,
    python tests/make_rl.py FOLDER                                      FOLDER/verl verl, FOLDER/openrlhf openrlhf

in an environment with torch and numpy. The packages are not imported, since that wants ray, deepspeed and old
transformers: the functions, or the lines of long methods, are taken from the installed files as they are and run on
fp64 tensors. Nothing of ours computes. Run it only when a package's version or the inputs are meant to change.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from source_lines import Config, Source, Space

RESULTS = Path(__file__).parent / "fixtures" / "rl.json"
B, R, V, GROUP = 6, 8, 7, 3
CLIP_LOW, CLIP_HIGH, DUAL_CLIP, SEQUENCE_CLIP, VALUE_CLIP = 0.2, 0.28, 1.5, 0.05, 0.2
KL_COEFFICIENT, BETA, GAMMA, LAMBDA, TEMPERATURE, MAX_LENGTH, PENALTY = 0.1, 0.15, 0.98, 0.95, 0.7, 11, 1.5
CONTROLLER = {
    "coefficient": 0.2, "target": 6.0, "horizon": 10_000.0, "kls": [6.0, 12.0, 6.6, 3.0, -1.0, 7.1], "episodes": 256,
}  # fmt: skip
MASKS = {
    "ended": ["11111111", "11100000", "11111000", "10000000", "11111110", "11110000"],
    "gaps": ["11001110", "10100000", "11111000", "01000000", "00110111", "11110001"],
    "empty": ["11001110", "11100000", "00000000", "10000000", "11111111", "11110000"],
}
def inputs() -> dict[str, torch.Tensor]:
    """Logits of the responses' tokens, what was sampled, and everything that belongs to them; fp64."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    logits, labels = 1.5 * normal(B, R, V), torch.randint(0, V, (B, R), generator=generator)
    logprobs = logprobs_of(logits, labels)
    return {
        "logits": logits,
        "labels": labels,
        "old_logprobs": logprobs + 0.4 * normal(B, R),
        "ref_logprobs": logprobs + 0.5 * normal(B, R),
        "values": normal(B, R),
        "old_values": normal(B, R),
        "advantages": normal(B, R),
        "returns": normal(B, R),
        "scores": 2.0 * normal(B),
        "row_advantages": normal(B),
        "has_ended": torch.tensor([True, True, False, True, False, True]),
        "groups": torch.arange(B) // GROUP,
        "scattered_groups": torch.tensor([4, 2, 4, 9, 2, 4]),
    }  # fmt: skip


def logprobs_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def mask_of(kind: str) -> torch.Tensor:
    return torch.tensor([[int(each) for each in row] for row in MASKS[kind]])


def compact(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mask's places of each row moved to its left, as if nothing lay between them."""
    order = (1 - mask).argsort(dim=1, stable=True)
    return values.gather(1, order)


def with_grad(x: dict[str, torch.Tensor], loss: Any) -> dict[str, Any]:
    """{"loss", "grad" [B, R] with respect to the log-probabilities} of loss(logprobs) -> loss."""
    logprobs = logprobs_of(x["logits"], x["labels"]).requires_grad_()
    value = loss(logprobs)
    value.backward()
    assert logprobs.grad is not None
    return {"loss": value, "grad": logprobs.grad}


def controllers(kind: Any) -> list[float]:
    c = CONTROLLER
    controller, found = kind(c["coefficient"], c["target"], c["horizon"]), []
    for kl in c["kls"]:  # type: ignore[attr-defined]
        controller.update(kl, c["episodes"])
        found.append(float(controller.value))
    return found


def trl_011(folder: Path, x: dict[str, torch.Tensor]) -> Space:
    """TRL 0.11.4: PPOTrainer, which puts the score at the last token; RLOO."""
    root = folder / "trl011" / "trl"
    core = Source(root / "core.py").define(
        "masked_mean", "masked_var", "masked_whiten", "clip_by_value", "entropy_from_logits"
    )
    trainer = Source(root / "trainer" / "ppo_trainer.py", flatten_dict=lambda stats: stats, **core)
    kind = trainer.methods("PPOTrainer", "compute_rewards", "_kl_penalty", "compute_advantages", "loss")
    ppo, logprobs = kind(), logprobs_of(x["logits"], x["labels"])
    ppo.kl_ctl = SimpleNamespace(value=KL_COEFFICIENT)
    found: Space = {}
    for name in ("ended", "gaps"):
        mask = mask_of(name)
        for whiten in (True, False):
            ppo.config = SimpleNamespace(
                kl_penalty="kl", whiten_rewards=whiten, gamma=GAMMA, lam=LAMBDA, cliprange=CLIP_LOW,
                cliprange_value=VALUE_CLIP, vf_coef=1.0, ratio_threshold=10.0,
            )  # fmt: skip
            rewards, _, kl = ppo.compute_rewards(x["scores"], logprobs, x["ref_logprobs"], mask)
            packed = (compact(each, mask) for each in (x["values"], rewards, mask))
            _, advantages, returns = ppo.compute_advantages(*packed)
            found[f"{name}/advantages/{whiten}"], found[f"{name}/returns/{whiten}"] = advantages, returns
        found[f"{name}/rewards"], found[f"{name}/k1"] = rewards, kl
        ppo.config.kl_penalty = "mse"
        found[f"{name}/k2"] = ppo._kl_penalty(logprobs, x["ref_logprobs"])
        for shift in (False, True):
            found[f"{name}/whiten/{shift}"] = core["masked_whiten"](x["values"], mask, shift_mean=shift)
        stats: Space = {}

        def loss(lp: torch.Tensor, mask: torch.Tensor = mask, stats: Space = stats) -> torch.Tensor:
            policy, value, own = ppo.loss(
                x["old_logprobs"], x["old_values"], x["logits"], x["values"], lp, mask, x["advantages"], x["returns"]
            )
            stats.update(own, value_loss=value)
            return policy

        found[f"{name}/policy"] = with_grad(x, loss)
        found[f"{name}/value_loss"], found[f"{name}/entropy"] = stats["value_loss"], stats["policy"]["entropy"]
        found[f"{name}/clipfrac"] = stats["policy"]["clipfrac"]
        found[f"{name}/value_clipfrac"] = stats["val"]["clipfrac"]
        found[f"{name}/k2_old"] = stats["policy"]["approxkl"]
    utils = Source(root / "trainer" / "utils.py").define("AdaptiveKLController")
    found["controller"] = controllers(utils["AdaptiveKLController"])
    rloo = Source(root / "trainer" / "rloo_trainer.py").lines(
        "rlhf_reward = rlhf_reward.reshape(args.rloo_k", "advantages = advantages.flatten()",
        args=SimpleNamespace(rloo_k=GROUP), rlhf_reward=x["scores"].view(-1, GROUP).t().flatten(),
    )["advantages"]  # fmt: skip
    found["rloo"] = rloo.view(GROUP, -1).t().flatten()  # it keeps a prompt's responses B / GROUP apart
    return found


def trl_112(folder: Path, x: dict[str, torch.Tensor]) -> Space:
    """TRL 1.12.0: the experimental PPO, which puts the score behind the last token; GRPO's and RLOO's lines."""
    root, found = folder / "trl112" / "trl", {}
    path = root / "experimental" / "ppo" / "ppo_trainer.py"
    ppo = Source(path)
    ppo.define("masked_mean", "masked_var", "masked_whiten", "INVALID_LOGPROB")
    lengths = mask_of("ended").sum(1)
    responses = torch.arange(R).expand(B, R) + 10
    responses = torch.where((torch.arange(R) == 0) & x["has_ended"].unsqueeze(1), 2, responses)
    for case, estimator, whiten in (("k1", "k1", False), ("k3", "k3", False), ("whitened", "k1", True)):
        args = SimpleNamespace(
            missing_eos_penalty=PENALTY, kl_estimator=estimator, kl_coef=KL_COEFFICIENT, whiten_rewards=whiten,
            gamma=GAMMA, lam=LAMBDA,
        )  # fmt: skip
        space = ppo.lines(
            "contain_eos_token = torch.any(", "advantages = torch.masked_fill(advantages, padding_mask, 0)",
            self=SimpleNamespace(args=args, processing_class=SimpleNamespace(eos_token_id=2)), args=args,
            postprocessed_responses=responses, responses=responses, scores=x["scores"].clone(),
            logprobs=logprobs_of(x["logits"], x["labels"]), ref_logprobs=x["ref_logprobs"], values=x["values"],
            sequence_lengths=lengths - 1,
        )  # fmt: skip
        for name in ("scores", "rewards", "advantages", "returns"):
            found[f"ppo/{case}/{name}"] = space[name]
    for mask in MASKS:
        found |= {f"{mask}/{name}": value for name, value in trl_grpo_losses(root, x, mask_of(mask)).items()}
    return found | trl_group_advantages(root, x)


def trl_grpo_losses(root: Path, x: dict[str, torch.Tensor], mask: torch.Tensor) -> Space:
    source, found = Source(root / "trainer" / "grpo_trainer.py"), {}
    options: dict[str, Space] = {
        "grpo": {}, "bnpo": {}, "dr_grpo": {}, "dapo": {}, "kl": {"beta": BETA}, "dual": {"delta": DUAL_CLIP},
        "gspo": {"importance_sampling_level": "sequence", "epsilon_low": SEQUENCE_CLIP, "epsilon_high": SEQUENCE_CLIP},
    }  # fmt: skip
    for name, own in options.items():
        chosen: Space = {
            "loss_type": name if name in ("bnpo", "dr_grpo", "dapo") else "grpo", "beta": 0.0, "epsilon_low": CLIP_LOW,
            "epsilon_high": CLIP_HIGH, "importance_sampling_level": "token", "off_policy_mask_threshold": None,
            "use_vllm": False, "current_gradient_accumulation_steps": 1, "max_completion_length": MAX_LENGTH,
            "model": SimpleNamespace(training=True), "accelerator": SimpleNamespace(num_processes=1),
        } | own  # fmt: skip
        args = SimpleNamespace(delta=own.get("delta"), use_bias_correction_kl=False, steps_per_generation=1)
        of_rows = x["row_advantages"].unsqueeze(1)
        scope: Space = {
            "self": SimpleNamespace(args=args, **chosen), "mask": mask, "entropy_mask": None,
            "old_per_token_logps": x["old_logprobs"], "advantages": of_rows if name == "gspo" else x["advantages"],
            "inputs": {"ref_per_token_logps": x["ref_logprobs"], "num_items_in_batch": mask.sum()},
        }  # fmt: skip

        def loss(logprobs: torch.Tensor, scope: Space = scope) -> torch.Tensor:
            space = source.lines(
                "log_ratio = per_token_logps - old_per", "# Entropy bonus: add", per_token_logps=logprobs, **scope
            )  # fmt: skip
            result: torch.Tensor = space["loss"]
            return result

        found[name] = with_grad(x, loss)
    return found


def trl_group_advantages(root: Path, x: dict[str, torch.Tensor]) -> Space:
    found: Space = {}
    space = Source(root / "trainer" / "utils.py").define("nanstd") | {"rewards": x["scores"], "num_generations": GROUP}
    for scale in ("group", "none", "batch"):
        found[f"advantages/{scale}"] = Source(root / "trainer" / "grpo_trainer.py").lines(
            "mean_grouped_rewards = torch.nanmean(rewards.view", "advantages = advantages / (std_rewards + 1e-4)",
            self=SimpleNamespace(scale_rewards=scale), **space,
        )["advantages"]  # fmt: skip
    found["rloo"] = Source(root / "trainer" / "rloo_trainer.py").lines(
        "grouped_rewards = rewards.view(-1, num_generations)", "advantages = torch.nan_to_num(",
        self=SimpleNamespace(normalize_advantages=False), **space,
    )["advantages"]  # fmt: skip
    return found


def verl(folder: Path, x: dict[str, torch.Tensor]) -> Space:
    """verl: the functions of core_algos.py."""
    root = folder / "verl" / "verl"
    shared = Source(root / "utils" / "torch_functional.py").define(
        "entropy_from_logits", "masked_sum", "masked_mean", "masked_var", "masked_whiten", "clip_by_value"
    )
    ours = SimpleNamespace(**{name: value for name, value in shared.items() if name.isidentifier()})
    source = Source(root / "trainer" / "ppo" / "core_algos.py", verl_F=ours, ActorConfig=Config, AlgoConfig=type(None))
    core = Config(
        source.define(
            "AdaptiveKLController", "compute_gae_advantage_return", "compute_grpo_outcome_advantage",
            "compute_reinforce_plus_plus_baseline_outcome_advantage", "compute_rloo_outcome_advantage",
            "compute_reinforce_plus_plus_outcome_advantage", "compute_rewards", "agg_loss", "kl_penalty",
            "compute_policy_loss_vanilla", "compute_policy_loss_gspo", "compute_entropy_loss", "compute_value_loss",
            "kl_penalty_forward",
        )
    )  # fmt: skip
    found: Space = {"controller": controllers(core.AdaptiveKLController)}
    logprobs = logprobs_of(x["logits"], x["labels"])
    for kind in ("k1", "k2", "k3"):
        found[kind] = core.kl_penalty(logprobs, x["ref_logprobs"], kind)
    for name in ("ended", "gaps"):
        mask = mask_of(name)
        at_end = score_at_end(x["scores"], mask)
        rewards = core.compute_rewards(at_end, logprobs, x["ref_logprobs"], KL_COEFFICIENT)
        advantages, returns = core.compute_gae_advantage_return(rewards, x["values"], mask, GAMMA, LAMBDA)
        plus = core.compute_reinforce_plus_plus_outcome_advantage(rewards, mask, config=Config(gamma=GAMMA))
        found |= {f"{name}/rewards": rewards, f"{name}/advantages": advantages, f"{name}/returns": returns}
        found |= {f"{name}/reinforce++": plus[0], f"{name}/reinforce++/returns": plus[1]}
        for shift in (False, True):
            found[f"{name}/whiten/{shift}"] = ours.masked_whiten(x["values"], mask, shift)
        index = x["scattered_groups"].numpy()
        found[f"{name}/grpo"] = core.compute_grpo_outcome_advantage(at_end, mask, index)[0]
        found[f"{name}/dr_grpo"] = core.compute_grpo_outcome_advantage(
            at_end, mask, index, norm_adv_by_std_in_grpo=False
        )[0]
        found[f"{name}/rloo"] = core.compute_rloo_outcome_advantage(at_end, mask, index)[0]
        found[f"{name}/reinforce++/baseline"] = core.compute_reinforce_plus_plus_baseline_outcome_advantage(
            at_end, mask, x["groups"].numpy()
        )[0]
    for name in MASKS:
        found |= {f"{name}/{key}": value for key, value in verl_losses(core, x, mask_of(name)).items()}
    return found


def verl_losses(core: Config, x: dict[str, torch.Tensor], mask: torch.Tensor) -> Space:
    modes = {"token": "token-mean", "sequence": "seq-mean-token-mean", "constant": "seq-mean-token-sum-norm"}
    found: Space = {}
    for name, mode in [*modes.items(), ("dual", "token-mean"), ("gspo", "seq-mean-token-mean")]:
        high, is_gspo = (SEQUENCE_CLIP, True) if name == "gspo" else (CLIP_HIGH, False)
        config = Config(
            clip_ratio=SEQUENCE_CLIP if is_gspo else CLIP_LOW, clip_ratio_low=None, clip_ratio_high=high,
            clip_ratio_c=DUAL_CLIP if name == "dual" else 1e9,
            global_batch_info={"loss_scale_factor": MAX_LENGTH} if name == "constant" else {},
        )  # fmt: skip
        function = core.compute_policy_loss_gspo if is_gspo else core.compute_policy_loss_vanilla
        given = x["row_advantages"].unsqueeze(1).expand(B, R) if is_gspo else x["advantages"]
        metrics: Space = {}

        def loss(logprobs: torch.Tensor, own: Any = (function, given, mode, config, metrics)) -> torch.Tensor:
            function, given, mode, config, metrics = own
            value, seen = function(x["old_logprobs"], logprobs, given, mask, loss_agg_mode=mode, config=config)
            metrics.update(seen)
            result: torch.Tensor = value
            return result

        found[name] = with_grad(x, loss) | {"clipfrac": metrics["actor/pg_clipfrac"], "k1": metrics["actor/ppo_kl"]}
        found[name]["dual_clipfrac"] = metrics["actor/pg_clipfrac_lower"]
    found["entropy"] = core.compute_entropy_loss(x["logits"], mask)
    found["value_loss"], found["value_clipfrac"] = core.compute_value_loss(
        x["values"], x["returns"], x["old_values"], mask, VALUE_CLIP
    )
    return found


def score_at_end(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, R]: what verl's reward managers hand on: each score at its row's last token."""
    found = torch.zeros(mask.shape, dtype=scores.dtype)
    for row in range(len(mask)):
        found[row, int(mask[row].nonzero()[-1])] = scores[row]
    return found


def openrlhf(folder: Path, x: dict[str, torch.Tensor]) -> Space:
    """OpenRLHF: its losses, its estimates and the advantages of its experience maker."""
    root = folder / "openrlhf" / "openrlhf"
    utils = Source(root / "models" / "utils.py").define(
        "compute_approx_kl", "compute_reward", "masked_mean", "compute_entropy", "log_probs_from_logits",
        "_logsumexp_by_chunk", "KL_IS_WEIGHT_CLIP",
    )  # fmt: skip
    losses = Config(Source(root / "models" / "loss.py", masked_mean=utils["masked_mean"]).define(
        "aggregate_loss", "PolicyLoss", "ValueLoss"
    ))  # fmt: skip
    controller = Source(root / "trainer" / "ppo_utils" / "kl_controller.py").define("AdaptiveKLController")
    logprobs = logprobs_of(x["logits"], x["labels"])
    found: Space = {
        "controller": controllers(controller["AdaptiveKLController"]),
        "entropies": utils["compute_entropy"](x["logits"]),
        "tempered": utils["log_probs_from_logits"](x["logits"].clone(), x["labels"], TEMPERATURE),
    }
    for kind in ("k1", "k2", "k3"):
        found[kind] = utils["compute_approx_kl"](logprobs, x["ref_logprobs"], kl_estimator=kind)
    options: dict[str, Space] = {
        "token": {}, "sequence": {"token_level_loss": False}, "dual": {"dual_clip": DUAL_CLIP},
        "gspo": {"policy_loss_type": "gspo", "clip_eps_low": SEQUENCE_CLIP, "clip_eps_high": SEQUENCE_CLIP},
    }  # fmt: skip
    for name in MASKS:
        mask = mask_of(name)
        for kind, own in options.items():
            module = losses.PolicyLoss(**({"clip_eps_low": CLIP_LOW, "clip_eps_high": CLIP_HIGH} | own))
            given = x["row_advantages"].unsqueeze(1) if kind == "gspo" else x["advantages"]

            def loss(lp: torch.Tensor, module: Any = module, given: Any = given, mask: Any = mask) -> torch.Tensor:
                result: torch.Tensor = module(lp, x["old_logprobs"], given, mask)[0]
                return result

            found[f"{name}/{kind}"] = with_grad(x, loss)
        found[f"{name}/value_loss"] = losses.ValueLoss(VALUE_CLIP)(
            x["values"], x["old_values"], x["returns"], mask
        )  # fmt: skip
    return found | openrlhf_advantages(root, x, utils)


def openrlhf_advantages(root: Path, x: dict[str, torch.Tensor], utils: Space) -> Space:
    source = Source(
        root / "trainer" / "ppo_utils" / "experience_maker.py", itertools=itertools,
        compute_reward=utils["compute_reward"], apply_length_penalties=lambda experiences, args: None,
    )  # fmt: skip
    names = "compute_advantages_and_returns", "get_advantages_and_returns", "get_cumulative_returns"
    maker = source.methods("RemoteExperienceMaker", *names)()
    found: Space = {}
    kl = logprobs_of(x["logits"], x["labels"]) - x["ref_logprobs"]
    for name in ("ended", "gaps"):
        mask = mask_of(name)
        for estimator in ("gae", "rloo", "reinforce_baseline", "group_norm", "dr_grpo"):
            own = SimpleNamespace(
                estimator=estimator, gamma=GAMMA if estimator == "gae" else 1.0, lambd=LAMBDA, no_std_norm=False
            )
            args = SimpleNamespace(
                algo=SimpleNamespace(advantage=own), rollout=SimpleNamespace(n_samples_per_prompt=GROUP),
                reward=SimpleNamespace(clip_range=None),
            )  # fmt: skip
            maker.strategy, maker.advantage_estimator = SimpleNamespace(args=args), estimator
            maker.kl_ctl = SimpleNamespace(value=KL_COEFFICIENT if estimator == "gae" else 0.0)
            packed = {"kl": kl, "values": x["values"], "action_mask": mask}
            if estimator == "gae":
                packed = {key: compact(value, mask) for key, value in packed.items()}
            experience = SimpleNamespace(index=list(range(B)), rewards=x["scores"].clone(), info={}, **packed)
            maker.compute_advantages_and_returns([experience])
            found[f"{name}/advantages/{estimator}"] = experience.advantages
            found[f"{name}/returns/{estimator}"] = experience.returns
    return found


def plain(value: Any) -> Any:
    """For JSON: 12 digits, of which 6 are compared."""
    if isinstance(value, torch.Tensor):
        value = value.detach().tolist()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value


def main(folder: Path) -> None:
    """All packages."""
    torch.set_num_threads(1)
    x, versions = inputs(), {}
    for name in ("trl011", "trl112", "verl", "openrlhf"):
        (info,) = (folder / name).glob("*.dist-info")
        versions[name] = info.name.removesuffix(".dist-info").split("-")[1]
    x = {key: torch.tensor(plain(value), dtype=value.dtype) for key, value in x.items()}
    constants = {
        name: globals()[name]
        for name in (
            "CLIP_LOW", "CLIP_HIGH", "DUAL_CLIP", "SEQUENCE_CLIP", "VALUE_CLIP", "KL_COEFFICIENT", "BETA", "GAMMA",
            "LAMBDA", "TEMPERATURE", "MAX_LENGTH", "PENALTY", "CONTROLLER",
        )
    }  # fmt: skip
    content = {
        "made_by": "python tests/make_rl.py",
        "versions": versions,
        "constants": constants,
        "masks": {name: mask_of(name) for name in MASKS},
        "inputs": x,
        "trl011": trl_011(folder, x),
        "trl112": trl_112(folder, x),
        "verl": verl(folder, x),
        "openrlhf": openrlhf(folder, x),
    }
    RESULTS.write_text(json.dumps(plain(content), separators=(",", ":")).replace('],"', '],\n"') + "\n")
    print(RESULTS, RESULTS.stat().st_size, "bytes,", *(f"{name} {version}" for name, version in versions.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
