"""Scores of a reward model: of responses, and calibrated, so that a usual good response has score 0.

Letters: B sequences, S positions.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megallm.config.serialize import from_plain
from megallm.parallel.collectives import all_reduce_
from megallm.trainers.engine import Engine
from megallm.trainers.evaluate import batches_of_similar_length
from megallm.trainers.losses import Batch
from megallm.trainers.rows import last_values

FILE = "calibration.json"
"""Beside a checkpoint's config.json."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What raw scores are brought to a scale with: (score - mean) / std, where std is asked for."""

    mean: float = 0.0
    std: float = 1.0
    responses: int = 0
    """How many it was measured on."""


def score_responses(
    engine: Engine, sequences: Sequence[Sequence[int]], *, tokens_at_once: int = 4096
) -> list[float]:
    """The value at the last token of each sequence, prompt and response, on every rank. A collective.

    Every sequence is alone in its row. dp ranks share them. ValueError for a model without a scalar head.
    """
    if engine.config.head != "scalar":
        raise ValueError("this is a language model: scores come from a reward model, with a scalar head")
    mesh = engine.mesh
    order = sorted((i for i, ids in enumerate(sequences) if len(ids)), key=lambda i: len(sequences[i]))
    groups = list(batches_of_similar_length(sequences, order[mesh.dp.rank :: mesh.dp.size], tokens_at_once))
    rows = [_rows([sequences[i] for i in members], mesh.tp.size) for members in groups]
    found = torch.zeros(len(sequences), dtype=torch.float64, device=mesh.device)
    for members, scores in zip(groups, engine.forward(rows, last_values), strict=False):
        found[torch.tensor(members, device=mesh.device)] = scores.double()
    return all_reduce_(all_reduce_(found, mesh.dp), mesh.pp).tolist()


def calibrate(engine: Engine, sequences: Sequence[Sequence[int]]) -> Calibration:
    """Mean and standard deviation of the scores of good responses. A collective."""
    scores = score_responses(engine, sequences)
    mean = math.fsum(scores) / len(scores)
    variance = math.fsum((score - mean) ** 2 for score in scores) / len(scores)
    return Calibration(mean=mean, std=math.sqrt(variance) or 1.0, responses=len(scores))


def write_calibration(checkpoint: Path, calibration: Calibration) -> None:
    """Beside the checkpoint's config.json, whole or not at all."""
    partial = checkpoint / (FILE + ".partial")
    partial.write_text(json.dumps(asdict(calibration), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, checkpoint / FILE)


def read_calibration(checkpoint: Path) -> Calibration:
    """That of a checkpoint, or of a directory exported from one; one that changes nothing if it has none."""
    file = checkpoint / FILE
    if not file.is_file():
        return Calibration()
    try:
        return from_plain(Calibration, json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): copy it again, remove it, or give --raw") from error


def _rows(sequences: Sequence[Sequence[int]], multiple: int) -> Batch:
    longest = max(len(ids) for ids in sequences)
    input_ids = torch.zeros(len(sequences), longest + -longest % multiple, dtype=torch.int64)
    for row, ids in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.as_tensor(ids)
    lengths = torch.tensor([len(ids) for ids in sequences])
    is_last = torch.arange(input_ids.size(1)) == lengths.unsqueeze(1) - 1
    return {"input_ids": input_ids, "lengths": lengths, "output_mask": is_last}
