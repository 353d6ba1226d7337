"""The engine as a downstream trainer uses it: two meshes in a process, overlapped reductions, plain refusals."""

from __future__ import annotations

import pytest
import torch
from training_cases import MODELS, OPTIM, Case, global_batch, make_engine, train

from megallm.config.parallel import ParallelConfig
from megallm.optim.gradients import Gradients
from megallm.parallel import Engine, Mesh
from megallm.parallel.logprobs import VocabLogits
from megallm.testing.pool import run_ranks
from megallm.trainers.losses import language_model_loss

UNTIED, TIED = list(MODELS)[:2]


def two_engines_in_turns(rank: int, world_size: int) -> tuple[list, list]:  # type: ignore[type-arg]
    """Two engines on the same four ranks, on different meshes, stepping in turns."""
    wide = make_engine(Case(model=UNTIED, tp=4))
    deep = make_engine(Case(model=TIED, pp=2, dp=2, v=2, mbs=1))
    curves: tuple[list, list] = ([], [])  # type: ignore[type-arg]
    for step in range(3):
        curves[0].extend(train(wide, step, step + 1))
        curves[1].extend(train(deep, step, step + 1))
    return curves


def test_two_meshes_live_in_one_process() -> None:
    together = run_ranks(two_engines_in_turns, 4)[0]
    alone = [train(make_engine(Case(model=model)), 0, 3) for model in (UNTIED, TIED)]
    for got, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-9, atol=0.0)


def test_full_buckets_are_reduced_while_backward_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MODELS[UNTIED]
    engine = Engine(config, Mesh.build(), parallel=ParallelConfig(bucket_size=2000), optim=OPTIM, micro_batch_size=8)
    assert engine.gradients is not None
    num_buckets = len(engine.gradients.buckets)
    events: list[str] = []
    reduce, finish = Gradients._reduce, Gradients.finish
    monkeypatch.setattr(Gradients, "_reduce", lambda self, i: (events.append(f"reduce {i}"), reduce(self, i))[1])
    monkeypatch.setattr(Gradients, "finish", lambda self: (events.append("finish"), finish(self))[1])

    def watch(module: torch.nn.Module, args: object, out: torch.Tensor) -> None:
        out.register_hook(lambda grad: events.append("backward reached the embedding"))

    engine.model.stage(0).embed_tokens.register_forward_hook(watch)
    engine.train_step(global_batch(0), language_model_loss)
    assert num_buckets > 4
    assert events.index("reduce 0") < events.index("backward reached the embedding")
    assert events.count("finish") == 1 and events[-1] == "finish"
    assert [e for e in events if e.startswith("reduce")] == [f"reduce {i}" for i in range(num_buckets)]


def test_loss_metrics_are_divided_like_the_loss() -> None:
    engine = make_engine(Case(model=UNTIED, mbs=2))

    def loss(logits: VocabLogits, batch: dict[str, torch.Tensor]):  # type: ignore[no-untyped-def]
        loss_sum, count, _ = language_model_loss(logits, batch)
        return loss_sum, count, {"twice": 2 * loss_sum}

    metrics = engine.train_step(global_batch(0), loss).metrics()
    assert metrics["twice"] == pytest.approx(2 * metrics["loss"])


def test_scalar_head_gives_one_value_a_token_on_every_layout() -> None:
    expected = values_of(0, 1, 1, 1)
    assert expected is not None and expected.shape == (8, 16)
    for tp, pp in ((2, 1), (1, 2), (2, 2)):
        got = [v for v in run_ranks(values_of, tp * pp, tp, pp) if v is not None]
        for values in got:
            torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)


def values_of(rank: int, world_size: int, tp: int, pp: int) -> torch.Tensor | None:
    """Values [8, 16] on the ranks of the last stage."""
    config = MODELS[UNTIED].replace(head="scalar")
    engine = Engine(config, Mesh.build(tp=tp, pp=pp), precision="fp64", micro_batch_size=4, seed=5, train=False)
    values = engine.forward({"input_ids": global_batch(0)["input_ids"]}, lambda out, batch: out)
    return torch.cat(values) if values else None


def test_a_batch_that_does_not_split_is_refused() -> None:
    engine = make_engine(Case(model=UNTIED, mbs=3))
    with pytest.raises(ValueError, match="8 sequences is not a multiple of micro_batch_size"):
        engine.train_step(global_batch(0), language_model_loss)


def test_an_engine_without_optimizer_does_not_train() -> None:
    engine = Engine(MODELS[UNTIED], Mesh.build(), train=False)
    with pytest.raises(ValueError, match="train=True"):
        engine.train_step(global_batch(0), language_model_loss)


def test_bf16_with_fp32_master_weights_follows_fp32() -> None:
    # bf16 rounds to 8 bits: a loss of 4.6 summed from rounded activations stays within 2^-8 relative.
    bf16 = train(make_engine(Case(model=UNTIED, precision="bf16")), 0, 4)
    fp32 = train(make_engine(Case(model=UNTIED, precision="fp32")), 0, 4)
    for (got, _), (expected, _) in zip(bf16, fp32, strict=True):
        assert got == pytest.approx(expected, rel=2**-8)
