"""`megallm judge`: probabilities are those of full logits, orders cancel, layouts agree, trainers read the output."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_finetune_runs import Run, example

from megallm.cli.main import run as megallm_run
from megallm.data.chat_model import ChatModel
from megallm.data.chat_template import ChatTemplate
from megallm.data.constitution import DEFAULT, preference_principle, preference_question, read_constitution, show
from megallm.data.conversation import Message
from megallm.data.judged import Judged
from megallm.data.templates import TEMPLATES
from megallm.data.tokenizer import byte_tokenizer, char_tokenizer
from megallm.parallel.mesh import Mesh
from megallm.runtime.launch import UsageError
from megallm.testing.pool import run_ranks
from megallm.testing.tiny import tiny_config
from megallm.trainers.engine import Engine
from megallm.trainers.judge import Verdict, ask, judge

__all__ = ["example"]

TOKENIZER = byte_tokenizer()
WIDE: dict[str, Any] = {"num_hidden_layers": 2, "initializer_range": 0.3, "max_position_embeddings": 2048}
CONFIG = tiny_config("llama", vocab_size=TOKENIZER.vocab_size, eos_token_id=TOKENIZER.eos_id, **WIDE)
Judge = Callable[..., int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of wide new weights, which answer differently to different questions, with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    Engine(CONFIG, Mesh.build(), seed=5).save(str(folder))
    TOKENIZER.save(folder)
    return folder


@pytest.fixture
def judge_files(model: Path, tmp_path: Path) -> Judge:
    """`judge_files({"prompt": ...}, ..., flags="...")`: the command's exit code; writes out.jsonl."""

    def call(*rows: dict[str, Any], flags: str = "") -> int:
        write(tmp_path / "in.jsonl", rows)
        paths = f"--model {model} --data {tmp_path / 'in.jsonl'} --out {tmp_path / 'out.jsonl'}"
        return megallm_run(f"judge {paths} --max-new-tokens 12 {flags}".split())

    return call


def write(file: Path, rows: Any) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def pair(number: int) -> dict[str, Any]:
    return {"prompt": f"What is {number}?", "chosen": f"It is {number}.", "rejected": f"{number + 1}, or less."}


def chat(template: str = "alpaca") -> ChatModel:
    return ChatModel(tokenizer=TOKENIZER, template=ChatTemplate.named(template, TOKENIZER), max_length=2048)


def answer_logprob(engine: Engine, text: str, tail: str) -> float:
    """log p of the bytes of `tail` behind `text`, from the logits of every position."""
    ids = list((text + tail).encode())
    (logits,) = engine.forward({"input_ids": torch.tensor([ids])}, lambda out, part: out.gathered())
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    return math.fsum(float(logprobs[at - 1, ids[at]]) for at in range(len(text.encode()), len(ids)))


def test_probabilities_are_those_of_the_full_logits(judge_files: Judge, model: Path, tmp_path: Path) -> None:
    """The questions are written out here, with the template's text around them."""
    assert judge_files(*map(pair, range(5)), flags="--precision fp64 --seed 3") == 0
    engine = Engine(CONFIG, Mesh.build(), precision="fp64", train=False)
    engine.load(str(model), weights_only=True)
    for number, row in enumerate(read(tmp_path / "out.jsonl")):
        principle, good, bad = preference_principle(DEFAULT, seed=3, record=number), *list(pair(number).values())[1:]
        found = []
        for first, second in ((good, bad), (bad, good)):
            text = (
                "Below is an instruction that describes a task. Write a response that appropriately completes the "
                "request.\n\n### Instruction:\nHere is a conversation between a human and an assistant, and two ways "
                f"to go on.\n\nHuman: What is {number}?\n\n{principle.preference}\n\n(A) {first}\n\n(B) {second}\n\n"
                "Answer with (A) or (B) alone.\n\n### Response:\n"
            )
            a, b = (answer_logprob(engine, text, answer) for answer in ("(A)", "(B)"))
            found.append(math.exp(a) / (math.exp(a) + math.exp(b)))
        expected = (found[0] + 1.0 - found[1]) / 2
        assert row["probability"] == pytest.approx(max(expected, 1.0 - expected), abs=2e-6) and "margin" not in row
        assert (row["chosen"], row["rejected"]) == ((good, bad) if expected > 0.5 else (bad, good))
        assert row["principle"] == principle.name and row["prompt"] == f"What is {number}?"
    assert max(2 * row["probability"] - 1 for row in read(tmp_path / "out.jsonl")) > 0.1


