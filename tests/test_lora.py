"""Adapters train alike on every layout, beside weights that stay as they are to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gathered import Part, assembled, parts_of
from training_cases import MODELS, Case, make_engine, once, own_batch, train

from megallm.config.check_lora import check_lora
from megallm.config.lora import LoraConfig, lora_targets
from megallm.config.numerics import NumericsConfig
from megallm.config.optim import OptimConfig
from megallm.config.parallel import ParallelConfig
from megallm.model.lora import Adapter
from megallm.ops.backends import BACKENDS, Backends
from megallm.parallel.mesh import Mesh
from megallm.testing.pool import run_ranks
from megallm.trainers.engine import Engine
from megallm.trainers.losses import Batch, LossResult, count_labels, language_model_loss
from megallm.trainers.step import split_batch

UNTIED, TIED, QWEN2, QWEN3 = list(MODELS)[:4]
STEPS = 10
LORA = LoraConfig(lora_rank=3, lora_alpha=7.0, lora_dropout=0.2)
SOME = LoraConfig(lora_rank=4, lora_targets=("v_proj", "q_proj", "down_proj"), lora_rslora=True)
KINDS = {"all": LORA, "some": SOME}

# The one-rank runs of a model are the first ones.
CASES = [
    (Case(model=UNTIED), "all"),
    (Case(model=TIED), "all"),
    (Case(model=QWEN2), "some"),
    (Case(model=QWEN3), "all"),
    (Case(model=UNTIED, mbs=1, schedule="gpipe", v=2, recompute="full"), "all"),
    (Case(model=TIED, mbs=2, recompute="selective"), "all"),
    (Case(model=UNTIED, tp=2), "all"),
    (Case(model=UNTIED, tp=2, sp=False, recompute="full"), "all"),
    (Case(model=TIED, tp=2, sp=False), "all"),
    (Case(model=QWEN2, tp=2, recompute="selective"), "some"),
    (Case(model=UNTIED, pp=2, v=2, schedule="interleaved", mbs=2), "all"),
    (Case(model=TIED, pp=2), "all"),
    (Case(model=UNTIED, dp=2, zero=1, mbs=1), "all"),
    (Case(model=TIED, dp=2, zero=2, mbs=2), "all"),
    (Case(model=UNTIED, dp=2, zero=3, mbs=2), "all"),
    (Case(model=TIED, dp=2, zero=3, recompute="full"), "all"),
    (Case(model=QWEN2, dp=2, zero=3, keep=True, mbs=2), "some"),
    (Case(model=UNTIED, dp=2, zero=3, offload="optimizer+params"), "all"),
    (Case(model=QWEN3, tp=4), "all"),
    (Case(model=QWEN3, tp=4, sp=False), "all"),
    (Case(model=QWEN2, pp=2, dp=2, v=2, mbs=2, zero=2), "some"),
    (Case(model=UNTIED, tp=2, pp=2, dp=2, zero=1, mbs=2), "all"),
    (Case(model=QWEN3, tp=4, dp=2, zero=3, recompute="full"), "all"),
]


def train_all(rank: int, world_size: int, cases: list[tuple[Case, str]]) -> dict[str, Any]:
    """Curves and, of each model's trained parameters, this rank's slices."""
    found = {}
    for case, kind in cases:
        engine = make_engine(case, lora=KINDS[kind])
        curve = train(engine, 0, STEPS)
        if engine.flat is not None:
            engine.flat.gather()
        trained = {n: p.data for n, p in engine.model.named_parameters() if p.requires_grad}
        found[case.name] = (curve, parts_of(engine.model, trained))
    return found


@once
def trained(world_size: int) -> dict[str, tuple[list[tuple[float, float]], dict[str, torch.Tensor]]]:
    ranks = run_ranks(train_all, world_size, [each for each in CASES if each[0].world_size == world_size])
    for other in ranks[1:]:
        assert all(other[name][0] == ranks[0][name][0] for name in ranks[0]), "ranks disagree"
    return {name: (ranks[0][name][0], assembled([rank[name][1] for rank in ranks])) for name in ranks[0]}


@pytest.mark.parametrize(("case", "kind"), CASES, ids=lambda value: getattr(value, "name", value))
def test_ten_steps_equal_the_one_rank_run(case: Case, kind: str) -> None:
    expected_curve, expected = trained(1)[case.model]
    curve, actual = trained(case.world_size)[case.name]
    for (loss, norm), (true_loss, true_norm) in zip(curve, expected_curve, strict=True):
        assert abs(loss / true_loss - 1) < 1e-9
        assert abs(norm / true_norm - 1) < 1e-9
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert torch.allclose(actual[name], tensor, rtol=0, atol=1e-9), name


def test_the_runs_learn() -> None:
    for model in (UNTIED, TIED, QWEN2, QWEN3):
        losses = [loss for loss, _ in trained(1)[model][0]]
        assert sum(losses[-3:]) < sum(losses[:3])


# -- what an adapter is ------------------------------------------------------------------------------------------------


def dense_logits(engine: Engine, ids: torch.Tensor, effective: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits [T, V] of the engine's model with other weights, by a model without adapters."""
    plain = Engine(engine.config, engine.mesh, precision="fp64", micro_batch_size=4, train=False)
    for name, parameter in plain.model.named_parameters():
        parameter.data = effective[name]
    return plain.forward({"input_ids": ids}, lambda logits, _: logits.local)[0]


