"""Sampling and its filters against independent implementations, stop strings in text, the plan of slots and pages."""

from __future__ import annotations

import itertools
import math
from random import Random
from typing import Any

import pytest
import torch

from megallm.data.tokenizer import byte_tokenizer, char_tokenizer, train_bpe
from megallm.generate.cache import PagedCache
from megallm.generate.sampling import Sampling, choose
from megallm.generate.scheduler import Request, Scheduler, plan_cache
from megallm.generate.text import TextStream, cut_text, with_special_stops
from megallm.parallel import random

V = 40
FILTERS = {
    "temperature": Sampling(temperature=0.7),
    "top_k": Sampling(temperature=1.0, top_k=5),
    "top_k of all": Sampling(temperature=1.0, top_k=V + 3),
    "top_p": Sampling(temperature=1.0, top_p=0.6),
    "top_p of little": Sampling(temperature=1.0, top_p=1e-6),
    "min_p": Sampling(temperature=1.3, min_p=0.2),
    "penalty": Sampling(temperature=1.0, repetition_penalty=1.7),
    "all": Sampling(temperature=0.8, top_k=12, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
    "top_k, top_p": Sampling(temperature=1.5, top_k=6, top_p=0.7),
}


def given(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [rows, V], and which tokens were there."""
    generator = torch.Generator().manual_seed(8)
    return torch.randn(rows, V, generator=generator) * 2, torch.rand(rows, V, generator=generator) < 0.3


def expected(logits: list[float], seen: list[bool], sampling: Sampling) -> list[float]:
    """The distribution of one row, written out with lists: what transformers' chain of processors leaves."""
    penalty = sampling.repetition_penalty
    scores = [
        (x / penalty if x > 0 else x * penalty) if there else x for x, there in zip(logits, seen, strict=True)
    ]
    weights = [math.exp(x / sampling.temperature) for x in scores]
    if sampling.top_k:
        least = sorted(weights, reverse=True)[min(sampling.top_k, V) - 1]
        weights = [w if w >= least else 0.0 for w in weights]
    order = sorted(range(V), key=lambda i: -weights[i])
    before = dict(zip(order, itertools.accumulate((weights[i] for i in order), initial=0.0), strict=False))
    if sampling.top_p < 1.0:
        total = sum(weights)
        weights = [w if before[i] < sampling.top_p * total else 0.0 for i, w in enumerate(weights)]
    weights = [w if w >= sampling.min_p * max(weights) else 0.0 for w in weights]
    return [w / sum(weights) for w in weights]


def drawn(
    sampling: Sampling, logits: torch.Tensor, seen: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, log-probabilities) of `count` samples of one row."""
    with_penalty = sampling.repetition_penalty != 1.0
    keys = torch.full((count,), random.signed(random.key(5, "sample")))
    positions = torch.arange(count)
    return choose(
        logits.expand(count, -1), sampling, keys=keys, positions=positions,
        seen=seen.expand(count, -1) if with_penalty else None,
    )  # fmt: skip


@pytest.mark.parametrize("name", FILTERS)
def test_samples_follow_the_distribution_that_the_filters_leave(name: str) -> None:
    """A chi-squared test; no token that is left out is ever drawn; log-probabilities are those of the whole softmax."""
    sampling, count = FILTERS[name], 20_000
    logits, seen = given(3)
    for row, there in zip(logits, seen, strict=True):
        tokens, logprobs = drawn(sampling, row, there, count)
        observed = torch.bincount(tokens, minlength=V).double()
        wanted = torch.tensor(expected(row.double().tolist(), there.tolist(), sampling), dtype=torch.float64) * count
        assert not observed[wanted == 0].any()
        assert_likely(observed, wanted)
        plain = torch.log_softmax(row.double() / sampling.temperature, dim=-1)
        torch.testing.assert_close(logprobs, plain[tokens], rtol=0, atol=1e-6)


def assert_likely(observed: torch.Tensor, wanted: torch.Tensor) -> None:
    """Pearson's chi-squared within four standard deviations; tokens expected under five times count as one."""
    rare = wanted < 5
    observed = torch.cat([observed[~rare], observed[rare].sum().view(1)])
    wanted = torch.cat([wanted[~rare], wanted[rare].sum().view(1)])
    kept = wanted > 0
    degrees = int(kept.sum()) - 1
    statistic = float(((observed - wanted)[kept] ** 2 / wanted[kept]).sum())
    assert statistic <= degrees + 4 * math.sqrt(2 * degrees), (statistic, degrees)


@pytest.mark.parametrize("vocab", [1, 16, 17, 257, 5000])
def test_every_size_of_vocabulary_is_sampled_by_its_softmax(vocab: int) -> None:
    """One to four levels of the tree, full and not full ones."""
    count = 60_000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    tokens, _ = drawn(Sampling(temperature=1.0), logits, torch.zeros(vocab, dtype=torch.bool), count)
    assert_likely(torch.bincount(tokens, minlength=vocab).double(), torch.softmax(logits.double(), -1) * count)


def test_last_bits_of_the_logits_hardly_ever_change_a_sample() -> None:
    """2,000 equally likely tokens, where the borders of a cumulative distribution are as near as can be."""
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * 0.1
    other = logits * (1 + 1e-6) + 1e-6 * torch.randn(2000, generator=torch.Generator().manual_seed(2))
    seen = torch.zeros(2000, dtype=torch.bool)
    first, second = (drawn(Sampling(temperature=1.0), row, seen, 20_000)[0] for row in (logits, other))
    assert (first != second).sum() <= 2


def test_filters_equal_those_of_transformers() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits, seen = given(6)
    for sampling in FILTERS.values():
        ids = torch.full((6, V), -1)
        ids[:] = torch.where(seen, torch.arange(V), seen.int().argmax(-1, keepdim=True))
        scores = processors.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, logits.clone())
        scores = processors.TemperatureLogitsWarper(sampling.temperature)(ids, scores)
        if sampling.top_k:
            scores = processors.TopKLogitsWarper(sampling.top_k)(ids, scores)
        if sampling.top_p < 1.0:
            scores = processors.TopPLogitsWarper(sampling.top_p)(ids, scores)
        if sampling.min_p:
            scores = processors.MinPLogitsWarper(sampling.min_p)(ids, scores)
        theirs = torch.softmax(scores.double(), dim=-1)
        for row in range(6):
            wanted = expected(logits[row].double().tolist(), seen[row].tolist(), sampling)
            torch.testing.assert_close(theirs[row], torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-7)


def test_a_penalty_changes_the_greedy_choice_and_not_its_log_probability() -> None:
    logits = torch.tensor([[3.0, 2.9, -1.0]])
    seen = torch.tensor([[True, False, True]])
    tokens, logprobs = choose(logits, Sampling(repetition_penalty=1.5), keys=None, seen=seen)
    assert tokens.tolist() == [1]
    torch.testing.assert_close(logprobs[0], torch.log_softmax(logits.double(), -1)[0, 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("top_p", "kept"), [(1e-9, {0}), (0.4, {0}), (0.6, {0, 2}), (0.85, {0, 2, 3})])
def test_top_p_keeps_the_fewest_tokens_also_of_equal_ones(top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([[0.4, 0.0, 0.3, 0.3]]).log().expand(500, 4)
    keys = torch.arange(500)
    tokens, _ = choose(
        logits, Sampling(temperature=1.0, top_p=top_p), keys=keys, positions=torch.zeros(500, dtype=torch.int64)
    )
    assert set(tokens.tolist()) == kept


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_k": -1}, "top_k .-1."),
        ({"top_p": 0.0}, "top_p .0.0."),
        ({"top_p": 1.1}, "top_p .1.1."),
        ({"min_p": 2.0}, "min_p .2.0."),
        ({"repetition_penalty": 0.0}, "repetition_penalty .0.0."),
        ({"temperature": float("nan")}, "temperature .nan."),
        ({"stop_strings": ("",)}, "empty stop string"),
        ({"stop_strings": "self"}, "stop_strings .'self'. must be a tuple of texts"),
        ({"stop_strings": (3,)}, "stop_strings ..3,.. must be a tuple of texts"),
        ({"top_k": 2.5}, "top_k .2.5. must be a whole number"),
        ({"seed": 2.5}, "seed .2.5. must be a whole number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


def test_what_training_may_sample_with() -> None:
    assert Sampling(temperature=0.9).is_plain
    for other in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.1}):
        assert not Sampling(**({"temperature": 1.0} | other if other else {})).is_plain  # type: ignore[arg-type]


# -- text --------------------------------------------------------------------------------------------------------------

TEXT = "Gr\u00fc\u00dfe \u4f60\u597d, END of \U0001f600 it."


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
def test_text_comes_in_whole_characters_and_adds_up(kind: str) -> None:
    tokenizer = {
        "bytes": byte_tokenizer,
        "chars": lambda: char_tokenizer([TEXT]),
        "bpe": lambda: train_bpe([TEXT * 3, "END of it."], 300),
    }[kind]()
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(TEXT)]
    assert "".join(pieces) == stream.text == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stop", ["END", "D of", ".", "\u597d, E", "Gr\u00fc"])
def test_a_stop_string_is_found_across_tokens_at_the_first_moment(stop: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(TEXT)
    stream = TextStream(tokenizer, ("never", stop))
    used = next(i for i, token in enumerate(ids, start=1) if stream.push(token) is not None and stream.is_stopped)
    assert stream.text == TEXT[: TEXT.index(stop)]
    assert used == len((TEXT[: TEXT.index(stop)] + stop).encode())
    assert cut_text(tokenizer, ids[:used], ("never", stop)) == stream.text


def test_a_stop_string_that_spells_a_special_token_is_its_id() -> None:
    """The text of an answer never has it, so it would be looked for in vain."""
    tokenizer = byte_tokenizer().with_control_tokens(["<|im_end|>"])
    found = with_special_stops(Sampling(stop_ids=(7,), stop_strings=("END", "<|im_end|>")), tokenizer)
    assert found.stop_ids == (7, tokenizer.token_to_id("<|im_end|>")) and found.stop_strings == ("END",)
    with pytest.raises(ValueError, match=r"the special token <\|im_end\|>, .*: use <\|im_end\|> alone"):
        with_special_stops(Sampling(stop_strings=("<|im_end|>\n",)), tokenizer)
    plain = Sampling(stop_strings=("<|im_end|>",))
    assert with_special_stops(plain, byte_tokenizer()) == plain == with_special_stops(plain, None)


# -- slots and pages ---------------------------------------------------------------------------------------------------


def test_random_plans_end_and_never_share_a_page() -> None:
    draw = Random(5)
    for _ in range(60):
        requests = [
            Request(prompt_index=i, sample_index=0, prompt=[1] * prompt, max_new_tokens=num_new)
            for i, (prompt, num_new) in enumerate(
                (draw.randint(1, 90), draw.randint(1, 90)) for _ in range(draw.randint(1, 20))
            )
        ]
        longest = max(each.max_length for each in requests)
        window = draw.choice([None, 7, 40, 400])
        budget = draw.choice([None, 192, 250, 600])
        plan = plan_cache(
            longest, len(requests), max_batch=draw.randint(1, 6), kv_cache_tokens=budget, sliding_window=window
        )
        if budget is not None:
            assert plan.num_pages * plan.page_size <= budget
        scheduler, ended, slots = Scheduler(plan, requests, prefill_tokens=64), 0, 0
        owned: dict[int, list[int]] = {}
        while not scheduler.is_done:
            first = len(scheduler.live)
            admitted = scheduler.admit()
            assert scheduler.live, "nothing lives and nothing can begin"
            for number, pages in zip(scheduler.live[first:], admitted, strict=True):
                assert len(pages) == plan.pages_of(requests[number].max_length) and 0 not in pages
                owned[number] = pages
            together = [requests[number].prompt for number in scheduler.live[first:]]
            assert len(together) <= 1 or sum(map(len, together)) <= 64
            held = [page for number in scheduler.live for page in owned[number]]
            assert len(held) == len(set(held)) and max(held) <= plan.num_pages
            slots = max(slots, len(scheduler.live))
            for slot in reversed(range(len(scheduler.live))):
                if draw.random() < 0.3:
                    last = scheduler.live[-1]
                    moved = scheduler.end(slot)
                    assert moved is None or scheduler.live[slot] == last
                    ended += 1
        assert ended == len(requests) and slots <= plan.num_slots


def test_a_budget_that_holds_no_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kv_cache_tokens \(63\) .* give 96 or more"):
        plan_cache(90, 4, max_batch=4, kv_cache_tokens=63, sliding_window=None)
    assert plan_cache(90, 4, max_batch=4, kv_cache_tokens=63, sliding_window=20).page_size == 32


def test_a_window_bounds_the_cache() -> None:
    plan = plan_cache(10_000, 8, max_batch=4, kv_cache_tokens=None, sliding_window=100)
    assert (plan.num_slots, plan.num_cells, plan.is_whole) == (4, 112, True)


@pytest.mark.parametrize("page_size", [32, 96])
@pytest.mark.parametrize("window", [None, 20])
def test_attention_to_pages_equals_attention_to_the_sequence(page_size: int, window: int | None) -> None:
    """Two sequences, one of which leaves its slot, with more positions than cells under a window."""
    cells = 96 if window is None or page_size == 96 else 32
    cache = PagedCache(
        num_slots=2, num_pages=7, page_size=page_size, num_cells=cells, window=window, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    length = 90
    k, v, q = (torch.randn(2, length, heads, 4, generator=generator) for heads in (2, 2, 6))
    cache.assign(0, [3, 1, 6])
    cache.assign(1, [2, 5, 4])
    prompts = [40, 7]
    cache.start_prefill(0, prompts)
    together = [torch.cat([t[0, : prompts[0]], t[1, : prompts[1]]]) for t in (q, k, v)]
    assert cache.attend(0, *together) is None
    for step in range(40):
        live = [0, 1] if step < 25 else [1]
        if step == 25:
            cache.move(1, 0)
        positions = torch.tensor([prompts[i] + step for i in live])
        cache.start_decode(positions, visible=cache.visible_cells(int(positions.max()) + 1, are_few=False))
        new = [torch.stack([t[i, prompts[i] + step] for i in live]) for t in (q, k, v)]
        out = cache.attend(0, *new)
        assert out is not None
        for row, i in enumerate(live):
            stop = prompts[i] + step + 1
            first = 0 if window is None else max(0, stop - window)
            keys, values = (t[i, first:stop].transpose(0, 1).repeat_interleave(3, dim=0) for t in (k, v))
            own = torch.nn.functional.scaled_dot_product_attention(q[i, stop - 1].unsqueeze(1), keys, values)
            torch.testing.assert_close(out[row], own.flatten(), rtol=1e-5, atol=1e-5)
