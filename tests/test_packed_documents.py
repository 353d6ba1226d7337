"""Packed documents: each is computed as if it were alone, whatever lies beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training_cases import MODELS, VOCAB, Case, make_engine

from megallm.ops.backends import Backends
from megallm.ops.documents import Documents
from megallm.testing.pool import run_ranks
from megallm.trainers.engine import Engine
from megallm.trainers.losses import language_model_loss

UNTIED, TIED, QWEN2, QWEN3 = list(MODELS)[:4]
LENGTHS = [[5, 2, 9], [16], [1, 14, 1], [7, 9]]
CASES = [
    *(Case(model=model, mbs=2) for model in (UNTIED, TIED, QWEN2, QWEN3)),
    Case(model=UNTIED, mbs=4, recompute="selective"),
    Case(model=TIED, mbs=1, recompute="full"),
]


def packed_batch(*, dropout: bool = False) -> dict[str, torch.Tensor]:
    """Four sequences of 16 tokens; the first token of a document is nobody's label."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCAB, (4, 16), generator=generator)
    labels = torch.full_like(ids, -100)
    positions, documents = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for number, length in enumerate(lengths):
            stop = start + length
            labels[row, start : stop - 1] = ids[row, start + 1 : stop]
            positions[row, start:stop] = torch.arange(length)
            documents[row, start:stop] = number
            start = stop
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "document_ids": documents}


def one_by_one(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Every document as a batch of its own."""
    found = []
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            found.append({name: batch[name][row : row + 1, part] for name in ("input_ids", "labels")})
            start += length
    return found


def losses(engine: Engine, batches: Any) -> torch.Tensor:
    """Of every token, flat."""
    found = engine.forward(batches, lambda logits, part: logits.cross_entropy(part["labels"]).flatten())
    return torch.cat(found)


def without_dropout(case: Case, **options: Any) -> Engine:
    config = MODELS[case.model].replace(hidden_dropout=0.0, attention_dropout=0.0)
    engine = make_engine(case, **options)
    return engine if config == engine.config else Engine(
        config, engine.mesh, optim=engine.optim, micro_batch_size=case.mbs, precision=case.precision, seed=engine.seed
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_and_gradients_are_those_of_documents_alone(case: Case) -> None:
    batch = packed_batch()
    engine = without_dropout(case)
    torch.testing.assert_close(losses(engine, batch), losses(engine, one_by_one(batch)), rtol=1e-12, atol=1e-12)
    packed = engine.train_step(batch, language_model_loss).metrics()
    assert engine.gradients is not None
    gradients = {name: grad.clone() for name, grad in engine.gradients.named().items()}

    padded = {"input_ids": torch.zeros(9, 16, dtype=torch.int64), "labels": torch.full((9, 16), -100)}
    for row, document in enumerate(one_by_one(batch)):
        for name, values in document.items():
            padded[name][row, : values.size(1)] = values[0]
    alone = without_dropout(Case(model=case.model, mbs=3))
    metrics = alone.train_step(padded, language_model_loss).metrics()
    assert packed["loss"] == pytest.approx(metrics["loss"], rel=1e-12)
    assert packed["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-11)
    assert alone.gradients is not None
    for name, grad in alone.gradients.named().items():
        torch.testing.assert_close(gradients[name], grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [UNTIED, TIED, QWEN3])
def test_not_a_bit_of_a_document_depends_on_another(model: str, precision: Any) -> None:
    batch = packed_batch()
    engine = without_dropout(Case(model=model, mbs=4, precision=precision))
    before = losses(engine, batch)
    batch["input_ids"][0, 5:7] = (batch["input_ids"][0, 5:7] + 1) % VOCAB  # the second document of the first sequence
    batch["input_ids"][3, :7] = 3
    batch["labels"][0, 5] = batch["input_ids"][0, 6]
    after = losses(engine, batch)
    others = torch.ones(4, 16, dtype=torch.bool)
    others[0, 5:7], others[3, :7] = False, False
    assert torch.equal(before.view(4, 16)[others], after.view(4, 16)[others])
    assert not torch.equal(before.view(4, 16)[~others], after.view(4, 16)[~others])


def test_attention_dropout_drops_within_documents() -> None:
    """With masks of its own a packed sequence is another sample: it trains, and repeats itself."""
    first, again = (
        make_engine(Case(model=TIED, mbs=2)).train_step(packed_batch(), language_model_loss).metrics() for _ in range(2)
    )
    assert first == again


def test_triton_sees_the_same_documents() -> None:
    batch = packed_batch()
    kernels = Backends({"attention": "triton"})
    case = Case(model=UNTIED, mbs=2, precision="fp32")
    expected, found = make_engine(case), make_engine(case, backends=kernels)
    torch.testing.assert_close(losses(found, batch), losses(expected, batch), rtol=1e-5, atol=1e-5)
    expected_norm = expected.train_step(batch, language_model_loss).metrics()["grad_norm"]
    assert found.train_step(batch, language_model_loss).metrics()["grad_norm"] == pytest.approx(expected_norm, rel=1e-4)


def packed_curve(rank: int, world_size: int, cases: list[Case]) -> list[list[tuple[float, float]]]:
    found = []
    for case in cases:
        engine, curve = make_engine(case), []
        for _ in range(3):
            whole = packed_batch()
            own = {name: t.chunk(engine.mesh.dp.size)[engine.mesh.dp.rank] for name, t in whole.items()}
            metrics = engine.train_step(own, language_model_loss).metrics()
            curve.append((metrics["loss"], metrics["grad_norm"]))
        found.append(curve)
    return found


def test_layouts_agree_on_packed_documents() -> None:
    layouts = [
        Case(model=UNTIED, tp=2, mbs=2), Case(model=UNTIED, pp=2, mbs=1), Case(model=UNTIED, dp=2, mbs=1, zero=3),
        Case(model=UNTIED, pp=2, v=2, mbs=2), Case(model=UNTIED, tp=2, sp=False, mbs=4),
    ]  # fmt: skip
    (one,) = packed_curve(0, 1, [Case(model=UNTIED, mbs=4)])
    for ranks in run_ranks(packed_curve, 2, layouts, timeout=120.0):
        for curve in ranks:
            for step, expected in zip(curve, one, strict=True):
                assert step == pytest.approx(expected, rel=1e-9)


def test_documents_are_runs_of_equal_numbers() -> None:
    documents = Documents.of(torch.tensor([[4, 4, 7, 7, 7], [7, 1, 4, 4, 4]]))
    assert documents.lengths == (2, 3, 1, 1, 3) and documents.longest == 3
    assert documents.offsets.tolist() == [0, 2, 5, 6, 7, 10]