def with_random_up(engine: Engine) -> Engine:
    """Gives every B numbers, the same on any layout."""
    with torch.no_grad():
        for name, spec, parameter in engine.model.slices():
            if ".lora_B_" in name:
                for piece in spec.pieces:
                    whole = torch.randn(piece.shape, generator=torch.Generator().manual_seed(len(piece.name)))
                    piece.local(parameter).copy_(whole.narrow(piece.dim, piece.start, piece.length).to(parameter) * 0.1)
    return engine


def effective_weights(engine: Engine, *, differentiable: bool = False) -> dict[str, torch.Tensor]:
    """W + s B A by the formula, for every weight of a one-rank model, by local name."""
    weights = {n: p.detach() for n, p in engine.model.named_parameters() if not engine.model.specs[n].is_adapter}
    names = {p: n for n, p in engine.model.named_parameters()}
    assert engine.lora is not None
    for module in engine.model.modules():
        if isinstance(module, Adapter):
            parts, rank = [], engine.lora.lora_rank
            for i, (start, up) in enumerate(module.low_rank.ups()):
                down = module.low_rank.lora_A[i * rank : (i + 1) * rank]
                change = torch.zeros_like(module.weight).index_add(
                    0, torch.arange(start, start + up.size(0)), engine.lora.scale * (up @ down)
                )
                parts.append(change)
            total = sum(parts) + module.weight.detach()
            weights[names[module.weight]] = total if differentiable else total.detach()
    return weights


