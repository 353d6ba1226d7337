"""Which sequences are decoded together: continuous batching, as a plan without tensors.

    waiting   [ 7 8 9 ... ]                    in order
    slots     [ 4 | 0 | 6 | 3 ]                live sequences, always the first slots
                    ^ ends: the last one (3) moves into its slot, 7 gets the slot and the pages that are free

A sequence is admitted when a slot and all pages that it can ever need are free: none that has begun is interrupted.
All ranks of a replica make the same plan, since it depends on nothing but the requests and on which sequences ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from megallm.config.rules import round_up

_PAGE_TOKENS = 32
"""Of pages that several make up a sequence: half a page a sequence is lost."""
_WHOLE_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sample to make."""

    prompt_index: int
    sample_index: int
    prompt: Sequence[int]
    max_new_tokens: int

    @property
    def max_length(self) -> int:
        """Positions it can fill."""
        return len(self.prompt) + self.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Slots and pages of one replica."""

    num_slots: int
    """Sequences decoded together at most."""
    page_size: int
    """Tokens of a page."""
    num_pages: int
    """That sequences can have."""
    num_cells: int
    """Tokens that a sequence keeps at most, a multiple of page_size."""

    @property
    def is_whole(self) -> bool:
        """Whether one page holds a sequence."""
        return self.page_size == self.num_cells

    def pages_of(self, length: int) -> int:
        """Pages of a sequence that can have this length."""
        return -(-min(length, self.num_cells) // self.page_size)


def plan_cache(
    longest: int, num_requests: int, *, max_batch: int, kv_cache_tokens: int | None, sliding_window: int | None
) -> CachePlan:
    """The plan for requests of at most `longest` positions. ValueError if kv_cache_tokens cannot hold one of them.

    kv_cache_tokens: keys and values that may be kept at a time, in tokens of a layer; None = what max_batch sequences
    of the longest need. If it is enough for that, a page holds a whole sequence.
    """
    if max_batch < 1:
        raise ValueError(f"max_batch ({max_batch}) must be at least 1")
    kept = longest if sliding_window is None else min(longest, sliding_window)
    num_slots, whole = min(max_batch, num_requests), round_up(kept, _WHOLE_MULTIPLE)
    if kv_cache_tokens is None or num_slots * whole <= kv_cache_tokens:
        return CachePlan(num_slots=num_slots, page_size=whole, num_pages=num_slots, num_cells=whole)
    cells = round_up(kept, _PAGE_TOKENS)
    if kv_cache_tokens < cells:
        raise ValueError(
            f"kv_cache_tokens ({kv_cache_tokens}) are too few for the longest prompt with its new tokens: "
            f"give {cells} or more"
        )
    num_pages = kv_cache_tokens // _PAGE_TOKENS
    return CachePlan(
        num_slots=min(num_slots, num_pages), page_size=_PAGE_TOKENS, num_pages=num_pages, num_cells=cells
    )


@dataclass
class Scheduler:
    """Gives slots and pages to requests."""

    plan: CachePlan
    requests: Sequence[Request]
    prefill_tokens: int
    """Prompts are taken together up to so many tokens; a longer one is taken alone."""
    live: list[int] = field(default_factory=list)
    """The request in each slot: numbers in `requests`."""

    def __post_init__(self) -> None:
        self._waiting = deque(range(len(self.requests)))
        self._pages: list[list[int]] = []
        self._free = list(range(self.plan.num_pages, 0, -1))  # page 0 is nobody's

    @property
    def is_done(self) -> bool:
        """Whether every request has ended."""
        return not self._waiting and not self.live

    def admit(self) -> list[list[int]]:
        """The pages of the requests that now begin, in the slots behind the live ones; often empty."""
        admitted: list[list[int]] = []
        tokens = 0
        while self._waiting and len(self.live) < self.plan.num_slots:
            request = self.requests[self._waiting[0]]
            needed = self.plan.pages_of(request.max_length)
            tokens += len(request.prompt)
            if needed > len(self._free) or (admitted and tokens > self.prefill_tokens):
                break
            pages = [self._free.pop() for _ in range(needed)]
            self.live.append(self._waiting.popleft())
            self._pages.append(pages)
            admitted.append(pages)
        return admitted

    def end(self, slot: int) -> int | None:
        """Frees the slot and its pages; the slot whose sequence moves into it, None if it was the last one."""
        self._free += self._pages[slot]
        last, pages = self.live.pop(), self._pages.pop()
        if slot == len(self.live):
            return None
        self.live[slot], self._pages[slot] = last, pages
        return len(self.live)
