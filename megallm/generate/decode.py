"""Prefill and decode on the weights that train, under any tp x pp: one forward a step, for whatever sequences are live.

    prefill   new prompts end to end as documents, without padding      cache: all their positions
    decode    one token of every live sequence                          cache: one position each
    each forward goes stage after stage around the pipeline; the last stage's tp ranks gather the logits of one position
    a sequence and choose the same tokens, and the last pipeline rank tells the others

All ranks of a replica then know the same tokens, and plan the next step from them alone (scheduler.py): they never have
to ask each other whether to go on. Replicas (dp) go their own way.

A step of decoding reads its inputs where the last one has left them, in buffers made once, up to the tokens that it
chooses; its sizes are the number of rows and of cells. A recorder (replay.py) repeats it by these two.

Rows are rounded up to a multiple of 4: on some CPUs (docs/generation.md), a row of a product then has the same bits
whatever rows are beside it, and a sample those bits whatever it is decoded with (one alone in its rollout takes 1 row
instead, half the time, and may differ in last bits). Where steps are recorded there are 1, 2, 4, 8, ... rows on GPUs.

Letters: B live sequences, T tokens of a forward, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch

from megallm.data.tokenizer import Tokenizer
from megallm.generate.cache import PagedCache
from megallm.generate.replay import Direct, Recorder, Run, bucket
from megallm.generate.sampling import Sampling, choose
from megallm.generate.scheduler import CachePlan, Request, Scheduler
from megallm.generate.text import TextStream
from megallm.model.context import TokenContext
from megallm.model.transformer import Transformer
from megallm.ops.documents import Documents
from megallm.parallel import random
from megallm.parallel.collectives import broadcast_
from megallm.parallel.logprobs import VocabLogits
from megallm.parallel.p2p import Message, post
from megallm.parallel.products import Switch

FinishReason = Literal["stop", "length", "stop_string"]
_ROWS = 4


class Token(NamedTuple):
    """A token that a step has made."""

    request: int
    """Whose: its number in the list of requests."""
    token_id: int
    logprob: float
    finish_reason: FinishReason | None
    """Why the sequence ends with it; None = it goes on."""


class Decoder:
    """Decodes requests on one replica; `step` until `is_done`. Every call is a collective over tp and pp."""

    def __init__(
        self,
        model: Transformer,
        requests: Sequence[Request],
        sampling: Sampling,
        plan: CachePlan,
        *,
        prefill_tokens: int,
        tokenizer: Tokenizer | None = None,
        copies: Switch | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """copies: turned on while decoding. recorder: of the steps of decoding; None = they are called."""
        self._copies = Switch() if copies is None else copies
        self._recorder: Recorder = Direct() if recorder is None else recorder
        self._steps: dict[tuple[int, int, bool], Run] = {}
        self._held: list[torch.Tensor] = []
        self._model, self._requests, self._sampling, self._tokenizer = model, requests, sampling, tokenizer
        self._scheduler = Scheduler(plan, requests, prefill_tokens)
        device = model.mesh.device
        several = _ROWS if plan.num_slots > 1 and device.type == "cpu" else 1
        self._multiple = math.lcm(several, model.mesh.tp.size)
        slots = self._num_slots = self._rounded(plan.num_slots)
        like = torch.empty(0, dtype=model.dtype, device=device)
        self._cache = PagedCache(
            num_slots=slots,
            num_pages=slots if plan.is_whole else plan.num_pages + 1,
            page_size=plan.page_size,
            num_cells=plan.num_cells,
            window=model.config.sliding_window,
            dtype=model.dtype,
            device=device,
            reads_pages=model.backends.pick("decode_attention", like, model.config.head_dim) == "triton",
        )
        self._num_positions = max(self._multiple, *(each.max_length for each in requests))
        self._stops = frozenset(sampling.stop_ids)
        self._num_new = [0] * len(requests)
        self._texts: dict[int, TextStream] = {}
        # Of each slot: the last token and its position, the sample's key, the tokens that it has.
        self._tokens, self._positions, self._keys = torch.zeros(3, slots, dtype=torch.int64, device=device)
        self._found = torch.zeros(slots, 2, dtype=torch.float64, device=device)  # its token id and log-probability
        self._last_owner = (model.num_stages - 1) % model.mesh.pp.size
        self._seen: torch.Tensor | None = None
        if model.mesh.pp.rank == self._last_owner and sampling.repetition_penalty != 1.0:
            self._seen = torch.zeros(slots, model.config.vocab_size, dtype=torch.bool, device=device)

    @property
    def is_done(self) -> bool:
        """Whether every request has ended."""
        return self._scheduler.is_done

    @torch.no_grad()
    def step(self) -> list[Token]:
        """One forward: of prompts if some can begin, else of the live sequences. The new tokens, on every rank."""
        live = self._scheduler.live
        first = len(live)
        if pages := self._scheduler.admit():
            self._prefill(first, pages)
        else:
            first = 0
            self._decode(len(live))
        return self._take(self._found[first : len(live)].tolist(), first)

    def _prefill(self, first: int, pages: Sequence[Sequence[int]]) -> None:
        """Reads the prompts of the slots from `first` on, and chooses what comes behind them."""
        device = self._model.mesh.device
        for slot, own in enumerate(pages, start=first):
            self._start(slot, self._requests[self._scheduler.live[slot]])
            self._cache.assign(slot, own)
        prompts = [self._requests[number].prompt for number in self._scheduler.live[first:]]
        lengths = [len(prompt) for prompt in prompts]
        self._cache.start_prefill(first, lengths)
        used = sum(lengths)
        padding = self._rounded(used) - used
        sizes = [*lengths, *([padding] if padding else [])]
        offsets = torch.tensor([0, *sizes]).cumsum(0)
        context = TokenContext(
            batch_size=1,
            seq_length=used + padding,
            position_ids=torch.cat([torch.arange(size) for size in sizes]).to(device),
            num_positions=self._num_positions,
            documents=Documents(tuple(sizes), offsets.to(device=device, dtype=torch.int32)),
            cache=self._cache,
        )
        ids = torch.tensor([token for prompt in prompts for token in prompt] + [0] * padding, device=device)
        logits = forward(self._model, ids, context, at=offsets[1 : len(lengths) + 1].to(device) - 1)
        self._choose(logits, slice(first, first + len(lengths)))

    def _start(self, slot: int, request: Request) -> None:
        """The slot's own numbers."""
        key = random.key(self._sampling.seed, "sample", request.prompt_index, request.sample_index)
        self._positions[slot], self._keys[slot] = len(request.prompt) - 1, random.signed(key)
        if self._seen is not None:
            self._seen[slot] = False
            self._seen[slot, torch.tensor(request.prompt, device=self._seen.device)] = True

    def _decode(self, num_live: int) -> None:
        """Chooses what comes behind the live sequences' last tokens."""
        few = self._recorder.is_recording
        rows = self._rounded(num_live)
        if few:
            rows = self._rounded(bucket(rows, least=1, most=self._num_slots))
        if num_live < rows:
            self._positions[num_live:rows] = 0
        longest = max(len(self._requests[i].prompt) + self._num_new[i] for i in self._scheduler.live)
        visible = self._cache.visible_cells(longest, are_few=few)
        sizes = (rows, visible, self._model.has_adapters_off)
        if not few:
            self._run(rows, visible)
        elif sizes in self._steps:
            self._steps[sizes]()
        else:
            self._held += self._model.rotary_tables()  # a longer one may take their place, not their memory
            self._steps[sizes] = self._recorder.record(partial(self._run, rows, visible))

    def _run(self, rows: int, visible: int) -> None:
        """One step of the first slots, which may be recorded: it depends on its sizes and on buffers alone."""
        positions = self._positions[:rows]
        self._cache.start_decode(positions, visible=visible)
        context = TokenContext(
            batch_size=rows,
            seq_length=1,
            position_ids=positions,
            num_positions=self._num_positions,
            cache=self._cache,
        )
        self._copies.is_on = True
        try:
            logits = forward(self._model, self._tokens[:rows], context)
        finally:
            self._copies.is_on = False
        self._choose(logits, slice(0, rows))

    def _choose(self, logits: torch.Tensor | None, slots: slice) -> None:
        """The slots' next tokens and log-probabilities, from a row of logits each, on every rank."""
        found, positions = self._found[slots], self._positions[slots]
        positions += 1
        if logits is not None:
            keys = self._keys[slots] if self._sampling.temperature > 0.0 else None
            seen = None if self._seen is None else self._seen[slots]
            tokens, logprobs = choose(logits, self._sampling, keys=keys, positions=positions, seen=seen)
            found[:, 0].copy_(tokens)
            found[:, 1].copy_(logprobs)
            if seen is not None:
                seen.scatter_(1, tokens.unsqueeze(1), True)
        broadcast_(found, self._model.mesh.pp, src=self._last_owner)
        self._tokens[slots].copy_(found[:, 0])

    def _take(self, found: list[list[float]], first: int) -> list[Token]:
        """The new tokens; sequences that end leave their slots."""
        tokens = []
        for number, (token, logprob) in zip(self._scheduler.live[first:], found, strict=True):
            if math.isnan(logprob):
                index = self._requests[number].prompt_index
                raise ValueError(f"the logits behind prompt {index} are not finite: broken weights, or an overflow")
            self._num_new[number] += 1
            tokens.append(Token(number, int(token), logprob, self._finish_reason(number, int(token))))
        for at in range(len(tokens) - 1, -1, -1):
            if tokens[at].finish_reason is not None:
                self._end(first + at)
        return tokens

    def _finish_reason(self, number: int, token: int) -> FinishReason | None:
        if token in self._stops:
            return "stop"
        if self._sampling.stop_strings:
            assert self._tokenizer is not None
            if number not in self._texts:
                self._texts[number] = TextStream(self._tokenizer, self._sampling.stop_strings)
            self._texts[number].push(token)
            if self._texts[number].is_stopped:
                return "stop_string"
        return "length" if self._num_new[number] == self._requests[number].max_new_tokens else None

    def _end(self, slot: int) -> None:
        self._texts.pop(self._scheduler.live[slot], None)
        source = self._scheduler.end(slot)
        if source is None:
            self._cache.release(slot)
            return
        self._cache.move(source, slot)
        self._cache.release(source)
        for each in (self._tokens, self._positions, self._keys, self._seen):
            if each is not None:
                each[slot] = each[source]

    def _rounded(self, rows: int) -> int:
        return -(-rows // self._multiple) * self._multiple


def forward(
    model: Transformer, input_ids: torch.Tensor, context: TokenContext, *, at: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Logits [T, V] fp32 behind the tokens input_ids [T], or those of the tokens `at` alone, on the last pipeline rank;
    None elsewhere. A collective over tp and pp."""
    pp, tokens = model.mesh.pp, input_ids.size(0)
    if model.sequence_parallel:
        tokens //= model.mesh.tp.size
    x, out = input_ids, None
    for index in range(model.num_stages):
        if index % pp.size != pp.rank:
            continue
        if index > 0 and pp.size > 1:
            x = torch.empty(tokens, model.config.hidden_size, dtype=model.dtype, device=model.mesh.device)
            _transfer(model, x, (index - 1) % pp.size, is_send=False, tag=index)
        out = model.stage(index)(x, context)
        if index < model.num_stages - 1:
            assert isinstance(out, torch.Tensor)
            x = out
            if pp.size > 1:
                _transfer(model, x, (index + 1) % pp.size, is_send=True, tag=index + 1)
    if not isinstance(out, VocabLogits):
        return None
    return (out if at is None else out.of_tokens(at)).gathered()


def _transfer(model: Transformer, x: torch.Tensor, peer: int, *, is_send: bool, tag: int) -> None:
    for work in post([Message(x.contiguous() if is_send else x, peer, is_send, tag)], model.mesh.pp):
        work.wait()