@pytest.mark.parametrize("model", [UNTIED, TIED, QWEN3])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_sum_of_weights(model: str, kind: str) -> None:
    case = Case(model=model)
    engine = with_random_up(make_engine(case, lora=KINDS[kind]))
    ids = own_batch(0, engine.mesh)["input_ids"][:4]
    actual = engine.forward({"input_ids": ids}, lambda logits, _: logits.local)[0]
    expected = dense_logits(engine, ids, effective_weights(engine))
    assert torch.allclose(actual, expected, rtol=0, atol=1e-12)
    plain = make_engine(case).forward({"input_ids": ids}, lambda logits, _: logits.local)[0]
    assert not torch.allclose(actual, plain, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_autograd_through_the_sum(kind: str) -> None:
    lora = replace(KINDS[kind], lora_dropout=0.0)
    case = Case(model=UNTIED, mbs=8)
    engine = with_random_up(make_engine(case, lora=lora, optim=OptimConfig(max_grad_norm=0.0)))
    batch = own_batch(0, engine.mesh)
    weights = effective_weights(engine, differentiable=True)
    plain = Engine(engine.config, engine.mesh, precision="fp64", train=False).model
    stage = plain.stage(0)
    for name, weight in weights.items():
        owner, _, leaf = name.removeprefix("stages.0.").rpartition(".")
        module = stage.get_submodule(owner)
        del module._parameters[leaf]
        setattr(module, leaf, weight)
    microbatch = split_batch(batch, 1, mesh=engine.mesh)[0]
    out = stage(microbatch.batch["input_ids"].reshape(-1), microbatch.context)
    loss, count, _ = language_model_loss(out, microbatch.batch)
    adapters = {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(loss / count, list(adapters.values()))
    engine.train_step(batch, language_model_loss)
    assert engine.gradients is not None
    actual = engine.gradients.named()
    assert set(actual) == set(adapters)
    for (name, _), gradient in zip(adapters.items(), expected, strict=True):
        assert torch.allclose(actual[name], gradient, rtol=1e-9, atol=1e-13), name


def test_new_adapters_add_nothing_and_follow_peft_s_distribution() -> None:
    engine = make_engine(Case(model=UNTIED), lora=LoraConfig(lora_rank=8))
    downs = {n: p for n, p in engine.model.named_parameters() if n.endswith("lora_A")}
    ups = [p for n, p in engine.model.named_parameters() if ".lora_B_" in n]
    assert not any(up.any() for up in ups) and len(ups) == 7 * 4 and len(downs) == 4 * 4
    for name, down in downs.items():
        bound = down.size(1) ** -0.5
        assert down.abs().max() < bound and down.abs().max() > 0.9 * bound, name
        assert abs(float(down.detach().std()) * 3**0.5 / bound - 1) < 0.1
    ids = own_batch(0, engine.mesh)["input_ids"][:4]
    engines = (engine, make_engine(Case(model=UNTIED)))
    outputs = [each.forward({"input_ids": ids}, lambda logits, _: logits.local)[0] for each in engines]
    assert torch.equal(*outputs)


def test_the_scale_is_alpha_over_rank_or_its_root() -> None:
    assert LoraConfig(lora_rank=8, lora_alpha=16).scale == 2.0
    assert LoraConfig(lora_rank=16, lora_alpha=16, lora_rslora=True).scale == 4.0


FUSED = {op: "triton" for op in BACKENDS if op != "grouped_gemm"}


def losses_and_norms(case: Case, forced: dict[str, str]) -> list[float]:
    engine = make_engine(case, lora=replace(LORA, lora_dropout=0.0), backends=Backends(forced))
    return [number for step in train(engine, 0, 2) for number in step]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_triton_kernels_beside_adapters_and_frozen_weights_give_the_same(recompute: Any) -> None:
    case = Case(model=UNTIED, precision="fp32", mbs=8, recompute=recompute)
    assert losses_and_norms(case, FUSED) == pytest.approx(losses_and_norms(case, {}), rel=2e-5)


def test_adapters_train_beside_fp8_products() -> None:
    case = Case(model=UNTIED, mbs=8)
    numerics = NumericsConfig(precision="fp8", fp8_emulate=True)
    engine = make_engine(case, lora=LORA, precision=numerics)
    curve, plain = train(engine, 0, 3), train(make_engine(case, lora=LORA), 0, 3)
    for (loss, norm), (true_loss, true_norm) in zip(curve, plain, strict=True):
        assert loss == pytest.approx(true_loss, rel=0.02) and norm == pytest.approx(true_norm, rel=0.2)


def test_samples_are_those_of_the_merged_model() -> None:
    engine = with_random_up(make_engine(Case(model=QWEN3), lora=SOME))
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15]]
    samples = engine.generate(prompts, max_new_tokens=6)
    with engine.model.adapters_off():
        assert engine.generate(prompts, max_new_tokens=6) != samples
    engine.merge_adapters()
    assert engine.generate(prompts, max_new_tokens=6) == samples


# -- what changes and what does not ------------------------------------------------------------------------------------

KEPT = [
    Case(model=UNTIED),
    Case(model=TIED, tp=2),
    Case(model=UNTIED, dp=2, zero=1),
    Case(model=TIED, dp=2, zero=2, precision="bf16"),
    Case(model=UNTIED, dp=2, zero=3, precision="bf16", mbs=2),
]


