"""The parts of an iteration of PPO and GRPO, each alone: rows, shaping of scores, frozen models, groups, memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from megallm.config.parallel import ParallelConfig
from megallm.config.rl import GrpoOptions, RewardsConfig
from megallm.data.chat_model import ChatModel
from megallm.data.finetune import SftDataset
from megallm.data.masks import Example
from megallm.data.prompts import Prompt, PromptDataset
from megallm.data.tokenizer import byte_tokenizer
from megallm.generate import decode
from megallm.generate.cache import PagedCache
from megallm.generate.rollout import Limits
from megallm.generate.sampling import Sampling
from megallm.monitor.phase_table import format_phase_table
from megallm.parallel.mesh import Mesh
from megallm.planner.memory import CauseBytes, MemoryPlan
from megallm.planner.phases import ModelMemory, cache_bytes, plan_phases
from megallm.testing.tiny import tiny_config
from megallm.trainers.engine import Engine
from megallm.trainers.experience import answer_rows, choose_rows, is_answer, own_rows, token_logprobs
from megallm.trainers.frozen import Frozen
from megallm.trainers.grpo import Groups, telling
from megallm.trainers.iteration import Timer
from megallm.trainers.policy_losses import PolicyLoss
from megallm.trainers.ptx import PretrainingRows
from megallm.trainers.rewards import Response, Scores
from megallm.trainers.rollouts import Answerer, Answers, RunningMoments, ScoreShaping, overlong_cost

NAN = math.nan


def engine_of(**options: Any) -> Engine:
    config = tiny_config("llama", vocab_size=257, initializer_range=0.2)
    return Engine(config, Mesh.build(), seed=4, train=False, **options)


def answers_of(scores: list[float], *, lengths: list[int] | None = None, ended: list[bool] | None = None) -> Answers:
    lengths = lengths or [3] * len(scores)
    ended = ended or [True] * len(scores)
    return Answers(
        prompts=[Prompt(ids=[5], text="?", record={})] * len(scores), groups=torch.arange(len(scores)),
        token_ids=[[7] * n for n in lengths], logprobs=[[-1.0] * n for n in lengths],
        finish_reasons=["stop" if each else "length" for each in ended], texts=["a"] * len(scores),
        total=torch.tensor(scores, dtype=torch.float64), parts={},
    )  # fmt: skip


def test_rows_have_the_answers_tokens_as_labels_before_them() -> None:
    rows = answer_rows([[1, 2, 3], [4]], [[5, 6], [7, 8, 9, 9]])
    assert rows["input_ids"].tolist() == [[1, 2, 3, 5, 6], [4, 7, 8, 9, 9]]
    assert rows["labels"].tolist() == [[-100, -100, 5, 6, -100], [7, 8, 9, 9, -100]]
    assert rows["lengths"].tolist() == [5, 5]
    short = choose_rows(answer_rows([[1], [1, 2, 3]], [[2], [4, 5]]), torch.tensor([0]), multiple=4)
    assert short["input_ids"].tolist() == [[1, 2, 0, 0]] and short["labels"].tolist() == [[2, -100, -100, -100]]


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_every_rank_gets_rows_of_much_the_same_length(dp: int) -> None:
    lengths = torch.tensor([3, 9, 4, 8, 5, 7, 6, 2])
    rows = {"input_ids": torch.arange(8).unsqueeze(1).expand(8, 9).clone(), "lengths": lengths}
    rows["labels"] = torch.zeros_like(rows["input_ids"])
    meshes: Any = [type("M", (), {"dp": type("A", (), {"size": dp, "rank": r}), "tp": type("A", (), {"size": 1})})
                   for r in range(dp)]  # fmt: skip
    parts = [own_rows(rows, mesh) for mesh in meshes]
    assert sorted(int(i) for part in parts for i in part["input_ids"][:, 0]) == list(range(8))
    sums = [int(part["lengths"].sum()) for part in parts]
    assert max(sums) - min(sums) <= 2


def test_token_logprobs_are_those_of_each_row_alone() -> None:
    engine = engine_of()
    prompts, answers = [[5, 6, 7], [8] * 9, [1]], [[100, 101, 102, 7], [9], [3, 4, 5]]
    found = token_logprobs(engine, answer_rows(prompts, answers), temperature=0.7, tokens_at_once=16)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        (logits,) = engine.forward({"input_ids": torch.tensor([prompt + answer])}, lambda out, batch: out.gathered())
        expected = torch.log_softmax(logits / 0.7, -1)[len(prompt) - 1 : -1].gather(1, torch.tensor([answer]).T)
        torch.testing.assert_close(found[row][len(prompt) - 1 :][: len(answer)], expected[:, 0], rtol=1e-4, atol=1e-5)
        assert found[row].count_nonzero() == len(answer)


def test_scores_are_normalised_then_clipped_then_pay_for_a_missing_end() -> None:
    answers = answers_of([1.0, 3.0, NAN, 8.0], ended=[True, False, False, True])
    raw = ScoreShaping(RewardsConfig(), 10).shaped(answers)
    assert raw[:2].tolist() == [1.0, 3.0] and raw[2].isnan()
    config = RewardsConfig(normalize_scores="batch", score_clip=0.9, missing_end_penalty=0.5)
    std = torch.tensor([1.0, 3.0, 8.0]).double().std()
    expected = [(1 - 4) / std, (3 - 4) / std - 0.5, NAN, 0.9]
    expected[0] = max(float(expected[0]), -0.9)
    torch.testing.assert_close(
        ScoreShaping(config, 10).shaped(answers), torch.tensor(expected).double(), equal_nan=True, rtol=1e-6, atol=1e-6
    )
    replaced = ScoreShaping(RewardsConfig(missing_end_score=-1.0), 10).shaped(answers)
    assert replaced[:2].tolist() == [1.0, -1.0] and replaced[2].isnan()


def test_the_last_tokens_cost_in_proportion() -> None:
    cost = overlong_cost(torch.tensor([3, 6, 8, 10]), 10, 4)
    assert cost.tolist() == [0.0, 0.0, 0.5, 1.0]
    assert overlong_cost(torch.tensor([10]), 10, 0).tolist() == [0.0]


def test_running_moments_are_those_of_everything() -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(3.0, 2.0, 57))
    seen = RunningMoments()
    for part in values.split([1, 20, 0, 36]):
        seen.add(part)
    assert seen.mean == pytest.approx(float(values.mean())) and seen.std == pytest.approx(float(values.std()))
    assert RunningMoments().std == 1.0
    for value in (0.1, 0.7, 123.456):  # all equal: what is left of the mean's rounding is not stretched to 1
        shaped = ScoreShaping(RewardsConfig(normalize_scores="batch"), 10).shaped(answers_of([value] * 48))
        assert shaped.abs().max() < 1e-10


def test_frozen_models_leave_and_come_back_as_they_were() -> None:
    engine = engine_of()
    rows = answer_rows([[5, 6]], [[7, 8, 9]])
    before = token_logprobs(engine, rows, temperature=1.0, tokens_at_once=16)
    frozen = Frozen(engine, offload=True)
    assert frozen.is_away
    for _ in range(2):
        with frozen.here() as here:
            assert not frozen.is_away
            assert torch.equal(token_logprobs(here, rows, temperature=1.0, tokens_at_once=16), before)
        assert frozen.is_away
    assert not Frozen(engine).is_away


def test_groups_that_say_nothing() -> None:
    scores = torch.tensor([1.0, 1.0, 0.0, 1.0, NAN, 1.0, NAN, NAN]).double()
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert telling(scores, groups).tolist() == [False, False, True, True, False, False, False, False]


class Parity:
    """A reward: 1 if the first byte is odd; always 1 for prompts of record `easy`."""

    def score(self, responses: list[Response]) -> Scores:
        total = torch.tensor([float(r.record["easy"] or r.ids[len(r.prompt)] % 2) for r in responses]).double()
        return Scores(total=total, parts={"odd": total}, failures=[])


def test_dynamic_sampling_replaces_groups_that_say_nothing() -> None:
    tokenizer = byte_tokenizer()
    chat = ChatModel(tokenizer=tokenizer, template=None, max_length=32)
    records = [{"prompt": f"{i}", "easy": i % 2 == 0} for i in range(8)]
    answerer = Answerer(
        engine=engine_of(), prompts=PromptDataset(records, chat, max_prompt_tokens=8, shuffle=False), chat=chat,
        rewards=Parity(), sampling=Sampling(temperature=1.0, seed=1), num_samples=4, max_new_tokens=2, decode_batch=8,
    )  # fmt: skip  # type: ignore[arg-type]
    without, used, metrics = Groups(GrpoOptions()).collect(answerer, 0, 4, Timer(torch.device("cpu")))
    assert used == 4 and len(without) == 16 and metrics["score"] == pytest.approx(float(without.total.mean()))
    answers, used, metrics = Groups(GrpoOptions(dynamic_sampling=5)).collect(answerer, 0, 4, Timer(torch.device("cpu")))
    assert metrics["score"] > float(answers.total.mean()), "groups that were replaced count as well"
    assert used > 4 and len(answers) == 16 and bool(telling(answers.total, answers.groups).all())
    assert not any(prompt.record["easy"] for prompt in answers.prompts)
    assert torch.bincount(answers.groups.unique(return_inverse=True)[1]).tolist() == [4] * 4


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1, top_p=0.9), Sampling(temperature=1, top_k=3)])
def test_answers_to_train_on_are_sampled_with_a_temperature_alone(sampling: Sampling) -> None:
    none: Any = None
    with pytest.raises(ValueError, match="sampled with a temperature above 0 and no other filter"):
        Answerer(engine=none, prompts=none, chat=none, rewards=none, sampling=sampling, num_samples=1,
                 max_new_tokens=1, decode_batch=1)  # fmt: skip


def test_text_beside_weighs_its_coefficient_whatever_its_tokens() -> None:
    """gamma * mean cross-entropy of the text is added to the policy's mean."""
    examples = [
        Example(input_ids=np.arange(3, 9 + i).astype(np.int32), is_trained=np.arange(6 + i) > 0, prompt_length=1)
        for i in range(5)
    ]
    text = PretrainingRows(dataset=SftDataset(examples, seq_length=16, seed=1, pad_to_multiple=8), coefficient=2.0)
    rows = answer_rows([[1, 2], [3]], [[4, 5, 6], [7]])
    mask = is_answer(rows)
    rows |= {"advantages": mask.float(), "old_logprobs": torch.zeros(mask.shape)}
    loss = PolicyLoss(temperature=0.5)
    count = int(loss.count(rows))
    both = text.add_to(rows, number=3, count=count)
    assert len(both["input_ids"]) == 4 and int(loss.count(both)) == count == 4
    trained = both["ptx_weights"] > 0
    assert trained[:2].sum() == 0 and float(both["ptx_weights"].sum()) == pytest.approx(2.0 * count)
    assert (both["labels"][2:] != -100).equal(trained[2:])