def test_the_order_of_a_record_does_not_matter(judge_files: Judge, tmp_path: Path) -> None:
    """Asked in both orders, a pair and its mirror get one label; asked in one, the place counts."""
    mirrored = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in map(pair, range(4))]
    labels = {}
    for flags in ("", "--one-order"):
        for name, rows in (("as it is", list(map(pair, range(4)))), ("mirrored", mirrored)):
            assert judge_files(*rows, flags=f"--precision fp64 {flags}") == 0
            labels[flags, name] = read(tmp_path / "out.jsonl")
    assert labels["", "as it is"] == labels["", "mirrored"]
    assert labels["--one-order", "as it is"] != labels["--one-order", "mirrored"]


def test_all_principles_are_averaged() -> None:
    engine = Engine(CONFIG, Mesh.build(), precision="fp64", seed=5, train=False)
    responses = tuple((Message("assistant", text),) for text in ("Yes, gladly.", "No."))
    item = Judged(number=0, prompt=(Message("user", "Will you?"),), responses=responses)
    both, _ = ask([item], chat(), DEFAULT, seed=0, every=True, both_orders=True)
    (verdict,) = judge(engine, both)
    alone = [judge(engine, ask([item], chat(), (each,), seed=0, every=False, both_orders=True)[0]) for each in DEFAULT]
    assert verdict.principle == "all"
    assert verdict.first_better == pytest.approx(sum(one[0].first_better for one in alone) / len(DEFAULT), abs=2e-6)


def test_a_verdict_says_whether_orders_agree() -> None:
    item = Judged(number=0, prompt=(Message("user", "?"),), responses=((Message("assistant", "a"),),) * 2)

    def verdict(*by_order: float) -> Verdict:
        return Verdict(pair=item, principle="x", by_order=by_order, says_a=0.5)

    assert verdict(0.9, 0.7).orders_agree and verdict(0.9, 0.7).first_better == 0.8
    assert verdict(0.9, 0.7).margin == 0.6 and verdict(0.1, 0.3).margin == 0.6
    assert not verdict(0.9, 0.2).orders_agree and verdict(0.3).orders_agree


