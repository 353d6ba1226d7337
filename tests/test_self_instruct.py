"""`megallm self-instruct`: ROUGE-L by hand, each filter, rounds that go on where they stopped, data that SFT reads."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_finetune_runs import Run, example

from megallm.cli import self_instruct
from megallm.cli.main import run as megallm_run
from megallm.data.rouge import common_subsequence, is_similar, rouge_l, words
from megallm.data.seed_tasks import seed_tasks
from megallm.data.self_instruct import (
    Completion,
    Progress,
    SelfInstruct,
    Task,
    instance_prompt,
    instruction_prompt,
    read_instance,
    read_seeds,
    run_round,
    shown_tasks,
    split_instructions,
    why_not_instruction,
)
from megallm.data.tokenizer import byte_tokenizer
from megallm.parallel.mesh import Mesh
from megallm.runtime.launch import UsageError
from megallm.testing.pool import run_ranks
from megallm.testing.tiny import tiny_config
from megallm.trainers.engine import Engine

__all__ = ["example"]

SEEDS = read_seeds(seed_tasks(), where="seeds")
TASK = Task("Add the numbers of the list.", "1, 2", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    config = tiny_config(
        "llama", vocab_size=257, eos_token_id=tokenizer.eos_id, num_hidden_layers=2, initializer_range=0.3,
        max_position_embeddings=2048,
    )  # fmt: skip
    Engine(config, Mesh.build(), seed=5).save(str(folder))
    tokenizer.save(folder)
    return folder


# -- ROUGE-L -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [
        ("police killed the gunman", "police kill the gunman", 2 * 3 / 8),  # Lin 2004: police the gunman
        ("police killed the gunman", "the gunman kill police", 2 * 2 / 8),  # the gunman
        ("Write a poem.", "write A poem", 1.0),
        ("a b c", "d e", 0.0),
        ("", "a", 0.0),
        ("a b a b", "b a b a a", 2 * 3 / 9),
        ("two-part words", "two part words", 1.0),
    ],
)
def test_rouge_l_by_hand(first: str, second: str, value: float) -> None:
    assert rouge_l(words(first), words(second)) == pytest.approx(value)


def test_the_common_subsequence_is_that_of_the_table() -> None:
    """The quadratic table of the textbook, on random sequences longer than a machine word."""
    chance = random.Random(0)
    for _ in range(60):
        a, b = ([chance.randrange(6) for _ in range(chance.randrange(90))] for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert common_subsequence(a, b) == table[-1][-1]


def test_similar_means_at_least_the_threshold_with_any() -> None:
    others = [words("one two three"), words("police killed the gunman")]
    assert is_similar(words("police kill the gunman"), others, threshold=0.75)
    assert not is_similar(words("police kill the gunman"), others, threshold=0.76)
    assert not is_similar(words("police"), [], threshold=0.1)


# -- texts and filters -------------------------------------------------------------------------------------------------


def test_six_seeds_and_two_kept_tasks_are_shown() -> None:
    kept = [Task(f"New task number {i}.", "", "x") for i in range(5)]
    options = SelfInstruct(num=1)
    shown = shown_tasks(SEEDS, kept, options, 1)
    assert len(set(shown)) == 8 and len(set(shown) & set(kept)) == 2
    assert shown == shown_tasks(SEEDS, kept, options, 1) != shown_tasks(SEEDS, kept, options, 2)
    assert len(set(shown_tasks(SEEDS, [], options, 1))) == 8
    assert shown_tasks(SEEDS[:3], [], options, 1) != [] and len(shown_tasks(SEEDS[:3], [], options, 1)) == 3


def test_prompts_break_off_before_what_is_wanted() -> None:
    assert instruction_prompt([TASK, Task("B\nc.", "", "")]) == (
        "Come up with a series of tasks:\n\nTask 1: Add the numbers of the list.\nTask 2: B c.\nTask 3:"
    )
    assert instance_prompt([TASK, Task("B.", "", "b")], "C.") == (
        "Task: Add the numbers of the list.\nInput: 1, 2\nOutput: 3\n\nTask: B.\nInput: (none)\nOutput: b\n\n"
        "Task: C.\nInput:"
    )


@pytest.mark.parametrize(
    ("text", "has_ended", "pieces"),
    [
        (" Do this.", True, [("Do this.", True)]),
        (" Do this.", False, [("Do this.", False)]),
        (" Do this\nnow:\nTask 10: And th", False, [("Do this now", True), ("And th", False)]),
        (" Do this.\nTask 10:", False, [("Do this.", True)]),
    ],
)
def test_instructions_are_whole_if_something_follows(
    text: str, has_ended: bool, pieces: list[tuple[str, bool]]
) -> None:
    assert split_instructions(Completion(text, has_ended)) == pieces


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Name the capital of a country.", None),
        ("Say no more", "length"),
        ("", "length"),
        ("word " * 151, "length"),
        ("Describe the given image in words.", "keyword"),
        ("Read the file and count lines.", "keyword"),
        ("Draw a horse that is running.", "keyword"),
        ("Discuss how imagery profiles a poem.", None),
        ("- name the capital of France", "first character"),
        ("\u00c9crivez une lettre de motivation.", "first character"),
        ("Put the numbers in ascending order.", "similar"),
    ],
)
def test_each_filter_of_instructions(text: str, reason: str | None) -> None:
    known = [words(task.instruction) for task in SEEDS]
    assert why_not_instruction(text, known, threshold=0.7) == reason


@pytest.mark.parametrize(
    ("text", "has_ended", "found"),
    [
        (" 2, 3\nOutput: 5\n\nTask: next", False, Task("Add.", "2, 3", "5")),
        (" (none)\nOutput: a\nb", True, Task("Add.", "", "a\nb")),
        (" 1\nOutput: 1 and\nInput: 2\nOutput: 2 and", True, Task("Add.", "1", "1 and")),
        (" 2, 3\nOutput: 5", False, "not ended"),
        (" 2, 3\nOutput: \n\nTask: next", False, "empty output"),
        (" 2, 3", True, "empty output"),
        (" 2\nOutput: 2", True, "output equals input"),
        (" 1\nOutput: a\n\nInput: 1\nOutput: b", True, "one input, two outputs"),
    ],
)
def test_each_filter_of_answers(text: str, has_ended: bool, found: Task | str) -> None:
    assert read_instance("Add.", Completion(text, has_ended)) == found


@pytest.mark.parametrize("record", [{"instruction": "a b"}, {"instruction": " ", "output": "x"}, {"output": 1}])
def test_seeds_are_whole_tasks(record: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="s.jsonl, record 1: a seed task has instruction and output"):
        read_seeds([record], where="s.jsonl")


def test_the_built_in_seeds_pass_the_filters() -> None:
    known: list[list[str]] = []
    for task in SEEDS:
        assert why_not_instruction(task.instruction, known, threshold=0.7) is None, task.instruction
        known.append(words(task.instruction))


# -- rounds ------------------------------------------------------------------------------------------------------------

NOUNS = "river stone cloud violin harbour candle garden wolf".split()


def scripted(prompts: Sequence[str], seed: int, is_sampled: bool) -> list[Completion | None]:
    """A model that invents two tasks a prompt, and answers all that are not about stones."""
    found: list[Completion | None] = []
    for place, prompt in enumerate(prompts):
        chance = random.Random(f"{seed} {place}")
        if is_sampled:
            first, second = (" ".join(chance.choices(NOUNS, k=5)) for _ in range(2))
            found.append(Completion(f" Tell {first}.\nTask 10: Sing {second}.\nTask 11: Cut o", has_ended=False))
        elif "stone" in prompt.rpartition("Task:")[2]:
            found.append(Completion(" (none)\nOutput:\n\nTask:", has_ended=False))
        else:
            found.append(Completion(f" (none)\nOutput: It is {seed % 97}.\n\nTask: x", has_ended=False))
    return found


def test_rounds_keep_what_passes_and_count_the_rest() -> None:
    progress = Progress()
    options = SelfInstruct(num=40, seed=1, prompts_per_round=4)
    while len(progress.kept) < options.num:
        run_round(progress, SEEDS, options, scripted)
    assert len({task.instruction for task in progress.kept}) == 40
    assert not any("stone" in task.instruction for task in progress.kept)
    assert progress.dropped["not ended"] == 4 * progress.rounds and progress.dropped["empty output"] > 0
    assert f"round {progress.rounds}   kept 40   dropped" in progress.line()
    every = [words(task.instruction) for task in progress.kept]
    assert not any(is_similar(one, every[:place], threshold=0.7) for place, one in enumerate(every))


def test_prompts_that_are_too_long_are_counted() -> None:
    progress = Progress()
    run_round(progress, SEEDS, SelfInstruct(num=1, prompts_per_round=3), lambda prompts, *_: [None] * len(prompts))
    assert progress.dropped == {"prompt too long": 3} and progress.rounds == 1


# -- the command -------------------------------------------------------------------------------------------------------


def scripted_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_instruct, "completer", lambda *_, **__: scripted)


def test_an_interrupted_run_goes_on_to_the_same_file_which_sft_reads(
    model: Path, example: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted_model(monkeypatch)
    command = ["self-instruct", "--model", str(model), "--num", "20", "--prompts-per-round", "2"]
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert megallm_run([*command, "--out", str(whole)]) == 0
    assert f"20 tasks in {whole}" in capsys.readouterr().out
    assert megallm_run([*command, "--out", str(parts), "--max-rounds", "2"]) == 0
    said = capsys.readouterr().out
    assert "only " in said and "of 20 tasks after 2 rounds" in said and "a higher --max-rounds goes on" in said
    assert 0 < len(parts.read_text().splitlines()) < 20
    with pytest.raises(UsageError, match="is of a run with another seed: delete it, or choose another --out"):
        megallm_run([*command, "--out", str(parts), "--seed", "1"])
    assert megallm_run([*command, "--out", str(parts)]) == 0
    assert parts.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.progress*"))
    keys = [sorted(json.loads(line)) for line in whole.read_text().splitlines()]
    assert keys == [["input", "instruction", "output"]] * 20
    assert example("sft", "--data", whole, "--steps", "2", "--save", tmp_path / "sft") == 0


FLAGS = "--num 2 --max-rounds 2 --prompts-per-round 2 --max-new-tokens 12 --temperature 1 --seed 3 --precision fp64"


def on_rank(rank: int, world: int, model: str, layout: str, out: str) -> None:
    """The command as torchrun starts it; what it counts stays in OUT.progress."""
    launched = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    os.environ.update({key: str(value) for key, value in launched.items()})
    try:
        assert megallm_run(f"self-instruct --model {model} {FLAGS} {layout} --out {out}".split()) == 0
    finally:
        for key in launched:
            del os.environ[key]


def test_a_tiny_model_finds_nothing_says_so_and_counts_alike_on_every_layout(model: Path, tmp_path: Path) -> None:
    found = {}
    for name, world, layout in (("one", 1, ""), ("dp2", 2, ""), ("four", 4, "--tp 2 --pp 2")):
        run_ranks(on_rank, world, str(model), layout, str(tmp_path / name))
        found[name] = (tmp_path / f"{name}.progress").read_bytes()
        assert not (tmp_path / name).exists()
    assert found["one"] == found["dp2"] == found["four"] and json.loads(found["one"])["dropped"]


def test_completions_end_with_the_stop_token_or_for_their_length(model: Path) -> None:
    tokenizer = byte_tokenizer()

    class Scripted:
        def generate(self, prompts: Any, **_: Any) -> list[list[int]]:
            return [[72, 105, 256], [72, 105, 105]][: len(prompts)]

    chat = self_instruct.ChatModel(tokenizer=tokenizer, template=None, max_length=8)
    complete = self_instruct.completer(Scripted(), chat, max_new_tokens=3, temperature=1.0)  # type: ignore[arg-type]
    assert complete(["ab", "a" * 6, "cd"], 0, True) == [Completion("Hi", True), None, Completion("Hii", False)]


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"settings": {}, "rounds": 1, "kept": [{"x": "y"}], "dropped": {}}']
)
def test_damaged_progress_is_named(content: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "o.jsonl.progress").write_text(content)
    with pytest.raises(UsageError, match=r"o\.jsonl\.progress cannot be read as the progress .*: delete it to start"):
        megallm_run(f"self-instruct --model {model} --out {tmp_path / 'o.jsonl'}".split())


@pytest.mark.parametrize(
    ("flags", "words_"),
    [
        ("--num 0", "num (0) must be at least 1"),
        ("--max-rounds 0", "max_rounds (0) must be at least 1"),
        ("--rouge 0", "rouge (0.0) must be above 0"),
        ("--temperature -1", "temperature (-1.0) must be at least 0"),
        ("--seeds none.jsonl", "none.jsonl"),
        ("--seq-length 100", "are more than seq_length (100)"),
        ("--tokenizer nowhere", "no tokenizer at nowhere"),
    ],
)
def test_mistakes_are_told_before_anything_runs(flags: str, words_: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        megallm_run(f"self-instruct --model {model} --out {tmp_path / 'o.jsonl'} {flags}".split())
    assert words_ in str(error.value) and "\n" not in str(error.value)
