"""Checks of decoding's attention: head dims, pages and whole sequences, windows in rings that have gone around.

Letters: B sequences, N query heads, K kv heads, D head dim, P pages a sequence.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from gpu_parts.checks import CheckUnit
from gpu_parts.compare import TF32X3, UNIT, Finding, compare, identical, poisoned
from gpu_parts.place import Place

NUM_CELLS, GROUP = 4096, 4
"""Cells of a sequence, and query heads of a kv head: settings of a launch follow from them."""


def units(place: Place) -> list[CheckUnit]:
    """Each head dim in pages; whole sequences, windows and fp32 at some."""
    found = []
    for dim in (64,) if place.tiny else (64, 80, 96, 128, 256):
        found.append(CheckUnit(op="decode_attention", name=f"D {dim}", run=partial(_decode, dim=dim)))
        window = partial(_decode, dim=dim, window=place.pick(300, 5))
        found.append(CheckUnit(op="decode_attention", name=f"D {dim} window", run=window))
    for dim in (64,) if place.tiny else (64, 128):
        whole = partial(_decode, dim=dim, is_whole=True)
        found.append(CheckUnit(op="decode_attention", name=f"D {dim} one page", run=whole))
        wide = partial(_decode, dim=dim, dtype=torch.float32)
        found.append(CheckUnit(op="decode_attention", name=f"D {dim} fp32", run=wide))
    return found


def _decode(
    place: Place, generator: torch.Generator, *, dim: int, window: int = 0, is_whole: bool = False,
    dtype: torch.dtype | None = None,
) -> list[Finding]:  # fmt: skip
    """Sequences of one token, of some, of all cells and beyond; cells that nobody has written are NaN."""
    from megallm.ops.decode_attention import decode_attention_reference
    from megallm_kernels.decode_attention import decode_attention

    num_cells, kv_heads = place.pick(NUM_CELLS, 64), 2
    page_size = num_cells if is_whole else place.pick(256, 16)
    ends = [0, 1, num_cells // 3, num_cells - 1]
    if window:
        ends += [num_cells, 2 * num_cells + num_cells // 5]  # the ring has gone around
    at = torch.tensor(ends, device=place.device)
    pages = num_cells // page_size
    order = torch.randperm(len(ends) * pages, generator=generator, device=place.device)
    table = order.view(len(ends), pages)
    shape = (len(ends) * pages, kv_heads, page_size, dim)
    keys, values = (place.normal(*shape, generator=generator, dtype=dtype) for _ in range(2))
    q = place.normal(len(ends), kv_heads * GROUP, dim, generator=generator, dtype=dtype)
    reference = decode_attention_reference(
        q.double(), keys.double(), values.double(), table, at, window=window or None
    ).view(q.shape)
    is_written = torch.arange(num_cells, device=place.device) <= at.unsqueeze(1)
    for pool in (keys, values):
        cells = pool[table].transpose(2, 3)  # [B, P, cells, K, D], a copy
        cells[~is_written.view(len(ends), pages, page_size)] = float("nan")
        pool[table] = cells.transpose(2, 3)
    results = []
    for _ in range(2):
        with poisoned():
            results.append(decode_attention(q, keys, values, table, at, window, 1.0 / math.sqrt(dim)))
    wide = TF32X3 if q.dtype == torch.float32 and place.is_cuda else UNIT[torch.float32]
    terms = num_cells if place.is_cuda or q.dtype != torch.float32 else 16 * num_cells
    return [
        compare("out", results[0], reference, roundings=2, terms=terms, wide=wide),
        identical("out", *results),
    ]
