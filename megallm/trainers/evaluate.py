"""Losses without training: of a validation set, and of single documents.

Letters: B sequences, S positions, T tokens, D documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from megallm.parallel.collectives import all_reduce_, broadcast_text
from megallm.parallel.logprobs import IGNORE_INDEX, VocabLogits
from megallm.trainers.engine import Engine
from megallm.trainers.losses import Batch, LossFunction, language_model_loss
from megallm.trainers.rows import row_sums


def validation_loss(engine: Engine, batches: Iterable[Batch]) -> float:
    """Mean cross-entropy, nats, over the labels of all batches and dp ranks. A collective over the whole mesh."""
    return validation_metrics(engine, batches, language_model_loss)["loss"]


def validation_metrics(engine: Engine, batches: Iterable[Batch], loss_fn: LossFunction) -> dict[str, float]:
    """`loss` and the loss function's own metrics, as means over what it counts in all batches of all dp ranks.

    nan where it counts nothing. A collective over the whole mesh.
    """
    mesh = engine.mesh
    totals: dict[str, torch.Tensor] = {}
    for batch in batches:
        for loss_sum, count, metrics in engine.forward(batch, loss_fn):
            for name, value in {"loss": loss_sum, "count": count, **metrics}.items():
                totals[name] = totals.get(name, 0.0) + value.double()
    own = "\n".join(sorted(totals))
    names = broadcast_text(own, mesh.pp, mesh.device, src=engine.last_stage_rank).split("\n")
    if names == [""]:  # no batch
        return {"loss": float("nan")}
    zero = torch.zeros((), dtype=torch.float64, device=mesh.device)
    sums = torch.stack([totals.get(name, zero) for name in names])
    sums = all_reduce_(all_reduce_(sums, mesh.dp), mesh.pp)
    found = dict(zip(names, sums.tolist(), strict=True))
    number = found.pop("count")
    return {name: value / number if number else float("nan") for name, value in found.items()}


def score_documents(
    engine: Engine,
    documents: Sequence[Sequence[int]],
    *,
    starts: Sequence[int] | None = None,
    tokens_at_once: int = 4096,
) -> list[tuple[float, int]]:
    """(summed negative log-likelihood in nats, scored tokens) of each document, each token given those before it.

    starts: the first token of each document that is scored, at least 1; None = 1 everywhere.
    Every document is alone in its row, so nothing else can influence it. dp ranks share the documents; the result is
    on every rank. A collective.
    """
    config, mesh = engine.config, engine.mesh
    for index, ids in enumerate(documents):
        if ids and (min(ids) < 0 or max(ids) >= config.vocab_size):
            raise ValueError(
                f"document {index} has token id {max(ids)}, but the model's vocabulary has {config.vocab_size} ids"
            )
        if config.position_embedding == "learned" and len(ids) - 1 > config.max_position_embeddings:
            raise ValueError(
                f"document {index} has {len(ids)} tokens, but the model has learned {config.max_position_embeddings} "
                "positions: split it"
            )
    order = sorted((i for i, ids in enumerate(documents) if len(ids) > 1), key=lambda i: len(documents[i]))
    own = order[mesh.dp.rank :: mesh.dp.size]
    groups = batches_of_similar_length(documents, own, tokens_at_once)
    first = [1] * len(documents) if starts is None else starts
    rows = [
        (members, _padded([documents[i] for i in members], [first[i] for i in members], mesh.tp.size))
        for members in groups
    ]
    sums = torch.zeros(len(documents), dtype=torch.float64, device=mesh.device)
    results = engine.forward([batch for _, batch in rows], _row_losses)
    for (members, _), losses in zip(rows, results, strict=False):
        sums[torch.tensor(members, device=mesh.device)] = losses[: len(members)].double()
    all_reduce_(all_reduce_(sums, mesh.dp), mesh.pp)
    return [
        (total, max(len(ids) - start, 0)) for total, ids, start in zip(sums.tolist(), documents, first, strict=True)
    ]


def _row_losses(logits: VocabLogits, batch: Batch) -> torch.Tensor:
    """[B]: summed cross-entropy of each row."""
    return row_sums(logits.cross_entropy(batch["labels"]), batch)


def batches_of_similar_length(
    sequences: Sequence[Sequence[int]], order: Sequence[int], tokens_at_once: int
) -> Iterator[list[int]]:
    """Places of sequences, `order` cut into parts: those of one, padded to its last, have at most `tokens_at_once`."""
    members: list[int] = []
    for index in order:
        if members and (len(members) + 1) * len(sequences[index]) > tokens_at_once:
            yield members
            members = []
        members.append(index)
    if members:
        yield members


def _padded(rows: Sequence[Sequence[int]], starts: Sequence[int], multiple: int) -> Batch:
    longest = max(len(row) for row in rows) - 1
    width = longest + -longest % multiple
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORE_INDEX, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids = torch.tensor(row)
        input_ids[i, : len(row) - 1] = ids[:-1]
        labels[i, starts[i] - 1 : len(row) - 1] = ids[starts[i] :]
    return {
        "input_ids": input_ids, "labels": labels, "lengths": torch.tensor([len(row) - 1 for row in rows]),
        "output_mask": labels != IGNORE_INDEX,
    }  # fmt: skip
