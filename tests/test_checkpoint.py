"""Checkpoints: a resumed run is the run that never stopped, on the same layout to the bit, on another to rounding.

Each function at the top is one story that all ranks live through; the tests below tell what must hold in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gathered import Part, assembled, parts_of
from training_cases import GOLDEN, MODELS, SEQ, VOCAB, Case, make_engine, once, own_batch, train

from megallm.checkpoint import sharded
from megallm.checkpoint.sharded import TrainState, latest, load, read_full_tensors, read_model_config, save
from megallm.config.numerics import NumericsConfig
from megallm.model.counts import parameter_shapes
from megallm.testing.pool import run_ranks
from megallm.trainers.engine import Engine

UNTIED, TIED, QWEN2, QWEN3 = list(MODELS)[:4]
STOP, END = 3, 8

RESUMES = [
    Case(model=UNTIED, precision="fp32"),
    Case(model=UNTIED, precision="bf16"),
    Case(model=TIED, precision="bf16", tp=2),
    Case(model=QWEN2, precision="fp32", pp=2, v=2),
    Case(model=TIED, precision="fp32", tp=2, pp=2),
    Case(model=QWEN3, precision="bf16", tp=4),
    Case(model=TIED, precision="bf16", pp=2, dp=2),
    Case(model=UNTIED, precision="bf16", dp=2, zero=1),
    Case(model=TIED, precision="bf16", dp=2, zero=2),
    Case(model=UNTIED, precision="bf16", dp=2, zero=3),
    Case(model=TIED, precision="fp32", pp=2, dp=2, zero=3),
    Case(model=QWEN2, precision="bf16", dp=4, zero=2, shard=2, mbs=2),
    Case(model=UNTIED, precision="fp16"),
    Case(model=TIED, precision="fp16", dp=2, zero=2),
    Case(model=UNTIED, precision="fp32", dp=2, zero=1, offload="optimizer"),
    Case(model=TIED, precision="bf16", dp=2, zero=3, offload="optimizer+params"),
]
RESHARDS = [
    (Case(model=TIED, tp=2, pp=2), Case(model=TIED, pp=2, v=2, dp=2, mbs=2)),
    (Case(model=TIED, pp=4), Case(model=TIED, tp=2, dp=2)),
    (Case(model=QWEN3, tp=4), Case(model=QWEN3, tp=2, sp=False, dp=2)),
    (Case(model=QWEN3, dp=4, mbs=2), Case(model=QWEN3, tp=4)),
    (Case(model=QWEN2, pp=2, v=2, dp=2, mbs=2), Case(model=QWEN2, pp=4)),
    (Case(model=UNTIED, tp=4), Case(model=UNTIED, pp=4)),
    (Case(model=UNTIED, tp=2, pp=2, v=2), Case(model=UNTIED, tp=2, dp=2)),
    (Case(model=TIED, dp=4, mbs=2, zero=3), Case(model=TIED, tp=2, pp=2)),
    (Case(model=QWEN3, tp=2, dp=2, zero=2), Case(model=QWEN3, dp=4, mbs=2, zero=1)),
    (Case(model=QWEN2, pp=2, dp=2, v=2, mbs=2, zero=1), Case(model=QWEN2, dp=4, mbs=2, zero=3)),
    (Case(model=TIED, tp=2, pp=2), Case(model=TIED, tp=2, dp=2, zero=3)),
    (Case(model=UNTIED, dp=4, mbs=2, zero=2, shard=2), Case(model=UNTIED, pp=2, dp=2, zero=2)),
    (Case(model=TIED, dp=4, mbs=2, zero=3, offload="optimizer+params"), Case(model=TIED, tp=2, dp=2, zero=1)),
    (Case(model=QWEN2, pp=2, dp=2, mbs=2), Case(model=QWEN2, tp=2, dp=2, zero=2, offload="optimizer")),
]
EVERY_PAIR = pytest.mark.parametrize(
    "number", range(len(RESHARDS)), ids=lambda n: f"{RESHARDS[n][0].name}-to-{RESHARDS[n][1].name}"
)
Curve = list[tuple[float, float]]


def state_parts(engine: Engine) -> list[Part]:
    """Weights and optimizer state of this rank, optimizer tensors named kind.NAME."""
    assert engine.optimizer is not None
    slices = sharded.weight_slices(engine.model, engine.flat)
    for kind, parts in engine.optimizer.state().items():
        slices += sharded._part_slices(engine.model, parts, prefix=f"{kind}.", is_owner=False)
    return [Part(s.name, s.shape, s.start, s.data.clone()) for s in slices]


def masters_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Of one rank, flat."""
    assert engine.optimizer is not None
    return {part.name: part.data for part in engine.optimizer.state()["master"]}


