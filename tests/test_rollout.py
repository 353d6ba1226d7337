"""Rollouts: log-probabilities are those of training, batches and layouts change nothing, nothing hangs."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from test_generate import MODELS, PROMPTS
from training_cases import once

from megallm.config.numerics import Precision
from megallm.config.parallel import ParallelConfig
from megallm.data.tokenizer import byte_tokenizer
from megallm.generate.rollout import Limits, Rollout
from megallm.generate.sampling import Sampling
from megallm.parallel.mesh import Mesh
from megallm.testing.pool import run_ranks
from megallm.testing.tiny import tiny_config
from megallm.trainers.engine import Engine

FAMILIES = ("llama", "mistral", "gpt2", "qwen3")
SAMPLED = Sampling(temperature=0.9, seed=4, stop_ids=(7, 21))
LENGTHS = [1, 30, 3, 17, 9]
CONFIGS = MODELS | {
    "bytes": tiny_config("llama", vocab_size=257, num_hidden_layers=2, num_key_value_heads=2, initializer_range=0.3)
}


def make_engine(
    model: str, *, tp: int = 1, pp: int = 1, dp: int = 1, precision: Precision = "fp32", **parallel: Any
) -> Engine:
    mesh = Mesh.build(tp=tp, pp=pp, dp=dp)
    layout = ParallelConfig(tp=tp, pp=pp, **parallel)
    return Engine(CONFIGS[model], mesh, parallel=layout, precision=precision, seed=3, train=False)


def roll(engine: Engine, prompts: list[list[int]] = PROMPTS, **options: Any) -> Rollout:
    options = {"max_new_tokens": 12, "sampling": SAMPLED, "num_samples": 3} | options
    return engine.rollout(prompts, **options)


def flat(logprobs: list[list[float]]) -> torch.Tensor:
    return torch.tensor([each for row in logprobs for each in row])


def training_logprobs(engine: Engine, prompt: list[int], answer: list[int], temperature: float) -> torch.Tensor:
    """log p of the answer's tokens by the training forward, logits divided by the temperature."""
    batch = {"input_ids": torch.tensor([prompt + answer])}
    (logits,) = engine.forward(batch, lambda out, part: out.gathered())
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize(("precision", "bound"), [("fp64", 1 + 1e-6), ("fp32", 1.001), ("bf16", 1.02)])
def test_log_probabilities_are_those_of_the_training_forward(model: str, precision: Precision, bound: float) -> None:
    """mean exp|difference|, the bound above which a mismatch means a bug."""
    engine = make_engine(model, precision=precision)
    found = roll(engine, max_new_tokens=24, limits=Limits(max_batch=4))
    apart = []
    for at, (answer, logprobs) in enumerate(zip(found.token_ids, found.logprobs, strict=True)):
        trained = training_logprobs(engine, PROMPTS[at // 3], answer, SAMPLED.temperature)
        apart.append((torch.tensor(logprobs) - trained).abs())
    assert torch.cat(apart).exp().mean() < bound


@pytest.mark.parametrize("model", FAMILIES)
def test_greedy_log_probabilities_are_at_temperature_one(model: str) -> None:
    engine = make_engine(model)
    found = roll(engine, sampling=Sampling(), num_samples=1)
    for prompt, answer, logprobs in zip(PROMPTS, found.token_ids, found.logprobs, strict=True):
        wanted = training_logprobs(engine, prompt, answer, 1.0)
        torch.testing.assert_close(torch.tensor(logprobs), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("model", FAMILIES)
def test_batch_composition_never_changes_a_sample(model: str, precision: Precision) -> None:
    engine = make_engine(model, precision=precision)
    first = roll(engine)
    for limits in (Limits(max_batch=2), Limits(max_batch=5, prefill_tokens=1), Limits(max_batch=64)):
        other = roll(engine, limits=limits)
        assert other.token_ids == first.token_ids and other.finish_reasons == first.finish_reasons
    assert roll(engine, limits=Limits(max_batch=1)).token_ids == first.token_ids
    assert roll(engine, PROMPTS[:1]).token_ids == first.token_ids[:3]


@pytest.mark.parametrize("model", FAMILIES)
def test_a_cache_in_pages_that_is_too_small_for_all_gives_the_same_samples(model: str) -> None:
    """GQA, one key/value head, windows; sequences wait for pages."""
    engine = make_engine(model)
    options: dict[str, Any] = {"max_new_tokens": 40}
    first = roll(engine, **options)
    for tokens in (64, 96, 200):
        other = roll(engine, limits=Limits(kv_cache_tokens=tokens), **options)
        assert other.token_ids == first.token_ids
        torch.testing.assert_close(flat(other.logprobs), flat(first.logprobs), rtol=0, atol=1e-4)


def test_every_prompt_can_have_a_length_of_its_own() -> None:
    engine = make_engine("llama")
    sampling = Sampling(temperature=1.0)
    longest = roll(engine, max_new_tokens=30, sampling=sampling)
    found = roll(engine, max_new_tokens=LENGTHS, sampling=sampling, limits=Limits(max_batch=4))
    assert [len(ids) for ids in found.token_ids] == [n for n in LENGTHS for _ in range(3)]
    assert all(a == b[: len(a)] for a, b in zip(found.token_ids, longest.token_ids, strict=True))


def test_samples_of_a_prompt_differ_and_the_first_ones_stay_when_more_are_asked_for() -> None:
    engine = make_engine("llama")
    few, many = roll(engine, num_samples=2), roll(engine, num_samples=5)
    assert len(few) == 10 and len(many) == 25
    assert [many.token_ids[5 * i + s] for i in range(5) for s in range(2)] == few.token_ids
    assert len({tuple(ids) for ids in many.token_ids}) > 20


def test_an_answer_says_why_it_ends() -> None:
    engine = make_engine("llama")
    found = roll(engine, num_samples=8)
    assert set(found.finish_reasons) == {"stop", "length"}
    for ids, reason in zip(found.token_ids, found.finish_reasons, strict=True):
        assert (ids[-1] in SAMPLED.stop_ids) == (reason == "stop")
        assert not set(ids[:-1]) & set(SAMPLED.stop_ids)
        assert reason == "stop" or len(ids) == 12


def test_a_stop_string_that_spells_a_special_token_ends_an_answer() -> None:
    engine, tokenizer = make_engine("bytes"), byte_tokenizer()
    by_id, by_text = (
        engine.rollout([[72, 105]] * 20, max_new_tokens=60, sampling=sampling, tokenizer=tokenizer)
        for sampling in (
            Sampling(temperature=1.0, seed=2, stop_ids=(256,)),
            Sampling(temperature=1.0, seed=2, stop_strings=("<|endoftext|>",)),
        )
    )
    assert by_text == by_id and "stop" in by_id.finish_reasons


def test_a_stop_string_ends_an_answer_with_the_token_that_completes_it() -> None:
    engine, tokenizer = make_engine("bytes"), byte_tokenizer()
    sampling = Sampling(temperature=1.0, seed=2)
    whole = engine.rollout([[72, 105]] * 6, max_new_tokens=60, sampling=sampling)
    texts = [tokenizer.decode(ids) for ids in whole.token_ids]
    stop = next(text[i : i + 2] for text in texts for i in range(8, 60) if text[i : i + 2].isascii() and text[i:])
    sampling = Sampling(temperature=1.0, seed=2, stop_strings=(stop,))
    found = engine.rollout([[72, 105]] * 6, max_new_tokens=60, sampling=sampling, tokenizer=tokenizer)
    assert "stop_string" in found.finish_reasons
    for ids, reason, before in zip(found.token_ids, found.finish_reasons, whole.token_ids, strict=True):
        assert ids == before[: len(ids)]
        assert (stop in tokenizer.decode(ids)) == (reason == "stop_string")
        assert stop not in tokenizer.decode(ids[:-1])


def test_a_stream_gives_the_tokens_of_the_rollout_and_can_be_left() -> None:
    engine = make_engine("llama")
    whole = roll(engine, PROMPTS[:1], num_samples=1)
    tokens = list(engine.stream(PROMPTS[0], max_new_tokens=12, sampling=SAMPLED))
    assert [token.token_id for token in tokens] == whole.token_ids[0]
    assert [token.finish_reason for token in tokens[:-1]] == [None] * (len(tokens) - 1)
    assert tokens[-1].finish_reason == whole.finish_reasons[0]
    next(left := engine.stream(PROMPTS[1], max_new_tokens=12))
    left.close()
    assert torch.is_grad_enabled() and roll(engine, PROMPTS[:1], num_samples=1) == whole


def test_weights_that_are_not_numbers_are_named() -> None:
    engine = make_engine("llama")
    with torch.no_grad():
        engine.model.stage(0).norm.weight[3] = float("nan")  # type: ignore[operator, index, union-attr]
    with pytest.raises(ValueError, match="logits behind prompt 0 are not finite"):
        roll(engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 2.5}, "num_samples .2.5. must be a whole number"),
        ({"num_samples": 0}, "num_samples .0. must be at least 1"),
        ({"sampling": Sampling()}, "num_samples .3. of a greedy answer are all equal"),
        ({"sampling": Sampling(temperature=1.0, stop_strings=("x",))}, "give the tokenizer"),
        ({"max_new_tokens": [1, 2]}, "has 2 numbers for 5 prompts"),
        ({"limits": Limits(max_batch=0)}, "max_batch .0."),
        ({"limits": Limits(kv_cache_tokens=20)}, "kv_cache_tokens .20. are too few"),
    ],
)
def test_what_cannot_be_rolled_out_is_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roll(make_engine("llama"), **options)


