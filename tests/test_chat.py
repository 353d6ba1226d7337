"""`megallm chat` and the flags of `megallm generate`: what is said, remembered and refused, on one rank and on four."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megallm.cli.main import run as megallm_run
from megallm.data.tokenizer import byte_tokenizer
from megallm.generate.sampling import Sampling
from megallm.parallel.mesh import Mesh
from megallm.runtime.launch import UsageError
from megallm.testing.pool import run_ranks
from megallm.testing.tiny import tiny_config
from megallm.trainers.engine import Engine
from megallm.trainers.source import open_model

LINES = "Hello\nWho?\n/reset\nHello\n/nonsense\n\n/system Be brief.\nHello\n"
FLAGS = "--max-new-tokens 10 --temperature 0"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat-model")
    tokenizer = byte_tokenizer()
    config = tiny_config(
        "llama", vocab_size=257, eos_token_id=tokenizer.eos_id, num_hidden_layers=2, initializer_range=0.3,
        max_position_embeddings=600,
    )  # fmt: skip
    Engine(config, Mesh.build(), seed=5).save(str(folder))
    tokenizer.save(folder)
    return folder


@contextlib.contextmanager
def stdin(text: str | io.TextIOWrapper) -> Iterator[None]:
    before, sys.stdin = sys.stdin, io.StringIO(text) if isinstance(text, str) else text
    try:
        yield
    finally:
        sys.stdin = before


def talk(model: str, lines: str | io.TextIOWrapper, flags: str = "") -> str:
    """What is printed."""
    out = io.StringIO()
    with stdin(lines), contextlib.redirect_stdout(out):
        assert megallm_run(f"chat --model {model} {FLAGS} {flags}".split()) == 0
    torch.set_num_threads(1)
    return out.getvalue()


def on_rank(rank: int, world_size: int, model: str) -> str:
    launched = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({key: str(value) for key, value in launched.items()})
    try:
        return talk(model, LINES if rank == 0 else "never read\n", "--tp 2 --pp 2")
    finally:
        for key in launched:
            del os.environ[key]


def test_a_conversation_is_remembered_until_it_is_reset(model: Path) -> None:
    first, second, again, help_line, brief = [line for line in talk(str(model), LINES).split("\n") if line]
    assert first == again and len({first, second, brief}) == 3
    assert help_line.startswith("/reset")


def test_four_ranks_say_what_one_says_and_only_the_first_speaks(model: Path) -> None:
    said = run_ranks(on_rank, 4, str(model))
    assert said == [talk(str(model), LINES), "", "", ""]


def test_the_answer_is_the_models(model: Path) -> None:
    """The template of a model without one: alpaca."""
    from megallm.data.chat_model import ChatModel
    from megallm.data.chat_template import ChatTemplate
    from megallm.data.conversation import Message

    source = open_model(str(model))
    engine = Engine(source.config, Mesh.build(), train=False)
    source.load_weights(engine)
    tokenizer = byte_tokenizer()
    chat = ChatModel(tokenizer=tokenizer, template=ChatTemplate.named("alpaca", tokenizer), max_length=600)
    prompt = chat.prompt((Message("user", "Hello"),), new_tokens=10)
    (ids,) = engine.generate([prompt], max_new_tokens=10, sampling=Sampling(stop_ids=chat.stop_ids))
    said, whole = talk(str(model), "Hello\n").rstrip("\n"), tokenizer.decode(ids)
    assert whole.startswith(said) and len(whole) - len(said) <= 3  # a character that is not complete is not shown


def test_a_conversation_that_is_too_long_says_so_and_goes_on(model: Path) -> None:
    said = talk(str(model), "x" * 700 + "\nHello\n").split("\n")
    assert "longer than" in said[0] and "/reset" in said[0] and said[1]


def test_lines_that_are_not_utf8_are_left_out_and_named(model: Path) -> None:
    raw = io.TextIOWrapper(io.BytesIO(b"Hi\xff\n/system \xfe\nHello\n"), encoding="utf-8")
    first, second, answer = talk(str(model), raw).rstrip("\n").split("\n")
    assert first.startswith("line 1 is left out: ") and "not UTF-8" in first and second.startswith("line 2 is left")
    assert answer == talk(str(model), "Hello\n").rstrip("\n")


def test_ctrl_c_stops_the_answer_and_not_the_program(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, asked = Engine.stream, []

    def interrupted(self: Engine, *args: Any, **options: Any) -> Iterator[Any]:
        asked.append(0)
        for token in stream(self, *args, **options):
            asked[-1] += 1
            if len(asked) == 1 and asked[0] == 4:
                os.kill(os.getpid(), signal.SIGINT)
            yield token

    monkeypatch.setattr(Engine, "stream", interrupted)
    before = signal.getsignal(signal.SIGINT)
    first, second = talk(str(model), "Hello\nHello again\n").rstrip("\n").split("\n")
    assert asked == [4, 10] and len(first) <= 4 < len(second)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--tp 2", "1 ranks are not tp x pp = 2"),
        ("--top-p 0", "top_p (0.0)"),
        ("--stop ", "empty stop string"),
        ("--tokenizer nowhere", "no tokenizer at nowhere"),
        ("--seq-length 601", "seq_length (601) is more than"),
        ("--max-new-tokens 0", "max_new_tokens (0) must be at least 1"),
        ("--system \udcff", "--system: the tokenizer cannot encode this text: it holds bytes that are not UTF-8"),
    ],
)
def test_mistakes_are_told_before_anything_is_said(flags: str, words: str, model: Path) -> None:
    with pytest.raises(UsageError) as error:
        megallm_run(["chat", "--model", str(model), *flags.split(" ")])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_generate_writes_samples_with_what_there_is_to_know(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    flags = "--temperature 1 --top-k 50 --top-p 0.99 --min-p 0.001 --repetition-penalty 1.1 --num-samples 3 --logprobs"
    assert megallm_run(f"generate --model {model} --prompt Hi --max-new-tokens 9 {flags} --out {out}".split()) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["sample"] for row in rows] == [0, 1, 2] and len({row["text"] for row in rows}) == 3
    for row in rows:
        assert len(row["token_ids"]) == len(row["logprobs"]) <= 9 and all(each <= 0 for each in row["logprobs"])
        assert row["finish_reason"] in ("stop", "length") and row["prompt"] == "Hi"


def test_generate_reads_the_prompts_that_it_has_written(model: Path, tmp_path: Path) -> None:
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = ["a\u2028b", "c\x85d"]
    given.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))
    command = f"generate --model {model} --max-new-tokens 2 --prompts".split()
    assert megallm_run([*command, str(given), "--out", str(out)]) == 0
    assert megallm_run([*command, str(out), "--out", str(tmp_path / "again.jsonl")]) == 0
    assert (tmp_path / "again.jsonl").read_text() == out.read_text() and out.read_text().count("\n") == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "in.jsonl: is a directory"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}', "in.jsonl:2: not UTF-8"),
        (b'{"prompt": "a"}\n{"text": "b"}', "in.jsonl:2: no key 'prompt'"),
        (b'{"prompt": "\\ud800"}', "in.jsonl, document 1: the tokenizer cannot encode this text: it holds bytes"),
    ],
)
def test_prompts_that_cannot_be_read_are_told_with_their_place(
    content: bytes | None, words: str, model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "in.jsonl"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(UsageError) as error:
        megallm_run(["generate", "--model", str(model), "--prompts", str(file)])
    assert words in str(error.value)


def test_generate_cuts_the_text_at_a_stop_string(model: Path, tmp_path: Path) -> None:
    def text(*flags: str) -> dict[str, Any]:
        out = tmp_path / "out.jsonl"
        words = f"generate --model {model} --prompt Hi --max-new-tokens 60 --temperature 1 --out {out}".split()
        assert megallm_run([*words, *flags]) == 0
        row: dict[str, Any] = json.loads(out.read_text())
        return row

    whole = text()["text"]
    stop = next(whole[i : i + 2] for i in range(4, len(whole)) if "\ufffd" not in whole[i : i + 2])
    row = text("--stop", stop)
    assert row["text"] == whole[: whole.index(stop)] and row["finish_reason"] == "stop_string"