def scaled_engine(case: Case) -> Engine:
    """In fp16 with a loss scale that begins too high, and grows as soon as it fits."""
    if case.precision != "fp16":
        return make_engine(case)
    scaling = {"loss_scale": 2.0**24, "loss_scale_window": 2, "loss_scale_hysteresis": 1}
    return make_engine(case, precision=NumericsConfig(precision="fp16", **scaling))  # type: ignore[arg-type]


def scale_of(engine: Engine) -> list[float]:
    assert engine.optimizer is not None
    return [] if engine.optimizer.loss_scale is None else engine.optimizer.loss_scale.state()


def other_engine(case: Case) -> Engine:
    """An engine whose weights are those of another seed, so that nothing is right by chance."""
    engine = scaled_engine(case)
    assert engine.flat is not None
    for names in engine.flat.refill():
        engine.model.initialize(99, names=names)
    return engine


def resume_stories(rank: int, world: int, folder: str, cases: list[Case]) -> dict[str, dict[str, Any]]:
    """Train STOP steps, save, train to END; in a new engine load and train to END."""
    stories = {}
    for case in cases:
        engine = scaled_engine(case)
        scales = [scale_of(engine)]
        train(engine, 0, STOP)
        scales.append(scale_of(engine))
        where = f"{folder}/{case.name}"
        engine.save(where, consumed_samples=STOP * 8, tokens=STOP * 8 * SEQ)
        expected = train(engine, STOP, END)
        scales.append(scale_of(engine))
        resumed = other_engine(case)
        state = resumed.load(where)
        stories[case.name] = {
            "state": (state.step, state.consumed_samples, state.tokens, resumed.step),
            "curves": (expected, train(resumed, STOP, END)),
            "parts": (state_parts(engine), state_parts(resumed)),
            "scales": (scales, scale_of(resumed)),
        }
    return stories


def reshard_stories(rank: int, world: int, folder: str, pairs: list[tuple[Case, Case]]) -> list[dict[str, Any]]:
    """Train STOP steps at one layout and save; load at another and train to END."""
    stories = []
    for number, (before, after) in enumerate(pairs):
        engine = make_engine(before)
        train(engine, 0, STOP)
        engine.save(f"{folder}/{number}")
        saved = state_parts(engine)
        resumed = other_engine(after)
        resumed.load(f"{folder}/{number}")
        loaded = state_parts(resumed)
        stories.append({"saved": saved, "loaded": loaded, "curve": train(resumed, STOP, END)})
    return stories


def load_and_train(rank: int, world: int, folder: str, case: Case) -> Curve:
    engine = other_engine(case)
    engine.load(folder)
    return train(engine, STOP, END)


def golden(model: str) -> Curve:
    content = json.loads((GOLDEN / f"{model}.json").read_text())
    return list(zip(content["loss"], content["grad_norm"], strict=True))


