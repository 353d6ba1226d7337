"""Prompts with their answers as rows, and what models say of every token of them.

A rollout is small beside a model: every rank has all of it, on the CPU. What a model computes is shared over its data-
parallel ranks and gathered, so that models on meshes of their own need not know of each other, and means, groups and
permutations are over all answers without anybody asking.

Letters: N answers, S places of the longest row. What is of a token stands where that token is the label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megallm.parallel.collectives import all_reduce_
from megallm.parallel.logprobs import IGNORE_INDEX, VocabLogits
from megallm.parallel.mesh import Mesh
from megallm.trainers.engine import Engine
from megallm.trainers.evaluate import batches_of_similar_length
from megallm.trainers.losses import Batch


def answer_rows(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Batch:
    """input_ids, labels int64 [N, S], lengths int64 [N]: labels are the answers' tokens, at the places before them."""
    lengths = torch.tensor([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)])
    input_ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        input_ids[row, : lengths[row]] = torch.tensor([*prompt, *answer])
        labels[row, len(prompt) - 1 : lengths[row] - 1] = torch.tensor(answer, dtype=torch.int64)
    return {"input_ids": input_ids, "labels": labels, "lengths": lengths}


def is_answer(rows: Batch) -> torch.Tensor:
    """[N, S] bool: where the tokens of the answers are predicted."""
    return rows["labels"] != IGNORE_INDEX


def choose_rows(rows: Batch, index: torch.Tensor, *, multiple: int = 1) -> Batch:
    """Those at `index`, as wide as the longest of them, rounded up to a multiple."""
    width = rows["input_ids"].size(1)
    longest = int(rows["lengths"][index].max())
    needed = longest + -longest % multiple
    chosen = {}
    for name, tensor in rows.items():
        part = tensor[index]
        if tensor.dim() == 2 and tensor.size(1) == width:
            fill = IGNORE_INDEX if name == "labels" else 0
            part = torch.nn.functional.pad(part[:, :needed], (0, max(0, needed - width)), value=fill)
        chosen[name] = part
    return chosen


def own_rows(rows: Batch, mesh: Mesh) -> Batch:
    """A minibatch's rows for this data-parallel rank, as many on each: dealt by length, so that all have as much to do.

    Their number is a multiple of dp. What is computed of them is what losses read: `output_mask`, where labels are.
    """
    order = rows["lengths"].argsort(descending=True, stable=True).view(-1, mesh.dp.size)
    order[1::2] = order[1::2].flip(1)
    chosen = choose_rows(rows, order[:, mesh.dp.rank], multiple=mesh.tp.size)
    return chosen | {"output_mask": is_answer(chosen)}


def each_token(
    engine: Engine,
    rows: Batch,
    fn: Callable[[Any, Batch], Sequence[torch.Tensor]],
    *,
    num_outputs: int = 1,
    tokens_at_once: int,
) -> list[torch.Tensor]:
    """What `fn(output, microbatch)` says of every label, [N, S] each, fp32 (fp64 of an fp64 model), on all ranks.

    Of other tokens it may be anything, beyond the rows' lengths it is 0. Microbatches have up to `tokens_at_once`
    places, or one row. A collective.
    """
    mesh, lengths = engine.mesh, rows["lengths"]
    dtype = torch.float64 if engine.model.dtype == torch.float64 else torch.float32
    order = lengths.argsort(stable=True)[mesh.dp.rank :: mesh.dp.size].tolist()
    spans = [range(length) for length in lengths.tolist()]
    groups = [torch.tensor(each) for each in batches_of_similar_length(spans, order, tokens_at_once)]
    rows = rows | {"output_mask": is_answer(rows)}
    batches = [choose_rows(rows, members, multiple=mesh.tp.size) for members in groups]
    found = torch.zeros(num_outputs, *rows["input_ids"].shape, dtype=dtype)
    is_token = torch.arange(rows["input_ids"].size(1)) < lengths.unsqueeze(1)
    for members, outputs in zip(groups, engine.forward(batches, fn), strict=False):
        own = is_token[members]
        for number, output in enumerate(outputs):
            laid = output.detach().flatten()[: int(own.sum())].to("cpu", dtype)
            found[number, members] = torch.zeros(own.shape, dtype=dtype).masked_scatter(own, laid)
    found = found.to(mesh.device)
    return list(all_reduce_(all_reduce_(found, mesh.dp), mesh.pp).cpu().unbind(0))


def logprobs_and_entropy(
    engine: Engine, rows: Batch, *, temperature: float, tokens_at_once: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p(label), entropy) [N, S] at the temperature. A collective."""

    def fn(logits: VocabLogits, batch: Batch) -> Sequence[torch.Tensor]:
        return logits.tempered(temperature).logprobs_and_entropy(batch["labels"])

    logprobs, entropy = each_token(engine, rows, fn, num_outputs=2, tokens_at_once=tokens_at_once)
    return logprobs, entropy


def token_logprobs(engine: Engine, rows: Batch, *, temperature: float, tokens_at_once: int) -> torch.Tensor:
    """log p(label) [N, S] at the temperature. A collective."""

    def fn(logits: VocabLogits, batch: Batch) -> Sequence[torch.Tensor]:
        return (logits.tempered(temperature).token_logprobs(batch["labels"]),)

    return each_token(engine, rows, fn, tokens_at_once=tokens_at_once)[0]


def token_values(engine: Engine, rows: Batch, *, tokens_at_once: int) -> torch.Tensor:
    """A critic's values [N, S] of what stands before each label; 0 elsewhere. A collective."""
    found = each_token(engine, rows, lambda values, batch: (values,), tokens_at_once=tokens_at_once)[0]
    return torch.where(is_answer(rows), found, 0.0)