def step_and_look(rank: int, world_size: int, cases: list[Case]) -> dict[str, dict[str, Any]]:
    found = {}
    for case in cases:
        engine = make_engine(case, lora=LORA)
        assert engine.flat is not None and engine.gradients is not None and engine.optimizer is not None
        engine.flat.gather()
        before = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
        train(engine, 0, 2)
        engine.flat.gather()
        flat = engine.flat
        found[case.name] = {
            "changed": {n for n, p in engine.model.named_parameters() if not torch.equal(p, before[n])},
            "adapters": {n for n in before if engine.model.specs[n].is_adapter},
            "grads": set(engine.gradients.named()),
            "gradient numel": sum(bucket.whole.numel() for bucket in engine.gradients.buckets),
            "trained numel": sum(bucket.bucket.numel for bucket in flat.trained),
            "state numel": sum(each.numel() for each in engine.optimizer.exp_avg),  # type: ignore[attr-defined]
            "shards": sum(bucket.shard.numel() for bucket in flat.trained),
        }
        for bucket in flat.buckets:
            bucket.release()
        found[case.name]["frozen bytes"] = sum(b.params.untyped_storage().size() for b in flat.frozen)
    return found


@once
def looked(world_size: int) -> dict[str, dict[str, Any]]:
    return run_ranks(step_and_look, world_size, [case for case in KEPT if case.world_size == world_size])[0]


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
def test_only_adapters_change_and_have_gradients_and_state(case: Case) -> None:
    found = looked(case.world_size)[case.name]
    assert found["changed"] == found["adapters"] == found["grads"]
    assert found["gradient numel"] == found["trained numel"] and found["state numel"] == found["shards"]
    assert (found["frozen bytes"] == 0) == (case.zero == 3)


def test_adapters_off_gives_the_base_model_to_the_bit() -> None:
    case = Case(model=QWEN3, precision="fp32")
    base, engine = make_engine(case), make_engine(case, lora=LORA)
    train(engine, 0, 2)
    ids = own_batch(0, engine.mesh)["input_ids"][:4]

    def logits(of: Engine) -> torch.Tensor:
        return of.forward({"input_ids": ids}, lambda out, _: out.local)[0]

    with engine.model.adapters_off():
        assert torch.equal(logits(engine), logits(base))
        with pytest.raises(ValueError, match="adapters_off"):
            train(engine, 0, 1)
    assert not torch.equal(logits(engine), logits(base))


MERGED = [
    Case(model=UNTIED),
    Case(model=UNTIED, tp=2),
    Case(model=TIED, pp=2),
    Case(model=QWEN3, tp=2, sp=False),
    Case(model=UNTIED, dp=2, zero=1),
    Case(model=UNTIED, dp=2, zero=3),
    Case(model=UNTIED, precision="bf16", tp=2),
]


def merge(rank: int, world_size: int, cases: list[Case]) -> list[tuple[str, list[torch.Tensor], list[Part]]]:
    found = []
    for case in cases:
        engine = make_engine(case, lora=LORA)
        train(engine, 0, 2)
        batch = own_batch(0, engine.mesh)
        outputs = engine.forward(batch, lambda out, _: out.gathered())
        engine.merge_adapters()
        outputs += engine.forward(batch, lambda out, _: out.gathered())
        with engine.model.adapters_off():
            outputs += engine.forward(batch, lambda out, _: out.gathered())
        train(engine, 2, 3)
        assert engine.flat is not None
        engine.flat.gather()
        found.append((case.name, outputs, parts_of(engine.model, dict(engine.model.named_parameters()))))
    return found


@once
def merged(world_size: int) -> dict[str, tuple[list[torch.Tensor], dict[str, torch.Tensor]]]:
    ranks = run_ranks(merge, world_size, [case for case in MERGED if case.world_size == world_size])
    return {
        name: (next(r[i][1] for r in ranks if r[i][1]), assembled([r[i][2] for r in ranks]))
        for i, (name, _, _) in enumerate(ranks[0])
    }


@pytest.mark.parametrize("case", MERGED, ids=lambda case: case.name)
def test_merged_weights_compute_what_weights_and_adapters_did(case: Case) -> None:
    outputs, _ = merged(case.world_size)[case.name]
    third = len(outputs) // 3
    for before, after, base in zip(outputs[:third], outputs[third : 2 * third], outputs[2 * third :], strict=True):
        assert torch.equal(after, base), "adapters start anew, from B = 0"
        # bf16: a logit is of magnitude 1, and every weight and activation is rounded to 2^-9
        assert torch.allclose(before, after, rtol=0, atol=2e-2 if case.precision == "bf16" else 1e-6)