def relative_error(actual: Curve, expected: Curve) -> float:
    pairs = [(a, e) for x, y in zip(actual, expected, strict=True) for a, e in zip(x, y, strict=True)]
    return max(abs(a / e - 1.0) for a, e in pairs)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @once
    def stories(world: int) -> list[dict[str, dict[str, Any]]]:
        folder, cases = tmp_path_factory.mktemp(f"resume{world}"), [c for c in RESUMES if c.world_size == world]
        return run_ranks(resume_stories, world, str(folder), cases)

    return lambda case: [of_rank[case.name] for of_rank in stories(case.world_size)]


@pytest.fixture(scope="module")
def reshard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reshard")


@pytest.fixture(scope="module")
def resharded(reshard_folder: Path) -> list[list[dict[str, Any]]]:
    return run_ranks(reshard_stories, 4, str(reshard_folder), RESHARDS)


def outputs(engine: Engine) -> list[float]:
    batch = own_batch(0, engine.mesh)
    return [float(loss) for loss in engine.forward(batch, lambda out, part: out.cross_entropy(part["labels"]).sum())]


@pytest.mark.parametrize("offload", ["none", "optimizer+params"])
def test_loading_replaces_whole_layers_that_a_forward_left(offload: Any, tmp_path: Path) -> None:
    case = Case(model=TIED, zero=3, offload=offload, mbs=2)
    trained, fresh = make_engine(case), make_engine(case)
    train(trained, 0, 2)
    trained.save(str(tmp_path))
    before = outputs(fresh)
    fresh.load(str(tmp_path))
    assert outputs(fresh) == outputs(trained) != before


@pytest.fixture
def engine() -> Engine:
    return make_engine(Case(model=QWEN3, mbs=8))


def trained_state(step: int) -> TrainState:
    return TrainState(step=step, consumed_samples=0, tokens=0)


@pytest.mark.parametrize("case", RESUMES, ids=lambda case: case.name)
def test_stopping_and_resuming_changes_no_bit(case: Case, resumed: Any) -> None:
    for story in resumed(case):
        assert repr(story["curves"][0]) == repr(story["curves"][1])  # so that nan, of a bad step, equals nan
        for expected, actual in zip(*story["parts"], strict=True):
            assert actual.name == expected.name
            assert torch.equal(actual.data, expected.data), expected.name


@pytest.mark.parametrize("case", [c for c in RESUMES if c.precision == "fp16"], ids=lambda case: case.name)
def test_the_loss_scale_goes_on_where_it_was(case: Case, resumed: Any) -> None:
    for story in resumed(case):
        (first, stopped, ended), resumed_end = story["scales"]
        assert len({first[0], stopped[0], ended[0]}) == 3, "the scale moves before the stop and after it"
        assert resumed_end == ended


@pytest.mark.parametrize("case", RESUMES, ids=lambda case: case.name)
def test_loading_tells_where_the_run_stood(case: Case, resumed: Any) -> None:
    for story in resumed(case):
        assert story["state"] == (STOP, STOP * 8, STOP * 8 * SEQ, STOP)


@EVERY_PAIR
def test_weights_and_optimizer_state_survive_a_change_of_layout(number: int, resharded: Any) -> None:
    saved = assembled([of_rank[number]["saved"] for of_rank in resharded])
    loaded = assembled([of_rank[number]["loaded"] for of_rank in resharded])
    assert saved.keys() == loaded.keys()
    assert {name.split(".")[0] for name in saved} >= {"model", "exp_avg", "exp_avg_sq"}
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), name


@EVERY_PAIR
def test_a_run_resumed_at_another_layout_follows_the_one_rank_curve(number: int, resharded: Any) -> None:
    expected = golden(RESHARDS[number][0].model)[STOP:END]
    assert relative_error(resharded[0][number]["curve"], expected) < 1e-9


