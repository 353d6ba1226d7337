"""Rows of unlike lengths laid end to end: a microbatch of B rows as one sequence without padding between them.

    [ a a a . . ]
    [ b b b b b ]   ->   [ a a a b b b b b c c . . ]        row_offsets  0 3 8 10
    [ c c . . . ]

Each row attends to itself alone, at positions from 0. What is per token, [B, S], becomes [1, T]; what is per row stays.

Letters: B rows, S positions, T tokens with the padding at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megallm.ops.documents import Documents
from megallm.parallel.logprobs import IGNORE_INDEX

ROW_OFFSETS = "row_offsets"


def lay_end_to_end(batch: dict[str, torch.Tensor], multiple: int) -> tuple[dict[str, torch.Tensor], Documents]:
    """`batch` with `lengths` [B] as one sequence, and its rows as documents; T is a multiple of `multiple`.

    Adds `row_offsets` [B + 1] int64, where rows begin and the last one ends, and `position_ids` [1, T].
    """
    shape, lengths = batch["input_ids"].shape, batch["lengths"]
    is_token = torch.arange(shape[1], device=lengths.device) < lengths.unsqueeze(1)  # [B, S]
    sizes = lengths.tolist()
    used = sum(sizes)
    padding = max(1, -(-used // multiple)) * multiple - used
    sizes = [size for size in [*sizes, padding] if size]
    laid = {}
    for name, tensor in batch.items():
        if tensor.shape == shape:
            fill = IGNORE_INDEX if name == "labels" else 0
            tensor = F.pad(tensor[is_token], (0, padding), value=fill).unsqueeze(0)
        laid[name] = tensor
    laid[ROW_OFFSETS] = F.pad(lengths.cumsum(0), (1, 0))
    laid["position_ids"] = torch.cat([torch.arange(size) for size in sizes]).unsqueeze(0)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return laid, Documents(tuple(sizes), offsets.to(torch.int32))


def row_sums(values: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B]: the sum of each row of values [B, S] or, of rows end to end, [1, T]. Differentiable."""
    if ROW_OFFSETS not in batch:
        return values.sum(dim=1)
    flat = values.flatten()
    offsets = F.pad(batch[ROW_OFFSETS], (0, 1), value=flat.numel())  # the padding is one more
    return torch.segment_reduce(flat, "sum", offsets=offsets)[:-1]


def row_means(values: torch.Tensor, mask: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B]: the mean of each row over the mask, both as in `row_sums`; 0 where a row has nothing. Differentiable."""
    count = row_sums(mask.to(values.dtype), batch)
    return row_sums(torch.where(mask, values, 0.0), batch) / count.clamp(min=1)


def per_token(values: torch.Tensor, batch: dict[str, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """values [B] at every token of their rows, [B, S] or, of rows end to end, [1, T] with 0 in the padding."""
    if ROW_OFFSETS not in batch:
        return values.unsqueeze(1).expand(like.shape)
    ends = F.pad(batch[ROW_OFFSETS], (0, 1), value=like.numel())
    return F.pad(values, (0, 1)).repeat_interleave(ends.diff(), output_size=like.numel()).view(like.shape)


def last_values(values: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B]: the value at each row's last real token, found by its place and never by its id; values as in `row_sums`."""
    if ROW_OFFSETS not in batch:
        return values.gather(1, (batch["lengths"] - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    return values.flatten()[(batch[ROW_OFFSETS][1:] - 1).clamp(min=0)]