def test_no_prompts_give_no_samples() -> None:
    assert roll(make_engine("llama"), []).token_ids == []


# -- layouts -----------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2 no sp": {"tp": 2, "sequence_parallel": False},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
    "dp2 zero3": {"dp": 2, "zero": 3},
    "tp2 pp2": {"tp": 2, "pp": 2},
    "pp2 v2 dp2": {"pp": 2, "dp": 2, "virtual_stages": 2},
    "tp2 dp2 zero3": {"tp": 2, "dp": 2, "zero": 3},
    "dp4": {"dp": 4},
}
FILTERED = Sampling(temperature=1.1, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.3, seed=6, stop_ids=(7,))
OPTIONS: dict[str, Any] = {
    "sampling": FILTERED, "max_new_tokens": [1, 16, 3, 12, 6], "num_samples": 2,
    "limits": Limits(max_batch=4, kv_cache_tokens=70),
}  # fmt: skip
"""test_generate.py has the rest."""


def on_layouts(rank: int, world: int, layouts: dict[str, dict[str, Any]]) -> dict[tuple[str, str], Rollout]:
    return {
        (name, model): roll(make_engine(model, precision="fp64", **layout), **OPTIONS)
        for name, layout in layouts.items()
        for model in FAMILIES
    }


@once
def measured(world: int) -> dict[tuple[str, str], Rollout]:
    sizes = {name: x.get("tp", 1) * x.get("pp", 1) * x.get("dp", 1) for name, x in LAYOUTS.items()}
    results = run_ranks(on_layouts, world, {n: x for n, x in LAYOUTS.items() if sizes[n] == world})
    for other in results[1:]:
        assert other == results[0], "ranks disagree"
    return results[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_rollout(layout: str) -> None:
    world = 4 if layout in ("tp2 pp2", "pp2 v2 dp2", "tp2 dp2 zero3", "dp4") else 2
    for model in FAMILIES:
        one, found = roll(make_engine(model, precision="fp64"), **OPTIONS), measured(world)[layout, model]
        assert found.token_ids == one.token_ids, model
        assert found.finish_reasons == one.finish_reasons
        torch.testing.assert_close(flat(found.logprobs), flat(one.logprobs), rtol=0, atol=1e-5)


def random_runs(rank: int, world: int, layout: dict[str, Any], count: int) -> list[Rollout]:
    engine, draw, found = make_engine("llama", precision="fp64", **layout), random.Random(9), []
    for _ in range(count):
        prompts = [[draw.randrange(101) for _ in range(draw.randint(1, 20))] for _ in range(draw.randint(1, 9))]
        sampling = Sampling(temperature=1.0, seed=draw.randrange(99), stop_ids=tuple(draw.sample(range(101), 12)))
        limits = Limits(max_batch=draw.randint(1, 5), kv_cache_tokens=draw.choice([None, 64, 128]))
        most = [draw.randint(1, 16) for _ in prompts]
        samples = draw.randint(1, 3)
        found.append(
            engine.rollout(prompts, max_new_tokens=most, sampling=sampling, num_samples=samples, limits=limits)
        )
    return found


@pytest.mark.parametrize("layout", ["tp2 pp2", "pp2 v2 dp2", "tp2 dp2 zero3"])
def test_random_lengths_and_stops_never_hang(layout: str) -> None:
    """Five runs each, under a watchdog of 60 s."""
    results = run_ranks(random_runs, 4, LAYOUTS[layout], 5, timeout=60.0)
    assert all(other == results[0] for other in results)
    assert [each.token_ids for each in results[0]] == [each.token_ids for each in random_runs(0, 1, {}, 5)]