@pytest.mark.parametrize("number", [0, 2, 4])
def test_a_checkpoint_of_four_ranks_resumes_on_one_and_on_two(
    number: int, resharded: Any, reshard_folder: Path
) -> None:
    model, folder = RESHARDS[number][0].model, str(reshard_folder / str(number))
    curves = [load_and_train(0, 1, folder, Case(model=model))]
    curves.append(run_ranks(load_and_train, 2, folder, Case(model=model, tp=2))[0])
    for curve in curves:
        assert relative_error(curve, golden(model)[STOP:END]) < 1e-9


@EVERY_PAIR
def test_whole_tensors_read_without_ranks_are_the_gathered_weights(
    number: int, resharded: Any, reshard_folder: Path
) -> None:
    folder = latest(reshard_folder / str(number))
    assert folder is not None
    tensors = dict(read_full_tensors(folder))
    saved = assembled([of_rank[number]["saved"] for of_rank in resharded])
    model = MODELS[RESHARDS[number][0].model]
    assert {name: tuple(t.shape) for name, t in tensors.items()} == parameter_shapes(model)
    assert read_model_config(folder) == model
    for name, tensor in tensors.items():
        assert torch.equal(tensor, saved[name]), name


def test_a_checkpoint_holds_no_pickle(resharded: Any, reshard_folder: Path) -> None:
    suffixes = {path.suffix for path in reshard_folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}


def test_an_fp32_run_takes_the_master_weights_of_a_bf16_checkpoint(tmp_path: Path) -> None:
    half = make_engine(Case(model=UNTIED, precision="bf16"))
    train(half, 0, STOP)
    half.save(str(tmp_path))
    full = other_engine(Case(model=UNTIED, precision="fp32"))
    full.load(str(tmp_path))
    masters = masters_of(half)
    for name, parameter in full.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter.data.view(-1), masters[name]), name
    assert any((p != p.bfloat16()).any() for p in full.model.parameters()), "the masters were rounded"


def test_a_bf16_run_takes_the_weights_of_an_fp32_checkpoint_as_masters(tmp_path: Path) -> None:
    full = make_engine(Case(model=UNTIED, precision="fp32"))
    train(full, 0, STOP)
    full.save(str(tmp_path))
    half = other_engine(Case(model=UNTIED, precision="bf16"))
    half.load(str(tmp_path))
    masters, weights = masters_of(half), dict(full.model.named_parameters())
    for name, parameter in half.model.named_parameters():
        assert torch.equal(parameter.data, weights[name].data.bfloat16()), name
        assert torch.equal(masters[name].bfloat16(), parameter.data.view(-1)), name


def test_weights_only_starts_a_new_run_from_the_weights(engine: Engine, tmp_path: Path) -> None:
    train(engine, 0, 2)
    engine.save(str(tmp_path))
    fresh = other_engine(Case(model=QWEN3))
    fresh.load(str(tmp_path), weights_only=True)
    assert fresh.step == 0 and fresh.optimizer is not None and float(fresh.optimizer.num_steps) == 0
    for (name, actual), expected in zip(fresh.model.named_parameters(), engine.model.parameters(), strict=True):
        assert torch.equal(actual, expected), name
    assert not any(t.any() for t in fresh.optimizer.exp_avg)


def test_a_crash_while_saving_leaves_the_older_checkpoint_the_latest(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = save(tmp_path, engine.model, engine.optimizer, trained_state(1))
    written = sharded._save_part

    def crash_at_the_optimizer(directory: Path, *args: Any) -> None:
        if directory.name == "optimizer":
            raise OSError("no space left on device")
        written(directory, *args)

    with monkeypatch.context() as patch:
        patch.setattr(sharded, "_save_part", crash_at_the_optimizer)
        with pytest.raises(OSError, match="no space left"):
            save(tmp_path, engine.model, engine.optimizer, trained_state(2))
    assert (tmp_path / "step-00000002.partial").is_dir()
    assert latest(tmp_path) == older
    newer = save(tmp_path, engine.model, engine.optimizer, trained_state(2))
    assert latest(tmp_path) == newer
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_latest_skips_leftovers_and_is_none_without_a_complete_one(engine: Engine, tmp_path: Path) -> None:
    assert latest(tmp_path / "nowhere") is None
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "step-00000010.partial").mkdir()
    (tmp_path / "step-00000010.partial" / "state.json").write_text("{}")
    assert latest(tmp_path) is None
    with pytest.raises(ValueError, match="no complete checkpoint"):
        engine.load(str(tmp_path))
    saved = save(tmp_path, engine.model, None, trained_state(3))
    assert latest(tmp_path) == saved and latest(saved) == saved


