"""Generation equals the naive loop that recomputes everything for each token, on every layout and in every batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from training_cases import once

from megallm.config.model import ModelConfig
from megallm.config.parallel import ParallelConfig
from megallm.generate.sampling import Sampling, choose
from megallm.parallel.mesh import Mesh
from megallm.testing.pool import run_ranks
from megallm.testing.tiny import tiny_config
from megallm.trainers.engine import Engine

# Wide initial weights, so that what comes next depends on what came before.
_WIDE: dict[str, Any] = {"num_hidden_layers": 4, "initializer_range": 0.3}
MODELS: dict[str, ModelConfig] = {
    "llama": tiny_config("llama", num_key_value_heads=2, **_WIDE),
    "mistral": tiny_config("mistral", sliding_window=5, **_WIDE),
    "gpt2": tiny_config("gpt2", hidden_dropout=0.1, attention_dropout=0.1, **_WIDE),
    "qwen3": tiny_config("qwen3", num_key_value_heads=1, **_WIDE),
    "seven_words": tiny_config("llama", vocab_size=7, num_hidden_layers=1, initializer_range=0.15),
}
FAMILIES = pytest.mark.parametrize("model", ["llama", "mistral", "gpt2", "qwen3"])
NEW = 8
PROMPTS = [[5, 17, 3, 99, 42, 8, 60, 1, 77], [100], [0, 0, 0], [12, 55, 31, 9], [64, 2]]
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2 no sp": {"tp": 2, "sequence_parallel": False},
    "pp2": {"pp": 2},
    "pp2 v2": {"pp": 2, "virtual_stages": 2},
    "dp2": {"dp": 2},
    "tp2 pp2": {"tp": 2, "pp": 2},
    "pp2 dp2": {"pp": 2, "dp": 2},
    "tp4": {"tp": 4},
    "pp2 v2 tp2": {"tp": 2, "pp": 2, "virtual_stages": 2},
}
SAMPLED = Sampling(temperature=1.0, seed=11)


def make_engine(model: str, *, tp: int = 1, pp: int = 1, dp: int = 1, **parallel: Any) -> Engine:
    """fp64, so that no rounding decides between two tokens."""
    mesh = Mesh.build(tp=tp, pp=pp, dp=dp)
    return Engine(
        MODELS[model], mesh, parallel=ParallelConfig(tp=tp, pp=pp, **parallel), precision="fp64", seed=3, train=False
    )


def world_size(layout: dict[str, Any]) -> int:
    return layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", 1)


Tokens = list[list[int]]


def on_layouts(
    rank: int, world: int, layouts: dict[str, dict[str, Any]], stop_ids: dict[str, int]
) -> dict[tuple[str, str, str], Tokens]:
    """Generated tokens by (layout, model, kind)."""
    found = {}
    for name, layout in layouts.items():
        for model, stop in stop_ids.items():
            engine = make_engine(model, **layout)
            for kind, sampling in (("greedy", Sampling()), ("sampled", SAMPLED)):
                found[name, model, kind] = engine.generate(PROMPTS, max_new_tokens=NEW, sampling=sampling)
            if model == "llama":
                stopping = Sampling(stop_ids=(stop,))
                found[name, model, "stopped"] = engine.generate(PROMPTS, max_new_tokens=NEW, sampling=stopping)
    return found


@once
def measured(world: int) -> dict[tuple[str, str, str], Tokens]:
    layouts = {name: layout for name, layout in LAYOUTS.items() if world_size(layout) == world}
    stop_ids = {model: stop_id(model) for model in ("llama", "mistral", "gpt2", "qwen3")}
    results = run_ranks(on_layouts, world, layouts, stop_ids)
    for other in results[1:]:
        assert other == results[0], "ranks disagree on the tokens"
    return results[0]


@once
def one_rank(model: str, kind: str) -> Tokens:
    sampling = {"greedy": Sampling(), "sampled": SAMPLED}.get(kind) or Sampling(stop_ids=(stop_id(model),))
    return make_engine(model).generate(PROMPTS, max_new_tokens=NEW, sampling=sampling)


@once
def stop_id(model: str) -> int:
    """A token in the middle of the first greedy answer."""
    return one_rank(model, "greedy")[0][NEW // 2]


def naive(engine: Engine, prompt: list[int], num_new: int) -> list[int]:
    """The most likely next token, again and again, each from a forward of the whole text."""
    text = list(prompt)
    for _ in range(num_new):
        batch = {"input_ids": torch.tensor([text])}
        (logits,) = engine.forward(batch, lambda out, part: out.gathered())
        text.append(int(logits[-1].argmax()))
    return text[len(prompt) :]


@FAMILIES
def test_greedy_equals_recomputing_the_whole_text_for_each_token(model: str) -> None:
    engine = make_engine(model)
    assert one_rank(model, "greedy") == [naive(engine, prompt, NEW) for prompt in PROMPTS]


@FAMILIES
def test_the_models_answers_vary(model: str) -> None:
    """Else the other tests would compare constants."""
    tokens = one_rank(model, "greedy")
    assert len({t for row in tokens for t in row}) > 8
    assert len(set(map(tuple, tokens))) == len(PROMPTS)


def test_the_sliding_window_matters() -> None:
    wide = Engine(MODELS["mistral"].replace(sliding_window=None), Mesh.build(), precision="fp64", seed=3, train=False)
    assert wide.generate(PROMPTS, max_new_tokens=NEW) != one_rank("mistral", "greedy")


@FAMILIES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_generates_the_same_tokens(layout: str, model: str) -> None:
    assert measured(world_size(LAYOUTS[layout]))[layout, model, "greedy"] == one_rank(model, "greedy")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_stops_at_the_same_token(layout: str) -> None:
    assert measured(world_size(LAYOUTS[layout]))[layout, "llama", "stopped"] == one_rank("llama", "stopped")


@FAMILIES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_draws_the_same_samples(layout: str, model: str) -> None:
    assert measured(world_size(LAYOUTS[layout]))[layout, model, "sampled"] == one_rank(model, "sampled")


@FAMILIES
def test_prompts_of_different_lengths_in_one_batch_equal_one_at_a_time(model: str) -> None:
    engine = make_engine(model)
    alone = [engine.generate([prompt], max_new_tokens=NEW)[0] for prompt in PROMPTS]
    assert alone == one_rank(model, "greedy")


def test_more_prompts_than_one_batch_equal_one_at_a_time() -> None:
    engine = make_engine("llama")
    prompts = [[i, 3 * i % 101, 7][: 1 + i % 3] for i in range(37)]
    together = engine.generate(prompts, max_new_tokens=3)
    assert together == [engine.generate([prompt], max_new_tokens=3)[0] for prompt in prompts]


@FAMILIES
def test_a_stop_id_ends_a_sequence_and_is_its_last_token(model: str) -> None:
    stop = stop_id(model)
    for stopped, full in zip(one_rank(model, "stopped"), one_rank(model, "greedy"), strict=True):
        assert stopped == (full[: full.index(stop) + 1] if stop in full else full)
    assert len(one_rank(model, "stopped")[0]) <= NEW // 2 + 1


def test_samples_differ_by_seed_prompt_and_temperature() -> None:
    engine = make_engine("llama")
    prompts = [[4, 5]] * 6
    first = engine.generate(prompts, max_new_tokens=8, sampling=Sampling(temperature=1.0, seed=1))
    assert len(set(map(tuple, first))) == 6
    assert first == engine.generate(prompts, max_new_tokens=8, sampling=Sampling(temperature=1.0, seed=1))
    assert first != engine.generate(prompts, max_new_tokens=8, sampling=Sampling(temperature=1.0, seed=2))
    assert first != engine.generate(prompts, max_new_tokens=8, sampling=Sampling(temperature=0.3, seed=1))


def test_a_sample_does_not_depend_on_what_else_is_in_the_batch() -> None:
    engine = make_engine("llama")
    several = engine.generate([[4, 5], [9, 1, 2, 3]], max_new_tokens=6, sampling=SAMPLED)
    assert engine.generate([[4, 5], [80]], max_new_tokens=6, sampling=SAMPLED)[0] == several[0]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_follow_the_softmax_of_the_logits(temperature: float) -> None:
    """Chi-squared with 6 degrees of freedom exceeds 27.9 once in 10,000 times; the seed is fixed."""
    engine, prompt, count = make_engine("seven_words"), [1, 2, 3], 2000
    (logits,) = engine.forward({"input_ids": torch.tensor([prompt])}, lambda out, part: out.gathered()[-1])
    expected = torch.softmax(logits.double() / temperature, -1) * count
    assert expected.min() > 5 and expected.max() / expected.min() > 2
    sampling = Sampling(temperature=temperature, seed=5)
    tokens = engine.generate([prompt] * count, max_new_tokens=1, sampling=sampling)
    observed = torch.bincount(torch.tensor(tokens).flatten(), minlength=7)
    assert ((observed - expected) ** 2 / expected).sum() < 27.9


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((500, 5), -torch.inf)
    logits[:, [1, 3]] = 0.0
    keys, positions = torch.arange(500), torch.zeros(500, dtype=torch.int64)
    drawn, logprobs = choose(logits, Sampling(temperature=1.0), keys=keys, positions=positions)
    assert set(drawn.tolist()) == {1, 3}
    torch.testing.assert_close(logprobs, torch.full((500,), 0.5, dtype=torch.float64).log())


@pytest.mark.parametrize(
    ("prompts", "num_new", "message"),
    [
        ([[1], []], 3, "prompt 1 has no tokens"),
        ([[1, 101]], 3, "prompt 0 has token id 101, but the model's vocabulary has 101 ids"),
        ([[-1]], 3, "prompt 0 has token id -1"),
        ([[1]], 0, "max_new_tokens .0. must be at least 1"),
        ([[1] * 60], 5, "65 positions, but the model has 64 .*: shorten the prompt or max_new_tokens$"),
        (torch.ones(1, 2), 3, "prompts are of type Tensor: give lists of token ids"),
        ([[1], torch.tensor([2, 3])], 3, "prompt 1 is of type Tensor: give a list of token ids"),
        ([1, 2], 3, "prompt 0 is of type int: give a list of token ids"),
        (["a"], 3, "prompt 0 is of type str"),
        ([[1, True]], 3, "prompt 0 holds True: token ids are whole numbers"),
        ([[1, None]], 3, "prompt 0 holds None"),
        ([[1.0]], 3, "prompt 0 holds 1.0"),
        ([[1]], 4.0, "max_new_tokens .4.0. must be a whole number"),
        ([[1]], [True], "max_new_tokens .True. must be a whole number"),
    ],
)
def test_what_cannot_be_continued_is_refused_in_words(prompts: Any, num_new: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine("gpt2").generate(prompts, max_new_tokens=num_new)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_positions_can_be_filled_to_the_last_one(model: str) -> None:
    assert len(make_engine(model).generate([[1] * 60], max_new_tokens=4)[0]) == 4


def test_no_model_generates_beyond_its_positions() -> None:
    with pytest.raises(ValueError, match="65 positions, but the model has 64 .*raise it in the model's config.json"):
        make_engine("llama").generate([[1] * 60], max_new_tokens=5)


def test_numbers_of_numpy_are_whole_numbers() -> None:
    engine = make_engine("llama")
    prompt, new = np.array([5, 17]), np.int64(3)
    assert engine.generate([list(prompt)], max_new_tokens=new) == engine.generate([[5, 17]], max_new_tokens=3)


def test_a_negative_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=-0.1)