def test_near_ties_and_disagreements_are_left_out_and_counted(
    judge_files: Judge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(map(pair, range(8)))
    assert judge_files(*rows) == 0
    margins = sorted(2 * row["probability"] - 1 for row in read(tmp_path / "out.jsonl"))
    said = capsys.readouterr().out
    disagree = int(said.split("orders disagree ")[1].split()[0])
    assert "records 8   judged 8   kept 8   near ties 0" in said and 0 < disagree < 8
    assert judge_files(*rows, flags=f"--min-margin {margins[3] - 1e-7}") == 0
    assert sorted(2 * row["probability"] - 1 for row in read(tmp_path / "out.jsonl")) == margins[3:]
    assert "kept 5   near ties 3" in capsys.readouterr().out
    assert judge_files(*rows, flags="--agreeing") == 0
    assert len(read(tmp_path / "out.jsonl")) == 8 - disagree
    before = (tmp_path / "out.jsonl").read_bytes()
    assert judge_files(*rows, flags="--min-margin 0.99999") == 1
    assert "nothing is left" in capsys.readouterr().out and (tmp_path / "out.jsonl").read_bytes() == before


def test_prompts_alone_get_two_sampled_responses(judge_files: Judge, model: Path, tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [{"prompt": [system, {"role": "user", "content": f"{i}?"}]} for i in range(3)]
    assert judge_files(*rows, flags="--seed 1") == 0
    first = read(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in first] == [row["prompt"] for row in rows]
    assert all(row["chosen"] and row["rejected"] and row["chosen"] != row["rejected"] for row in first)
    assert judge_files(*rows, flags=f"--seed 1 --policy {model}") == 0
    assert read(tmp_path / "out.jsonl") == first
    assert judge_files(*rows, flags="--seed 2") == 0
    assert read(tmp_path / "out.jsonl") != first


def test_greedy_pairs_are_equal_and_left_out(judge_files: Judge, capsys: pytest.CaptureFixture[str]) -> None:
    assert judge_files({"prompt": "a?"}, flags="--temperature 0") == 1
    assert "1 two equal sampled responses (first: " in capsys.readouterr().out


@pytest.mark.parametrize("given", [{"prompt": "a?"}, {"prompt": "a?", "completion": "It is so."}])
def test_revisions_are_preferred_to_the_original(given: dict[str, str], judge_files: Judge, tmp_path: Path) -> None:
    assert judge_files(given, flags="--revise 2") == 0
    (row,) = read(tmp_path / "out.jsonl")
    assert list(row) == ["prompt", "chosen", "rejected", "steps"] and len(row["steps"]) == 2
    assert all(sorted(step) == ["critique", "principle", "revision"] for step in row["steps"])
    assert row["chosen"] == row["steps"][1]["revision"] and row["rejected"] == given.get("completion", row["rejected"])
    assert judge_files(given, flags="--revise 2 --out-format sft") == 0
    (alone,) = read(tmp_path / "out.jsonl")
    assert alone == {"prompt": "a?", "completion": row["chosen"], "steps": row["steps"]}


RUNS = {
    "pairs": "--data pairs.jsonl",
    "sampled": "--data prompts.jsonl --seed 4 --template chatml",
    "revised": "--data prompts.jsonl --revise 1",
}


def on_rank(rank: int, world: int, folder: str, model: str, layout: str, name: str) -> None:
    """The commands of RUNS as torchrun starts them."""
    os.chdir(folder)
    launched = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    os.environ.update({key: str(value) for key, value in launched.items()})
    try:
        for run, flags in RUNS.items():
            out = f"{name}-{run}.jsonl"
            command = f"judge --model {model} --max-new-tokens 8 --precision fp64 {flags} {layout} --out {out}"
            assert megallm_run(command.split()) == 0
    finally:
        for key in launched:
            del os.environ[key]


def test_every_layout_writes_the_same_bytes(model: Path, tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", map(pair, range(3)))
    write(tmp_path / "prompts.jsonl", ({"prompt": f"Say {'so ' * i}it."} for i in range(3)))
    for name, world, layout in (("one", 1, ""), ("dp2", 2, ""), ("four", 4, "--tp 2 --pp 2")):
        run_ranks(on_rank, world, str(tmp_path), str(model), layout, name)
    for run in RUNS:
        one = (tmp_path / f"one-{run}.jsonl").read_bytes()
        assert len(one.splitlines()) == 3
        for name in ("dp2", "four"):
            assert (tmp_path / f"{name}-{run}.jsonl").read_bytes() == one, (name, run)


def test_a_hugging_face_directory_judges_as_the_checkpoint(model: Path, judge_files: Judge, tmp_path: Path) -> None:
    assert judge_files(*map(pair, range(2))) == 0
    assert megallm_run(["export", str(model), str(tmp_path / "hf")]) == 0
    command = f"judge --model {tmp_path / 'hf'} --data {tmp_path / 'in.jsonl'} --out {tmp_path / 'hf.jsonl'}"
    assert megallm_run(command.split()) == 0
    assert read(tmp_path / "hf.jsonl") == read(tmp_path / "out.jsonl")


def test_dpo_reward_and_sft_train_on_what_is_written(judge_files: Judge, example: Run, tmp_path: Path) -> None:
    assert judge_files(*map(pair, range(4))) == 0
    flags = ["--data", tmp_path / "out.jsonl", "--valid-fraction", "0", "--steps", "1"]
    assert example("dpo", *flags, "--save", tmp_path / "dpo") == 0
    assert example("reward", *flags, "--save", tmp_path / "reward") == 0
    assert judge_files(*({"prompt": f"{i}?"} for i in range(4)), flags="--revise 1 --out-format sft") == 0
    assert example("sft", *flags, "--save", tmp_path / "sft") == 0
    with pytest.raises(UsageError, match="is a reward model, with a scalar head: a language model is needed"):
        megallm_run(["judge", "--model", str(tmp_path / "reward"), "--data", "x.jsonl", "--out", "y.jsonl"])


@pytest.mark.parametrize("template", [*TEMPLATES, None])
def test_answers_are_told_apart_behind_every_template(template: str | None) -> None:
    asked = ChatModel(tokenizer=TOKENIZER, template=None, max_length=2048) if template is None else chat(template)
    responses = ((Message("assistant", "a"),), (Message("assistant", "b"),))
    first, second = asked.choices(preference_question(DEFAULT[0], (Message("user", "?"),), *responses), ("(A)", "(B)"))
    assert first.start == second.start and first.ids[: first.start] == second.ids[: first.start]
    assert bytes(first.ids[first.start :]) == b"A)" and bytes(second.ids[second.start :]) == b"B)"
    assert first.ids[first.start - 1] == ord("(")


def test_a_constitution_is_shown_as_it_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert megallm_run(["judge", "--show-constitution"]) == 0
    (tmp_path / "own.json").write_text(capsys.readouterr().out)
    assert read_constitution(str(tmp_path / "own.json")) == DEFAULT
    assert show(DEFAULT).isascii() and len({each.name for each in DEFAULT}) == len(DEFAULT)


def test_principles_follow_the_seed_and_all_of_them_come() -> None:
    chosen = [[preference_principle(DEFAULT, seed=seed, record=i).name for i in range(200)] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert all(20 < chosen[0].count(each.name) < 65 for each in DEFAULT)


GOOD = {"name": "n", "critique": "c", "revision": "r", "preference": "p"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "not JSON"),
        ("{}", "a list of one principle or more"),
        ("[]", "a list of one principle or more"),
        ("[1]", "principle 1: an object with the keys name, critique, revision, preference is needed"),
        (json.dumps([GOOD, {"name": "x", "critique": "c"}]), "principle 2: the keys revision, preference are missing"),
        (json.dumps([GOOD | {"weight": 1}]), "unknown keys weight"),
        (json.dumps([GOOD | {"critique": " "}]), "critique must be a text that is not empty"),
        (json.dumps([GOOD | {"revision": 1}]), "revision must be a text that is not empty"),
        (json.dumps([GOOD, GOOD]), "two principles are called 'n'"),
    ],
)
def test_a_malformed_constitution_is_refused(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(UsageError) as error:
        megallm_run(["judge", "--model", "x", "--constitution", str(tmp_path / "c.json")])
    assert words in str(error.value) and "c.json" in str(error.value)


@pytest.mark.parametrize(
    ("row", "flags", "words"),
    [
        (pair(1), "--constitution no.json", "no.json"),
        (pair(1), "--seq-length 64", "no record left to use: 1 row left out: 1 longer than seq_length (64)"),
        ({"prompt": "a?"}, "--seq-length 150", "longer than seq_length (150)"),
        ({"prompt": "a?"}, "--revise 1 --seq-length 150", "longer than seq_length (150)"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "", "1 chosen equals rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "", "1 empty response"),
        ({"prompt": "a", "responses": ["b", "c", "d"]}, "", "3 response(s) in a ranking record: give two"),
        ({"prompt": "a", "completion": "b"}, "", "1 response(s) in a prompt_completion record: give two"),
        (pair(1), "--revise 1", "2 response(s) in a preference record: --revise takes one"),
        ({"text": "a"}, "", "a text has no prompt"),
        ({"question": "a"}, "", "fit no format"),
        (pair(1), "--min-margin 1", "min_margin (1.0) must be at least 0 and below 1"),
        (pair(1), "--agreeing --one-order", "there is one order only"),
        (pair(1), "--revise -1", "revise (-1) must be 0"),
        (pair(1), "--out-format sft", "give --revise N"),
        (pair(1), "--max-new-tokens 0", "max_new_tokens (0) must be at least 1"),
        (pair(1), "--temperature -1", "temperature (-1.0) must be at least 0"),
        (pair(1), "--tokens-at-once 0", "tokens_at_once (0) must be at least 1"),
        (pair(1), "--template alpacca", "no chat template is called 'alpacca'"),
        (pair(1), "--policy nowhere/at/all", "no such model directory"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    row: dict[str, Any], flags: str, words: str, judge_files: Judge, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as error:
        judge_files(row, flags=flags)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_model_needs_a_tokenizer_that_fits_and_positions(tmp_path: Path) -> None:
    Engine(tiny_config("gpt2", vocab_size=257), Mesh.build(), seed=5).save(str(tmp_path / "m"))
    write(tmp_path / "in.jsonl", [pair(1)])
    command = f"judge --model {tmp_path / 'm'} --data {tmp_path / 'in.jsonl'} --out {tmp_path / 'o.jsonl'}".split()
    with pytest.raises(UsageError, match="has no tokenizer.json beside it"):
        megallm_run(command)
    with pytest.raises(UsageError, match="--model and --data and --out must be given"):
        megallm_run(["judge"])
    TOKENIZER.save(tmp_path / "m")
    with pytest.raises(UsageError, match=r"longer than seq_length \(64\)"):
        megallm_run(command)
    with pytest.raises(UsageError, match=r"seq_length \(65\) is more than .* has positions \(64\)"):
        megallm_run([*command, "--seq-length", "65"])
    char_tokenizer(["What is 1?"], end_mark=True).save(tmp_path / "m")
    with pytest.raises(UsageError, match="the tokenizer cannot encode this text: its vocabulary of"):
        megallm_run([*command, "--template", "plain"])


def test_questions_that_do_not_fit_are_counted() -> None:
    long = Judged(
        number=0,
        prompt=(Message("user", "?"),),
        responses=((Message("assistant", "a" * 2000),), (Message("assistant", "b"),)),
    )
    asked, dropped = ask([long], chat(), DEFAULT, seed=0, every=False, both_orders=True)
    assert asked == [] and dropped.counts == {"longer than seq_length (2048)": 1}