def memory(parameters: int, work: int = 0) -> MemoryPlan:
    device = CauseBytes(parameters=parameters, gradients=parameters, optimizer=2 * parameters, activations=work)
    return MemoryPlan(pp_rank=0, device=device, host=CauseBytes())


def test_phases_count_who_is_there() -> None:
    models = {
        "policy": ModelMemory(plan=memory(100, 50), trains=True),
        "critic": ModelMemory(plan=memory(10, 5), trains=True),
        "reference": ModelMemory(plan=memory(100), trains=False, is_away=True),
        "taste": ModelMemory(plan=memory(30), trains=False, is_away=True),
    }  # fmt: skip
    phases = {phase.name: phase for phase in plan_phases(models, cache=7, forward=20)}
    assert list(phases) == ["rollout", "score", "update policy", "update critic"]
    assert phases["rollout"].total == 400 + 40 + 7 and phases["score"].total == 400 + 40 + 20 + 100
    assert phases["update policy"].total == 440 + 50 and phases["update critic"].total == 440 + 5
    table = format_phase_table(list(phases.values()), capacity=450)
    assert "less than is needed" in table and "reference" in table.splitlines()[0]


def test_the_predicted_cache_is_the_one_that_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[PagedCache] = []

    def remembered(**options: Any) -> PagedCache:
        made.append(PagedCache(**options))
        return made[-1]

    monkeypatch.setattr(decode, "PagedCache", remembered)
    engine = engine_of()
    engine.rollout([[5] * 20] * 8, max_new_tokens=20, sampling=Sampling(temperature=1.0), limits=Limits(max_batch=8))
    held = sum(pool.nbytes for pools in made[0]._pools.values() for pool in pools)
    predicted = cache_bytes(engine.config, ParallelConfig(), num_sequences=8, length=40, element_bytes=4)
    assert held == predicted