def test_merged_weights_are_the_same_on_every_layout() -> None:
    expected = merged(1)[Case(model=UNTIED).name][1]
    for case in MERGED[1:]:
        if case.model == UNTIED and case.precision == "fp64":
            actual = merged(case.world_size)[case.name][1]
            assert all(torch.allclose(actual[n], expected[n], rtol=0, atol=1e-9) for n in expected), case.name


# -- a scalar head -----------------------------------------------------------------------------------------------------


def score_loss(values: torch.Tensor, batch: Batch) -> LossResult:
    """Squared distance of each token's value from its id / 100."""
    return (values - batch["input_ids"] / 100).square().sum(), count_labels(batch), {}


def train_score(rank: int, world_size: int, cases: list[Case]) -> list[tuple[list[float], list[Part]]]:
    found = []
    for case in cases:
        mesh = Mesh.build(tp=case.tp, pp=case.pp, dp=case.dp)
        engine = Engine(
            MODELS[case.model].replace(head="scalar"), mesh, optim=OptimConfig(learning_rate=1e-2), precision="fp64",
            parallel=ParallelConfig(tp=case.tp, pp=case.pp, zero=case.zero), micro_batch_size=case.mbs, lora=LORA,
        )  # fmt: skip
        curve = [engine.train_step(own_batch(step, mesh), score_loss).metrics()["loss"] for step in range(4)]
        assert engine.flat is not None
        engine.flat.gather()
        trained = {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
        found.append((curve, parts_of(engine.model, trained)))
    return found


@once
def scored(world_size: int) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    cases = [case for case in SCORED if case.world_size == world_size]
    ranks = run_ranks(train_score, world_size, cases)
    return [(ranks[0][i][0], assembled([rank[i][1] for rank in ranks])) for i in range(len(cases))]


SCORED = [Case(model=UNTIED), Case(model=UNTIED, tp=2), Case(model=UNTIED, pp=2), Case(model=UNTIED, dp=2, zero=3)]


def test_a_scalar_head_trains_beside_adapters_on_every_layout() -> None:
    (curve, weights), *_ = scored(1)
    assert curve[-1] < curve[0] and "score.weight" in weights
    for other, found in scored(2):
        assert other == pytest.approx(curve, rel=1e-9)
        assert all(torch.allclose(found[name], weights[name], rtol=0, atol=1e-9) for name in weights)


# -- rules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (LoraConfig(lora_rank=-1), "lora_rank"),
        (LoraConfig(lora_rank=4, lora_alpha=0.0), "lora_alpha"),
        (LoraConfig(lora_rank=4, lora_dropout=1.0), "lora_dropout"),
        (LoraConfig(lora_rank=4, lora_targets=("query",)), "no query: use some of q_proj"),
        (LoraConfig(lora_rank=4, lora_targets=("q_proj", "q_proj")), "twice"),
    ],
)
def test_what_cannot_be_is_refused_in_words(lora: LoraConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_lora(lora, MODELS[UNTIED])


def test_gpt2_has_no_gate_and_muon_trains_no_adapters() -> None:
    assert "gate_proj" not in lora_targets(LORA, MODELS[TIED])
    with pytest.raises(ValueError, match="no gate_proj"):
        check_lora(LoraConfig(lora_rank=4, lora_targets=("gate_proj",)), MODELS[TIED])
    with pytest.raises(ValueError, match="muon"):
        check_lora(LORA, MODELS[UNTIED], OptimConfig(optimizer="muon"))


def test_rank_zero_is_no_adapter() -> None:
    engine = make_engine(Case(model=UNTIED), lora=LoraConfig())
    assert engine.lora is None and all(p.requires_grad for p in engine.model.parameters())


def train_with_an_embedding_alone(rank: int, world_size: int) -> tuple[list[tuple[float, float]], ...]:
    alone = ParallelConfig(tp=1, pp=2, pipeline_partition=(0, 4))
    case = Case(model=UNTIED, pp=2)
    return tuple(train(make_engine(case, lora=LORA, parallel=p), 0, 2) for p in (alone, ParallelConfig(tp=1, pp=2)))


def test_a_stage_may_hold_nothing_that_trains() -> None:
    for alone, balanced in run_ranks(train_with_an_embedding_alone, 2):
        assert [pytest.approx(each, rel=1e-9) for each in balanced] == alone
