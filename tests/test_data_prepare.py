"""From paths to tokens: documents, pieces, cache, validation split, errors, and the command."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from megallm.cli import prepare as command
from megallm.config.data import DataConfig
from megallm.data.cache import cached_folder, default_cache_dir
from megallm.data.corpus import corpus_bytes, corpus_names, read_corpus
from megallm.data.documents import open_source, parse_sources, read_pieces
from megallm.data.encode import Progress, encode_sources
from megallm.data.indexed import IndexedDataset, IndexedWriter
from megallm.data.loader import BatchLoader
from megallm.data.prepare import PreparedData, check_token_range, load_or_build, split_position
from megallm.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe

AWKWARD = (
    "def f(x):\r\n    return  x\r\n\r\n\r\nclass A :\n\n\n    y = 1 \n\n'tis\n\tit's 12345\n6789\n);\n\n  (\n"
    "\u4f60\u597d\u3002\n"
    "caf\u00e9\n \n\u2003\nx\u0301\n_\n__\n-- --\n\n\n#!\n"
) * 6
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> str:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return str(path)


def write_txt(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def build(tmp_path: Path, **kwargs: object) -> PreparedData:
    return load_or_build(DataConfig(**{"tokenizer": "bytes", **kwargs}), cache_dir=tmp_path / "cache")  # type: ignore[arg-type]


def ids_of(prepared: PreparedData, part: str = "train") -> list[int]:
    ranges = prepared.train if part == "train" else prepared.valid
    return [int(i) for r in ranges for i in IndexedDataset(r.prefix).tokens[r.start : r.end]]


def run_command(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(flags))


# Documents


def cl100k_like() -> Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(CL100K), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [AWKWARD], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    return Tokenizer(inner)


@pytest.mark.parametrize("make", [lambda: train_bpe([AWKWARD], 600), cl100k_like], ids=["gpt2", "cl100k"])
def test_pieces_have_the_ids_of_the_whole(tmp_path: Path, make: object) -> None:
    tokenizer: Tokenizer = make()  # type: ignore[operator]
    assert tokenizer.can_cut_at_lines()
    for name, path in (
        ("txt", write_txt(tmp_path / "a.txt", AWKWARD)),
        ("jsonl", write_jsonl(tmp_path / "a.jsonl", [AWKWARD])),
    ):
        for size in (5, 17, 40, 200):
            pieces = list(read_pieces(open_source(path, text_key="text"), size=size))
            assert len(pieces) > 3 and "".join(piece.text for piece in pieces) == AWKWARD, name
            assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
            ids = [i for piece in pieces for i in tokenizer.encode(piece.text)]
            assert ids == tokenizer.encode(AWKWARD), (name, size)


def test_tokenizer_with_a_mark_at_the_start_gets_whole_documents(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("\u2581\nab</s>")}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer = Tokenizer(inner)
    assert not tokenizer.can_cut_at_lines()
    text = "ab\n" * 50_000
    encode_sources(
        [open_source(write_txt(tmp_path / "a.txt", text), text_key="text")], tmp_path / "t", tokenizer=tokenizer
    )
    assert IndexedDataset(tmp_path / "t").tokens.tolist() == tokenizer.encode(text)


def test_text_is_taken_as_it_is(tmp_path: Path) -> None:
    for text in ("a\r\nb\n\n", "\u00e9" * 70_000, "one line"):
        pieces = list(read_pieces(open_source(write_txt(tmp_path / "a.txt", text), text_key="text")))
        assert "".join(piece.text for piece in pieces) == text


@pytest.mark.parametrize(
    "line, message",
    [
        ("{broken", "line 3: not JSON"),
        ('{"body": "x"}', r"line 3: no key 'text'; its keys are \['body'\]"),
        ('{"text": 5}', "line 3: 'text' is int, not a string"),
        ("[1]", "line 3: a JSON object is needed, this is list"),
        ('{"text": "\\ud800"}', "line 3: .*surrogate"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        build(tmp_path, data=(str(file),))
    assert not list((tmp_path / "cache" / "tokens").glob("*.tmp*"))


def test_bad_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.parquet").write_text("x")
    (tmp_path / "half.bin").write_text("x")
    for name, kind, message in (
        ("missing.txt", FileNotFoundError, "does not exist"),
        ("empty.txt", ValueError, "is empty"),
        ("a.parquet", ValueError, r"unknown extension '\.parquet'"),
        ("half", FileNotFoundError, r"half\.idx is missing"),
        (".", ValueError, "is a directory"),
    ):
        with pytest.raises(kind, match=message):
            build(tmp_path, data=(str(tmp_path / name),))
    with pytest.raises(ValueError, match="no tokens"):
        build(tmp_path, data=(write_jsonl(tmp_path / "none.jsonl", ["", ""]),))
    with pytest.raises(ValueError, match="not UTF-8 near byte 0"):
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
        build(tmp_path, data=(str(tmp_path / "latin.txt"),))


@pytest.mark.parametrize("data", [("a", "b"), ("1", "x", "2"), ("0", "x"), ("nan", "x")])
def test_bad_weights_are_refused(data: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="weight path"):
        parse_sources(data, text_key="text")


# Tokens and validation


def test_documents_are_ended_by_the_end_mark(tmp_path: Path) -> None:
    prepared = build(tmp_path, data=(write_jsonl(tmp_path / "a.jsonl", ["ab", "", "c"]),), valid_fraction=0.0)
    assert ids_of(prepared) == [97, 98, 256, 99, 256]
    assert (prepared.vocab_size, prepared.valid) == (257, ())


def test_last_documents_are_for_validation(tmp_path: Path) -> None:
    texts = [f"{i:02d}" for i in range(40)]
    prepared = build(tmp_path, data=(write_jsonl(tmp_path / "a.jsonl", texts),), valid_fraction=0.05)
    assert prepared.tokenizer is not None
    assert prepared.tokenizer.decode(ids_of(prepared, "valid")) == "3839"
    assert prepared.tokenizer.decode(ids_of(prepared)) == "".join(texts[:38])


def test_of_one_document_the_last_tokens_are_for_validation(tmp_path: Path) -> None:
    path = write_txt(tmp_path / "a.txt", "abcdefghij" * 10)
    prepared = build(tmp_path, data=(path,), tokenizer="chars", valid_fraction=0.1)
    assert prepared.tokenizer is not None and prepared.tokenizer.eos_id is None
    assert (prepared.vocab_size, len(ids_of(prepared)), ids_of(prepared, "valid")) == (10, 90, list(range(10)))


def test_chars_of_several_documents_have_an_end_mark(tmp_path: Path) -> None:
    prepared = build(
        tmp_path, data=(write_jsonl(tmp_path / "a.jsonl", ["b", "a"]),), tokenizer="chars", valid_fraction=0.0
    )
    assert ids_of(prepared) == [1, 2, 0, 2]


def test_chars_cover_the_validation_text(tmp_path: Path) -> None:
    data, valid = write_txt(tmp_path / "a.txt", "aac"), write_txt(tmp_path / "v.txt", "ab")
    prepared = build(tmp_path, data=(data,), valid_data=(valid,), tokenizer="chars")
    assert (ids_of(prepared), ids_of(prepared, "valid")) == ([0, 0, 2, 3], [0, 1, 3])


def test_weights_reach_the_blend(tmp_path: Path) -> None:
    first, second = write_txt(tmp_path / "a.txt", "a" * 400), write_txt(tmp_path / "b.txt", "b" * 400)
    prepared = build(tmp_path, data=("3", first, "1", second), valid_fraction=0.1)
    assert [part.weight for part in prepared.train] == [3.0, 1.0] == [part.weight for part in prepared.valid]
    batch = BatchLoader(prepared.train_dataset(seq_length=8, seed=0), global_batch_size=16).batch(0)
    assert sorted(batch["input_ids"][:, 0].tolist()) == [97] * 12 + [98] * 4


def test_short_validation_part_is_left_out_but_short_valid_data_is_an_error(tmp_path: Path) -> None:
    path = write_txt(tmp_path / "a.txt", "a" * 100)
    assert build(tmp_path, data=(path,)).valid_dataset(seq_length=16) is None
    assert build(tmp_path, data=(path,), valid_fraction=0.5).valid_dataset(seq_length=16) is not None
    short = build(tmp_path, data=(path,), valid_data=(write_txt(tmp_path / "v.txt", "a" * 5),))
    with pytest.raises(ValueError, match="fewer than one sample"):
        short.valid_dataset(seq_length=16)
    with pytest.raises(ValueError, match="fewer than one sample"):
        short.train_dataset(seq_length=500, seed=0)


def test_ids_beyond_a_vocabulary_are_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", vocab_size=600) as writer:
        writer.add([3, 511])
    check_token_range(tmp_path / "x", 512)
    with pytest.raises(ValueError, match="token id 511, but the vocabulary has 511"):
        check_token_range(tmp_path / "x", 511)
    with pytest.raises(ValueError, match="vocabulary has 257"):
        build(tmp_path, data=(str(tmp_path / "x"),))
    prepared = build(tmp_path, data=(str(tmp_path / "x"),), tokenizer=None)
    assert (prepared.tokenizer, prepared.vocab_size) == (None, 512)


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    source = open_source(write_txt(tmp_path / "a.txt", "abc"), text_key="text")
    encode_sources([source], tmp_path / "x", tokenizer=byte_tokenizer())
    train_bpe(["abc"], 300).save(tmp_path)
    with pytest.raises(ValueError, match="another vocabulary"):
        build(tmp_path, data=(str(tmp_path / "x"),), tokenizer=None)


# Cache


def test_second_call_reads_the_cache_and_changed_text_is_tokenised_again(tmp_path: Path) -> None:
    calls: list[Progress] = []
    path = write_jsonl(tmp_path / "a.jsonl", ["the cat " * 50] * 9)
    config = DataConfig(data=(path,), tokenizer_vocab_size=280)
    first = load_or_build(config, cache_dir=tmp_path / "cache", progress=calls.append)
    assert calls and calls[-1].percent == 100.0
    count = len(calls)
    second = load_or_build(config, cache_dir=tmp_path / "cache", progress=calls.append)
    assert (second.train, second.valid, len(calls)) == (first.train, first.valid, count)
    write_jsonl(tmp_path / "a.jsonl", ["the dog " * 60] * 9)
    third = load_or_build(config, cache_dir=tmp_path / "cache", progress=calls.append)
    assert third.tokenizer is not None and len(calls) > count
    assert third.tokenizer.decode(ids_of(third)).startswith("the dog")


def _build_slowly(parent: Path, log: Path) -> None:
    def build(folder: Path) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        (folder / "first").write_text("1")
        time.sleep(0.2)
        (folder / "second").write_text("2")

    folder = cached_folder(parent, "key", build)
    assert (folder / "second").read_text() == "2"


def test_of_several_processes_one_builds(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_build_slowly, args=(tmp_path / "c", tmp_path / "log")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len((tmp_path / "log").read_text().split()) == 1
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["key", "key.lock"]


def test_lost_race_without_locks_keeps_the_winner(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (tmp_path / "key").mkdir()
        (tmp_path / "key" / "file").write_text("winner")
        (folder / "file").write_text("late")

    assert (cached_folder(tmp_path, "key", build) / "file").read_text() == "winner"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached_folder(tmp_path, "key", build)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]


def test_cache_dir_follows_the_environment() -> None:
    assert default_cache_dir({}, Path("/home/u")) == Path("/home/u/.cache/megallm")
    assert default_cache_dir({"XDG_CACHE_HOME": "/x"}, Path("/home/u")) == Path("/x/megallm")


# Embedded corpus


def test_corpus_is_the_standard_library_in_a_fixed_shuffled_order() -> None:
    names = corpus_names()
    assert names == corpus_names() != sorted(names)
    assert 5_000_000 < corpus_bytes() < 40_000_000
    assert {"lib/argparse.py", "lib/json/decoder.py"} < set(names)
    assert any(name.startswith("topic/") for name in names)
    assert not any("site-packages" in name or "/test/" in name or "pydoc_data" in name for name in names)
    read = [name for name, _ in read_corpus()]
    assert read == [name for name in names if name in set(read)] and len(read) > 0.98 * len(names)


# Command


def test_command_writes_what_data_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write_jsonl(tmp_path / "a.jsonl", ["ab c"] * 30, key="body"), tmp_path / "out" / "x.v1"
    flags = ["--data", path, "--out", str(out), "--text-key", "body", "--cache-dir", str(tmp_path / "c")]
    assert run_command(*flags, "--tokenizer-vocab-size", "270", "--valid-fraction", "0.1") == 0
    assert "documents 27" in capsys.readouterr().out
    assert sorted(f.name for f in out.parent.iterdir()) == sorted(
        ["tokenizer.json", *(f"x.v1{part}.{end}" for part in ("", "_valid") for end in ("bin", "idx", "info.json"))]
    )
    prepared = build(tmp_path, data=(str(out),), tokenizer=None)
    assert prepared.tokenizer is not None
    assert prepared.tokenizer.decode(ids_of(prepared)) == "ab c" * 27
    assert prepared.tokenizer.decode(ids_of(prepared, "valid")) == "ab c" * 3
    assert len(IndexedDataset(f"{out}_valid")) == 3
    assert build(tmp_path, data=(f"{out}.bin",), tokenizer=None).train == prepared.train


def test_command_puts_files_one_after_the_other(tmp_path: Path) -> None:
    paths = [write_txt(tmp_path / f"{name}.txt", name) for name in "ab"]
    run_command(
        "--data", *paths, "--out", str(tmp_path / "o" / "x"), "--tokenizer", "chars", "--cache-dir", str(tmp_path)
    )
    assert IndexedDataset(tmp_path / "o" / "x").tokens.tolist() == [0, 2, 1, 2]


def test_command_does_not_replace_a_tokenizer_that_others_need(tmp_path: Path) -> None:
    path = write_txt(tmp_path / "a.txt", "abc")
    run_command("--data", path, "--out", str(tmp_path / "o" / "x"), "--tokenizer", "bytes")
    with pytest.raises(ValueError, match=r"is another tokenizer, of .*x\.bin"):
        run_command(
            "--data", path, "--out", str(tmp_path / "o" / "y"), "--tokenizer", "chars", "--cache-dir", str(tmp_path)
        )
    assert not (tmp_path / "o" / "y.bin").exists()
    run_command(
        "--data", path, "--out", str(tmp_path / "o" / "x"), "--tokenizer", "chars", "--cache-dir", str(tmp_path)
    )
    assert Tokenizer.from_path(tmp_path / "o").vocab_size == 3


def test_command_removes_the_validation_part_of_an_earlier_run(tmp_path: Path) -> None:
    flags = [
        "--data",
        write_txt(tmp_path / "a.txt", "abc" * 9),
        "--out",
        str(tmp_path / "o" / "x"),
        "--tokenizer",
        "bytes",
    ]
    run_command(*flags, "--valid-fraction", "0.5")
    run_command(*flags)
    assert sorted(f.name for f in (tmp_path / "o").iterdir()) == ["tokenizer.json", "x.bin", "x.idx", "x.info.json"]


def test_tinyshakespeare_by_characters_as_in_nanogpt(tmp_path: Path) -> None:
    file = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinyshakespeare.txt"
    if not file.is_file():
        pytest.skip(f"{file.name} is not beside the repository")
    out = tmp_path / "shakespeare"
    flags = ["--tokenizer", "chars", "--valid-fraction", "0.1", "--cache-dir", str(tmp_path / "c")]
    run_command("--data", str(file), "--out", str(out), *flags)
    text = file.read_text(encoding="utf-8")
    prepared = build(tmp_path, data=(str(out),), tokenizer=None)
    cut = int(len(text) * 0.9)
    rank = {character: i for i, character in enumerate(sorted(set(text)))}
    assert prepared.vocab_size == 65
    assert ids_of(prepared) == [rank[c] for c in text[:cut]]
    assert ids_of(prepared, "valid") == [rank[c] for c in text[cut:]]


def test_split_position_of_documents_and_tokens(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", vocab_size=9) as writer:
        for length in (4, 3, 2, 1):
            writer.add([1] * length)
            writer.end_document()
    tokens = IndexedDataset(tmp_path / "x")
    assert [split_position(tokens, fraction) for fraction in (0.25, 0.5, 0.99, 0.1)] == [9, 7, 4, 9]
