"""Keys and values of the tokens seen so far, in pages that sequences get and give back.

    pool, a layer     [ page 0 | page 1 | page 2 | page 3 | ... ]      a page: K heads x `page_size` cells x D
    table             slot 0: 2 0 3      slot 1: 1 4 -                 pages of each slot, in order

The key of position p lies in cell p mod R of its slot. R is the longest sequence; under a sliding window it is the
window, rounded up to pages, so that a new token takes the cell of one that has left the window.

If one page holds a whole sequence and slot i has page i, attention reads the pool where it lies. Else it gathers the
slots' pages first: on CPU that takes about as long as attention itself (fp32, 32 sequences of 160 tokens, 4 heads of
32: 2 x 154 against 326 us), so pages are that long whenever the memory allowed is enough for it (scheduler.py).

Decoding reads and writes what was made before, at the same addresses in every step: it can be recorded (replay.py).

Letters: B sequences, T tokens, L cells, N query heads, K key/value heads of this rank, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megallm.generate.replay import bucket
from megallm.ops.decode_attention import dense_decode_attention, paged_decode_attention

_FEWEST_CELLS = 256
"""That a step reads where numbers are to be few: 256, 512, 1024, ..."""


class PagedCache:
    """The cache of one rank. The pools are made when a layer's first prompts come."""

    def __init__(
        self,
        *,
        num_slots: int,
        num_pages: int,
        page_size: int,
        num_cells: int,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
        reads_pages: bool = False,
    ) -> None:
        """num_cells: R, a multiple of page_size. Slots that no sequence has write to page 0 of a pool of pages, or to
        their own one. dtype: of queries, keys and values. reads_pages: attention is Triton's, to pages where they
        lie; it needs to know nothing but the table and the positions, and reads no cell beyond them."""
        self._page_size, self._num_cells, self._window = page_size, num_cells, window
        self._is_whole, self._reads_pages = page_size == num_cells, reads_pages
        self._num_pages = num_pages
        self._pools: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._table = torch.zeros(num_slots, num_cells // page_size, dtype=torch.int64, device=device)
        if self._is_whole:
            self._table[:, 0] = torch.arange(num_slots, device=device)
        self._cells = torch.arange(num_cells, device=device)
        self._slots = torch.arange(num_slots, device=device)
        self._device = device
        # Of the next forward's tokens: where their keys go, and which of a prompt's are kept.
        self._kept: torch.Tensor | None = None
        self._pages = self._offsets = self._slots
        # Of the next decoding: where each slot writes, and what is added to its scores.
        self._row_pages, self._row_offsets = torch.zeros(2, num_slots, dtype=torch.int64, device=device)
        self._bias = torch.zeros(num_slots, 0 if reads_pages else num_cells, dtype=dtype, device=device)
        self._positions = self._slots
        self._rows = self._visible = 0

    def assign(self, slot: int, pages: Sequence[int]) -> None:
        """The slot has these pages from now on."""
        if not self._is_whole:
            self._table[slot] = 0
            self._table[slot, : len(pages)] = torch.tensor(pages, device=self._device)

    def release(self, slot: int) -> None:
        """The slot has no pages any more: what is written to it goes to nobody's."""
        if not self._is_whole:
            self._table[slot] = 0

    def move(self, source: int, target: int) -> None:
        """The sequence in slot `source` is in slot `target` from now on."""
        if self._is_whole:
            for pools in self._pools.values():
                for pool in pools:
                    pool[target].copy_(pool[source])
        else:
            self._table[target] = self._table[source]

    def start_prefill(self, first_slot: int, lengths: Sequence[int]) -> None:
        """The next forward has whole prompts end to end, of the slots from `first_slot` on."""
        slots, positions, tokens, start = [], [], [], 0
        for slot, length in enumerate(lengths, start=first_slot):
            kept = torch.arange(max(0, length - self._num_cells), length)
            slots.append(torch.full_like(kept, slot))
            positions.append(kept)
            tokens.append(kept + start)
            start += length
        self._kept = torch.cat(tokens).to(self._device)
        self._pages = rows = torch.cat(slots).to(self._device)
        self._offsets = torch.cat(positions).to(self._device) % self._num_cells
        if not self._is_whole:
            self._pages = self._table[rows, self._offsets // self._page_size]
            self._offsets = self._offsets % self._page_size

    def visible_cells(self, longest: int, *, are_few: bool) -> int:
        """How many cells a step reads of sequences below `longest` tokens; `are_few`: of few different numbers.

        Cells beyond a sequence are read and weigh 0. Sixteens: the others' sums do not depend on their number then.
        """
        step = self._page_size if not self._is_whole else 16
        needed = min(self._num_cells, -(-longest // step) * step)
        if self._reads_pages:
            return self._num_cells  # one number: it does not matter
        if not are_few:
            return needed
        return bucket(needed, least=-(-_FEWEST_CELLS // step) * step, most=self._num_cells)

    def start_decode(self, positions: torch.Tensor, *, visible: int) -> None:
        """The next forward has one token of each of the first B slots, at positions [B], and reads `visible` cells."""
        self._rows, self._visible, self._kept, self._positions = positions.size(0), visible, None, positions
        self._pages, self._offsets = self._row_pages[: self._rows], self._row_offsets[: self._rows]
        torch.remainder(positions, self._num_cells, out=self._offsets)
        if self._is_whole:
            self._pages.copy_(self._slots[: self._rows])
        else:
            page = (self._offsets // self._page_size).unsqueeze(1)
            self._pages.copy_(self._table[: self._rows].gather(1, page).squeeze(1))
            self._offsets.remainder_(self._page_size)
        if self._reads_pages:
            return
        cells, at = self._cells[:visible], positions.unsqueeze(1)
        if self._window is None:
            is_hidden = cells > at
        else:
            age = (at - cells) % self._num_cells  # of the newest position that a cell can hold
            is_hidden = (age > at) | (age >= self._window)
        self._bias[: self._rows, :visible].zero_().masked_fill_(is_hidden, -torch.inf)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
        """Stores k and v [T, K, D] of the tokens; attention of q [T, N, D] to the cache, [T, N * D].

        None for prompts, whose tokens see each other only: attention is the caller's.
        """
        if layer not in self._pools:
            assert self._kept is not None  # what is recorded would make it again and again
            shape = (self._num_pages, k.size(1), self._page_size, k.size(2))
            self._pools[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        keys, values = self._pools[layer]
        if self._kept is not None:
            k, v = k[self._kept], v[self._kept]
        keys[self._pages, :, self._offsets] = k
        values[self._pages, :, self._offsets] = v
        if self._kept is not None:
            return None
        if self._reads_pages:
            table = self._table[: self._rows]
            return paged_decode_attention(q, keys, values, table, self._positions, window=self._window)
        bias = self._bias[: self._rows, : self._visible].unsqueeze(1)
        return dense_decode_attention(q, self._visible_part(keys), self._visible_part(values), bias)

    def _visible_part(self, pool: torch.Tensor) -> torch.Tensor:
        """[B, K, L, D] of pool [pages, K, page_size, D]."""
        if self._is_whole:
            return pool[: self._rows, :, : self._visible]
        pages = self._table[: self._rows, : self._visible // self._page_size]  # [B, P]
        gathered = pool.index_select(0, pages.reshape(-1)).view(*pages.shape, *pool.shape[1:])  # [B, P, K, size, D]
        return gathered.transpose(1, 2).reshape(self._rows, pool.size(1), self._visible, pool.size(3))
