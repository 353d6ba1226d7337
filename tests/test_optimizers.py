r"""Muon and SGD: what torch's optimizers do, alike at every layout and stage and across checkpoints; what Muon sends.

Elements that Muon sends in a step beyond what AdamW does (optim/matrices.py): over the shards what a rank holds of
matrices that other places own, and what others hold of those that its own place owns; over tp, of the matrices that its
place owns, its slices of other tp ranks' ones and their slices of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gathered import assembled
from test_checkpoint import Curve, other_engine, relative_error, state_parts
from training_cases import MODELS, OPTIM, Case, make_engine, once, own_batch, train, train_cases

from megallm.config.optim import OptimConfig
from megallm.config.parallel import ParallelConfig
from megallm.model.counts import parameter_shapes
from megallm.ops.backends import Backends
from megallm.ops.muon import COEFFICIENTS, orthogonalize, orthogonalize_reference
from megallm.optim.matrices import Matrix, shared_out
from megallm.optim.muon import Muon
from megallm.parallel.mesh import Mesh
from megallm.testing.pool import run_ranks
from megallm.testing.tolerances import assert_close, tolerance
from megallm.trainers.engine import Engine
from megallm.trainers.losses import language_model_loss

UNTIED, TIED, _, QWEN3 = list(MODELS)[:4]
STEPS, STOP, END = 6, 3, 8
GROWTH = COEFFICIENTS[0] ** 5
"""The most that five steps of Newton and Schulz make of a small difference."""


def two_dim_names(model: str) -> set[str]:
    """Global names of the layers' matrices."""
    return {n for n, shape in parameter_shapes(MODELS[model]).items() if ".layers." in n and len(shape) == 2}