def test_saving_a_step_again_replaces_it(engine: Engine, tmp_path: Path) -> None:
    save(tmp_path, engine.model, engine.optimizer, trained_state(1))
    engine.model.initialize(5)
    where = save(tmp_path, engine.model, engine.optimizer, trained_state(1))
    weights = assembled([parts_of(engine.model, {n: p.data for n, p in engine.model.named_parameters()})])
    for name, tensor in read_full_tensors(where):
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 10]), (1, [10]), (2, [3, 10]), (9, [1, 2, 3, 10])])
def test_only_the_newest_checkpoints_are_kept(engine: Engine, tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, engine.model, None, trained_state(step), keep=keep)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{step:08d}" for step in left]


def test_pruning_counts_complete_checkpoints_only(engine: Engine, tmp_path: Path) -> None:
    """A directory without state.json is no checkpoint: it must not push out one that is."""
    save(tmp_path, engine.model, None, trained_state(1))
    (tmp_path / "step-00000005").mkdir()
    save(tmp_path, engine.model, None, trained_state(2), keep=2)
    assert (tmp_path / "step-00000001" / "state.json").is_file()


def test_a_checkpoint_of_another_model_is_refused_by_the_names_of_its_fields(tmp_path: Path) -> None:
    where = save(tmp_path, make_engine(Case(model=QWEN3)).model, None, trained_state(1))
    other = MODELS[QWEN3].replace(intermediate_size=56, rope_theta=5e5)
    engine = Engine(other, make_engine(Case(model=QWEN3)).mesh, train=False)
    with pytest.raises(ValueError, match=r"intermediate_size, rope_theta differ"):
        load(where, engine.model)


def test_optimizer_state_that_is_not_there_is_refused(engine: Engine, tmp_path: Path) -> None:
    where = save(tmp_path, engine.model, None, trained_state(1))
    with pytest.raises(ValueError, match="no optimizer state"):
        load(where, engine.model, engine.optimizer)


def test_damaged_files_are_named_with_the_way_out(engine: Engine, tmp_path: Path) -> None:
    where = save(tmp_path, engine.model, None, trained_state(1))
    shard = next((where / "model").glob("*.safetensors"))
    whole = shard.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:20], b""):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{shard.name} is damaged or was cut off .*: copy the checkpoint again"):
            load(where, engine.model)
    shard.write_bytes(whole)
    for name, content, words in (
        ("config.json", "{", "is damaged, not JSON"),
        ("config.json", "[]", "is damaged, not a JSON object"),
        ("config.json", "{}", "has no key model"),
        ("config.json", '{"model": {"hidden_sise": 3}}', "unknown key 'hidden_sise'"),
        ("state.json", "", "is damaged, not JSON"),
    ):
        kept = (where / name).read_text()
        (where / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name}.*{words}.*: copy the checkpoint again, or give another step"):
            load(where, engine.model)
        (where / name).write_text(kept)


def test_the_vocabulary_is_saved_without_padding(resharded: Any, reshard_folder: Path) -> None:
    folder = latest(reshard_folder / "5")
    assert folder is not None
    shapes = {name: tensor.shape for name, tensor in read_full_tensors(folder)}
    assert shapes["model.embed_tokens.weight"][0] == shapes["lm_head.weight"][0] == VOCAB