# -- orthogonalisation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40), (1, 7), (5, 1)], ids=str)
def test_orthogonalize_is_its_reference(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_close(orthogonalize(matrix), orthogonalize_reference(matrix), magnitude=GROWTH, terms=15 * max(shape))


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)], ids=str)
def test_orthogonalize_keeps_singular_vectors_and_brings_values_near_1(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonalize(matrix) @ v.T
    kept = values > matrix.norm() / 500
    assert 0.68 < found.diagonal()[kept].min() and found.diagonal()[kept].max() < 1.21
    assert_close(found - found.diagonal().diag(), torch.zeros_like(found), magnitude=GROWTH, terms=15 * max(shape))


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (7, 1)], ids=str)
def test_orthogonalize_in_bf16_is_torch_s_function(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = torch.optim._muon._zeropower_via_newtonschulz(matrix.clone(), COEFFICIENTS, 5, 1e-7)
    assert_close(orthogonalize(matrix), expected, terms=5)


def test_orthogonalize_takes_several_matrices_and_zeros() -> None:
    matrices = torch.randn(2, 3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    matrices[1, 2] = 0.0
    found = orthogonalize(matrices)
    assert not found[1, 2].any()
    for i, j in ((0, 0), (0, 2), (1, 1)):
        torch.testing.assert_close(found[i, j], orthogonalize(matrices[i, j]), rtol=1e-12, atol=1e-12)


def test_work_is_shared_out_evenly() -> None:
    work = [9, 1, 5, 5, 5, 1, 3, 3]
    owners = shared_out(work, 3)
    totals = [sum(w for w, owner in zip(work, owners, strict=True) if owner == rank) for rank in range(3)]
    assert max(totals) == 11 and min(totals) == 10
    assert shared_out([], 3) == []
    assert shared_out([7], 3) == [0]


# -- torch's optimizers as the oracle ----------------------------------------------------------------------------------


def unfused(engine: Engine, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(global name, slice, whether weight-decayed) of everything that a rank holds, by local names."""
    for name, tensor in tensors.items():
        spec = engine.model.specs[name]
        for piece in spec.pieces:
            yield piece.name, piece.local(tensor), spec.weight_decay


def oracles(
    optim: OptimConfig, params: dict[str, torch.Tensor], decayed: dict[str, bool], matrices: set[str]
) -> list[torch.optim.Optimizer]:
    kept = {"lr": optim.learning_rate, "weight_decay": optim.weight_decay}
    rest = [name for name in params if name not in matrices or optim.optimizer == "sgd"]
    groups = [{"params": [params[n] for n in rest if decayed[n]]}]
    groups.append({"params": [params[n] for n in rest if not decayed[n]], "weight_decay": 0.0})
    if optim.optimizer == "sgd":
        return [torch.optim.SGD(groups, momentum=0.9 if optim.momentum is None else optim.momentum, **kept)]
    muon = torch.optim.Muon([params[n] for n in matrices], momentum=0.95, adjust_lr_fn="match_rms_adamw", **kept)
    return [muon, torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps, **kept)]


def followed(engine: Engine, model: str) -> dict[str, torch.Tensor]:
    """Parameters that torch's optimizers update with the engine's gradients whenever the engine does."""
    assert engine.optimizer is not None and engine.gradients is not None
    gradients, step = engine.gradients, engine.optimizer.step
    weights = {name: p.data for name, p in engine.model.named_parameters()}
    params = {name: t.clone().requires_grad_() for name, t, _ in unfused(engine, weights)}
    decayed = {name: is_decayed for name, _, is_decayed in unfused(engine, weights)}
    wanted = oracles(engine.optim, params, decayed, two_dim_names(model))

    def both(*, learning_rate: float, grad_divisor: torch.Tensor, is_bad: torch.Tensor) -> None:
        for name, grad, _ in unfused(engine, gradients.named()):
            params[name].grad = grad / grad_divisor
        for each in wanted:
            each.step()
        step(learning_rate=learning_rate, grad_divisor=grad_divisor, is_bad=is_bad)

    engine.optimizer.step = both  # type: ignore[method-assign]
    return params


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("model", [UNTIED, TIED])
@pytest.mark.parametrize(
    "optim",
    [{"optimizer": "muon"}, {"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.0}],
    ids=lambda optim: "-".join(map(str, optim.values())),
)
def test_ten_steps_are_torch_s(
    optim: dict[str, Any], model: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's Muon multiplies in bf16: here, as ours, in the dtype of the gradients."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    config = OptimConfig(learning_rate=1e-2, max_grad_norm=0.5, weight_decay=0.1, **optim)
    engine = make_engine(Case(model=model, mbs=8, precision=precision), optim=config)
    start = {n: t.clone() for n, t, _ in unfused(engine, {n: p.data for n, p in engine.model.named_parameters()})}
    params = followed(engine, model)
    train(engine, 0, 10)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    growth = GROWTH if optim["optimizer"] == "muon" else 1.0
    allowed = 10 * 1e-2 * tolerance(dtype, magnitude=growth, terms=15 * 48)  # ten updates of elements below 1
    for name, found, _ in unfused(engine, {n: p.data for n, p in engine.model.named_parameters()}):
        assert (found - params[name]).abs().max() < allowed, name
        if precision == "fp64" and not name.endswith("k_proj.bias"):  # softmax does not see it
            assert (found - start[name]).abs().max() > 20 * allowed, f"{name} was not trained"


def test_both_back_ends_of_adamw_do_the_rest() -> None:
    case = Case(model=UNTIED, precision="fp32", optimizer="muon")
    curves = [train(make_engine(case, backends=Backends(forced)), 0, 4) for forced in ({}, {"adamw": "torch"})]
    assert relative_error(*curves) < 1e-5


# -- layouts -----------------------------------------------------------------------------------------------------------

MUON: list[dict[str, Any]] = [
    *({"model": UNTIED, "dp": 2, "zero": zero} for zero in (0, 1, 2)),
    {"model": TIED, "dp": 2, "zero": 1, "mbs": 2},
    {"model": QWEN3, "tp": 2},
    {"model": TIED, "pp": 2},
    {"model": QWEN3, "tp": 2, "dp": 2, "zero": 0},
    {"model": QWEN3, "tp": 4},
    {"model": TIED, "tp": 2, "dp": 2, "zero": 1},
    {"model": QWEN3, "tp": 2, "dp": 2, "zero": 2},
    {"model": UNTIED, "pp": 2, "dp": 2, "zero": 1},
    {"model": UNTIED, "dp": 4, "mbs": 2, "zero": 2, "shard": 2},
    {"model": UNTIED, "dp": 4, "mbs": 2, "zero": 1},
    {"model": UNTIED, "tp": 2, "pp": 2, "dp": 2, "zero": 2},
]
SGD: list[dict[str, Any]] = [
    *({"model": UNTIED, "dp": 2, "zero": zero} for zero in (0, 1, 2, 3)),
    {"model": TIED, "tp": 2, "dp": 2, "zero": 3},
]
LAYOUTS = [*(Case(optimizer="muon", **c) for c in MUON), *(Case(optimizer="sgd", **c) for c in SGD)]


@once
def one_rank(model: str, optimizer: Any) -> Curve:
    return train(make_engine(Case(model=model, optimizer=optimizer)), 0, END)


@once
def curves(world_size: int) -> dict[str, Curve]:
    cases = [case for case in LAYOUTS if case.world_size == world_size]
    return run_ranks(train_cases, world_size, cases, STEPS)[0]


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_the_layout_does_not_change_the_numbers(case: Case) -> None:
    expected = one_rank(case.model, case.optimizer)[:STEPS]
    assert relative_error(curves(case.world_size)[case.name], expected) < 1e-9


def test_columns_that_tp_does_not_divide_are_padded_and_do_not_count() -> None:
    """The library lets them through: intermediate_size 50 is 17, 17 and 16 of 17 columns."""
    found = run_ranks(train_padded, 3)[0]
    assert relative_error(found, train_padded(0, 1)) < 1e-9


def train_padded(rank: int, world_size: int) -> Curve:
    config = MODELS[UNTIED].replace(num_attention_heads=3, num_key_value_heads=3, intermediate_size=50)
    optim = OptimConfig(optimizer="muon", learning_rate=1e-2)
    engine = Engine(config, Mesh.build(tp=world_size), optim=optim, precision="fp64", micro_batch_size=6)
    curve = []
    for step in range(4):
        batch = {name: tensor[:6] for name, tensor in own_batch(step, engine.mesh).items()}
        metrics = engine.train_step(batch, language_model_loss).metrics()
        curve.append((metrics["loss"], metrics["grad_norm"]))
    return curve


# -- what is held and sent ---------------------------------------------------------------------------------------------

COUNTED = [
    Case(model=UNTIED, dp=2, zero=1, optimizer="muon"),
    Case(model=QWEN3, tp=2, precision="fp32", optimizer="muon"),
    Case(model=QWEN3, tp=2, dp=2, zero=2, precision="bf16", optimizer="muon"),
    Case(model=UNTIED, dp=4, mbs=2, zero=2, shard=2, optimizer="muon"),
    Case(model=TIED, pp=2, dp=2, zero=0, optimizer="muon"),
]


def count(rank: int, world_size: int, cases: list[Case]) -> dict[str, dict[str, Any]]:
    """Elements and bytes sent by a step of Muon and of AdamW, and what this rank holds."""
    found = {}
    for case in cases:
        sent = []
        for optimizer in ("muon", "adamw"):
            engine = make_engine(case, optim=OptimConfig(optimizer=optimizer))  # type: ignore[arg-type]
            with engine.mesh.recorder.recording() as recorder:
                engine.train_step(own_batch(0, engine.mesh), language_model_loss)
            axes = ("dp", "shard", "replicate", "tp", "pp", "embedding")
            sent.append({axis: (recorder.bytes(axis), recorder.bytes(axis, "all_to_all")) for axis in axes})
            if optimizer == "muon":
                muon, mesh = engine.optimizer, engine.mesh
        assert isinstance(muon, Muon)
        found[case.name] = {
            "sent": sent,
            "matrices": muon._matrices,
            "place": (mesh.shard.rank if case.zero else 0, mesh.tp.rank),
            "shard": mesh.shard.name,
            "elements": {kind: sum(part.data.numel() for part in parts) for kind, parts in muon.state().items()},
            "bytes": sum(t.untyped_storage().size() for t in [*muon.momentum, *muon.exp_avg, *muon.exp_avg_sq]),
            "trained": sum(stop - start for flat in muon._flats for _, start, stop, _ in flat.parts()),
        }
    return found


@once
def counted(world_size: int) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(count, world_size, [c for c in COUNTED if c.world_size == world_size])


def over_shards(m: Matrix, place: int) -> int:
    held = m.held[place]
    return sum(m.held) - held if m.owner[0] == place else held


def over_tp(m: Matrix, place: tuple[int, int]) -> int:
    slices = [length * m.piece.shape[1 - m.piece.dim] for length in m.lengths]
    if m.owner[0] != place[0]:
        return 0
    return sum(slices) - slices[place[1]] if m.owner[1] == place[1] else slices[place[1]]


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.name)
def test_traffic_is_the_formula_s(case: Case) -> None:
    size = 8 if case.precision == "fp64" else 4
    for of_rank in counted(case.world_size):
        found = of_rank[case.name]
        (shards, tp), matrices = found["place"], found["matrices"]
        expected = {"dp": 0, "shard": 0, "replicate": 0, "tp": 0, "pp": 0, "embedding": 0}
        expected["tp"] = size * sum(over_tp(m, (shards, tp)) for m in matrices)
        expected[found["shard"]] += size * sum(over_shards(m, shards) for m in matrices) if case.zero else 0
        muon, adamw = found["sent"]
        assert {axis: muon[axis][1] for axis in expected} == expected
        assert {axis: muon[axis][0] - adamw[axis][0] for axis in expected} == expected


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.name)
def test_every_matrix_is_cut_among_all_and_owned_by_one(case: Case) -> None:
    ranks = [of_rank[case.name] for of_rank in counted(case.world_size)]
    names = [m.piece.name for rank in ranks for m in rank["matrices"]]
    assert set(names) == two_dim_names(case.model)
    assert all(names.count(name) == case.world_size // case.pp for name in names), "of one pipeline rank, once each"
    assert len({(m.piece.name, m.owner) for rank in ranks for m in rank["matrices"]}) == len(set(names))
    for rank in ranks:
        for m in rank["matrices"]:
            rows, cols = m.piece.shape
            assert sum(m.held) == math.prod(m.stored_shape)
            assert sum(m.lengths) == m.piece.replicas * m.piece.shape[m.piece.dim]
            assert math.prod(m.stored_shape) * case.tp == rows * cols * m.piece.replicas


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.name)
def test_matrices_have_momentum_and_all_else_two_moments(case: Case) -> None:
    for of_rank in counted(case.world_size):
        found = of_rank[case.name]
        place, held = found["place"][0], found["elements"]
        assert held["momentum"] == sum(m.held[place] for m in found["matrices"])
        assert held["exp_avg"] == held["exp_avg_sq"] == found["trained"] - held["momentum"]
        size = 8 if case.precision == "fp64" else 4
        assert found["bytes"] == size * (held["momentum"] + 2 * held["exp_avg"])
        assert held.get("master", found["trained"]) == found["trained"]
        assert ("master" in held) == (case.precision == "bf16")


# -- bad steps and checkpoints -----------------------------------------------------------------------------------------


def bits(engine: Engine) -> list[torch.Tensor]:
    assert engine.optimizer is not None and engine.flat is not None
    engine.flat.settle()
    weights = [(flat.params if flat.is_present else flat.shard).clone() for flat in engine.flat.buckets]
    state = [part.data.clone() for parts in engine.optimizer.state().values() for part in parts]
    count = engine.optimizer.num_steps.clone().view(1)
    return [t.view(torch.int16 if t.dtype == torch.bfloat16 else torch.int32) for t in [*weights, *state, count]]


def take_a_bad_step(rank: int, world_size: int, cases: list[Case]) -> list[tuple[bool, bool]]:
    """(whether nothing changed in the bad step, whether something does in the next one) of each case."""
    found = []
    for case in cases:
        engine = make_engine(case)
        train(engine, 0, 2)
        before = bits(engine)
        engine.train_step(own_batch(2, engine.mesh), spoiled_loss)
        after = bits(engine)
        train(engine, 3, 4)
        last = bits(engine)
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        moved = [not torch.equal(a, b) for a, b in zip(after, last, strict=True) if a.numel() > 99]
        found.append((all(same), all(moved)))
    return found


def spoiled_loss(output: Any, batch: Any) -> Any:
    loss, number, metrics = language_model_loss(output, batch)
    return loss * float("nan"), number, metrics


BAD: dict[int, list[Case]] = {
    1: [Case(model=UNTIED, mbs=8, precision="bf16", optimizer=name) for name in ("muon", "sgd")]
    + [Case(model=UNTIED, mbs=8, precision="fp32", optimizer=name) for name in ("muon", "sgd")],
    4: [Case(model=UNTIED, tp=2, dp=2, zero=1, precision="bf16", optimizer="muon")]
    + [Case(model=UNTIED, tp=2, dp=2, zero=2, precision="bf16", optimizer="sgd")],
}


@pytest.mark.parametrize("world_size", BAD)
def test_a_bad_step_changes_no_bit(world_size: int) -> None:
    for of_rank in run_ranks(take_a_bad_step, world_size, BAD[world_size]):
        assert of_rank == [(True, True)] * len(BAD[world_size])


def resume(rank: int, world_size: int, folder: str, cases: list[Case]) -> list[tuple[Curve, Curve, bool]]:
    """The curve of a run that goes on, of one that stopped and resumed, and whether both end with the same bits."""
    stories = []
    for case in cases:
        engine = make_engine(case)
        train(engine, 0, STOP)
        engine.save(f"{folder}/{case.name}")
        expected = train(engine, STOP, STOP + 2)
        resumed = other_engine(case)
        resumed.load(f"{folder}/{case.name}")
        found = train(resumed, STOP, STOP + 2)
        same = all(torch.equal(a, b) for a, b in zip(bits(engine), bits(resumed), strict=True))
        stories.append((expected, found, same))
    return stories


RESUMED = [
    Case(model=TIED, dp=2, zero=1, precision="bf16", optimizer="muon"),
    Case(model=UNTIED, tp=2, precision="bf16", optimizer="muon"),
    Case(model=UNTIED, dp=2, zero=3, precision="bf16", optimizer="sgd"),
    Case(model=UNTIED, dp=2, zero=1, precision="fp32", optimizer="sgd"),
]


def test_stopping_and_resuming_changes_no_bit(tmp_path: Path) -> None:
    for of_rank in run_ranks(resume, 2, str(tmp_path), RESUMED):
        for expected, found, same in of_rank:
            assert expected == found and same


def reshard(rank: int, world_size: int, folder: str, pairs: list[tuple[Case, Case]]) -> list[dict[str, Any]]:
    """Train STOP steps at one layout and save; load at another and train to END."""
    stories = []
    for number, (before, after) in enumerate(pairs):
        engine = make_engine(before)
        train(engine, 0, STOP)
        engine.save(f"{folder}/{number}")
        saved, resumed = state_parts(engine), other_engine(after)
        resumed.load(f"{folder}/{number}")
        stories.append({"saved": saved, "loaded": state_parts(resumed), "curve": train(resumed, STOP, END)})
    return stories


RESHARDS = [
    (Case(model=QWEN3, tp=4, optimizer="muon"), Case(model=QWEN3, dp=4, mbs=2, zero=2, optimizer="muon")),
    (
        Case(model=TIED, tp=2, dp=2, zero=1, optimizer="muon"),
        Case(model=TIED, pp=2, dp=2, zero=0, optimizer="muon"),
    ),
    (Case(model=UNTIED, dp=4, mbs=2, zero=3, optimizer="sgd"), Case(model=UNTIED, tp=2, pp=2, optimizer="sgd")),
]


def test_state_saved_at_one_layout_and_stage_goes_on_at_another(tmp_path: Path) -> None:
    ranks = run_ranks(reshard, 4, str(tmp_path), RESHARDS)
    for number, (case, _) in enumerate(RESHARDS):
        saved, loaded = (assembled([rank[number][what] for rank in ranks]) for what in ("saved", "loaded"))
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
        momenta = {name.removeprefix("momentum.") for name in saved if name.startswith("momentum.")}
        if case.optimizer == "muon":
            assert momenta == two_dim_names(case.model)
        assert relative_error(ranks[0][number]["curve"], one_rank(case.model, case.optimizer)[STOP:]) < 1e-9


def test_sgd_without_momentum_has_no_state_and_resumes(tmp_path: Path) -> None:
    optim = OptimConfig(optimizer="sgd", momentum=0.0, learning_rate=1e-2)
    engine, resumed = (make_engine(Case(model=UNTIED, mbs=8), optim=optim) for _ in range(2))
    train(engine, 0, 2)
    engine.save(str(tmp_path))
    resumed.load(str(tmp_path))
    assert engine.optimizer is not None and engine.optimizer.state() == {}
    assert train(resumed, 2, 4) == train(engine, 2, 4)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    engine = make_engine(Case(model=QWEN3, mbs=8))
    train(engine, 0, 1)
    engine.save(str(tmp_path))
    muon = make_engine(Case(model=QWEN3, mbs=8, optimizer="muon"))
    with pytest.raises(ValueError, match="was saved with optimizer adamw, this is muon: use that, or load"):
        muon.load(str(tmp_path))
    muon.load(str(tmp_path), weights_only=True)
    state = tmp_path / "step-00000001" / "state.json"
    content = json.loads(state.read_text())
    del content["optimizer"]  # as before there were several
    state.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="was saved with optimizer adamw"):
        muon.load(str(tmp_path))
    other_engine(Case(model=QWEN3, mbs=8)).load(str(tmp_path))


# -- the library's refusals, and whether it learns ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "parallel", "message"),
    [
        ("lion", {}, "optimizer lion does not exist: use adamw, muon or sgd"),
        ("muon", {"zero": 3}, "optimizer muon with zero 3: it needs whole matrices: use zero 1 or 2"),
        ("muon", {"zero": 1, "offload": "optimizer"}, "optimizer muon with offload optimizer: only AdamW"),
        ("sgd", {"offload": "optimizer"}, "optimizer sgd with offload optimizer: only AdamW"),
    ],
)
def test_the_engine_refuses_what_cannot_be(optimizer: Any, parallel: dict[str, Any], message: str) -> None:
    options = {"optim": OptimConfig(optimizer=optimizer), "parallel": ParallelConfig(**parallel)}
    with pytest.raises(ValueError, match=message):
        make_engine(Case(model=QWEN3), **options)
    if optimizer != "lion":
        make_engine(Case(model=QWEN3), train=False, **options)


def test_muon_learns_as_well_as_adamw_at_its_rate() -> None:
    """Counting upwards, 60 steps at 3e-3 in fp32."""
    last = {}
    for name in ("adamw", "muon", "sgd"):
        optim = OptimConfig(optimizer=name, learning_rate=3e-3, weight_decay=OPTIM.weight_decay)  # type: ignore[arg-type]
        curve = train(make_engine(Case(model=UNTIED, mbs=8, precision="fp32"), optim=optim), 0, 60)
        last[name] = sum(loss for loss, _ in curve[-5:]) / 5
    assert last["muon"] < 1.05 * last["adamw"] < 0.95 * last["sgd"]
