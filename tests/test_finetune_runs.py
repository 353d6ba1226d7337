"""The programs of fine-tuning from flags to files: train, stop, resume, score, and what a user gets wrong."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megallm.checkpoint.sharded import latest, read_full_tensors
from megallm.cli.main import run as megallm_run
from megallm.data.tokenizer import byte_tokenizer, char_tokenizer
from megallm.parallel.mesh import Mesh
from megallm.runtime.launch import UsageError
from megallm.testing.tiny import tiny_config
from megallm.trainers.engine import Engine
from megallm.trainers.scores import read_calibration

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = (
    "--steps 4 --warmup-steps 0 --seq-length 224 --global-batch-size 4 --micro-batch-size 2 --eval-sequences 8"
).split()
Run = Callable[..., int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of new weights with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    config = tiny_config("llama", vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id)
    Engine(config, Mesh.build(), seed=5).save(str(folder))
    tokenizer.save(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    """A file of each kind of records."""
    rows: dict[str, list[dict[str, Any]]] = {"chats": [], "pairs": [], "ranked": []}
    for i in range(24):
        question, good, bad = f"{i} + {i}?", f"It is {2 * i}.", f"It is {2 * i + 1}, or {i}."
        turns = (("user", question), ("assistant", good))
        rows["chats"].append({"messages": [{"role": role, "content": content} for role, content in turns]})
        rows["pairs"].append({"prompt": question, "chosen": good, "rejected": bad})
        rows["ranked"].append({"prompt": question, "responses": [good, bad, "No."][: 2 + i % 2]})
    files = {}
    for name, each in rows.items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in each))
    return files


@pytest.fixture
def example(model: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`example("sft", "--data", ...)`: its exit code, run in this process on the small model."""

    def call(name: str, *arguments: object, of: Path | None = model) -> int:
        given = [] if of is None else ["--model", str(of)]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *given, *SMALL, *map(str, arguments)])
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        code: int = module.main()
        return code

    return call


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "kind", "flags"),
    [
        ("sft", "chats", []),
        ("sft", "chats", ["--no-pack", "--train-on", "full", "--template", "chatml", "--neftune-alpha", "5"]),
        ("reward", "pairs", []),
        ("reward", "ranked", ["--centering", "0.01"]),
        ("dpo", "pairs", []),
        ("dpo", "pairs", ["--reference", "live", "--dpo-loss", "ipo", "--zero", "3"]),
        ("dpo", "pairs", ["--reference", "none", "--label-smoothing", "0.1"]),
        ("sft", "chats", ["--lora-rank", "4", "--lora-dropout", "0.1", "--zero", "3"]),
        ("reward", "pairs", ["--lora-rank", "2", "--lora-targets", "q_proj", "v_proj"]),
        ("dpo", "pairs", ["--lora-rank", "4", "--reference", "live"]),
        ("dpo", "pairs", ["--lora-rank", "4", "--lora-rslora"]),
        ("sft", "chats", ["--lora-rank", "4", "--lora-base", "nf4", "--offload", "optimizer"]),
        ("dpo", "pairs", ["--lora-rank", "2", "--lora-base", "nf4", "--no-lora-double-quant", "--reference", "live"]),
    ],
)
def test_a_run_leaves_its_files_and_goes_on_where_it_stopped(
    name: str, kind: str, flags: list[str], example: Run, data: dict[str, Path], tmp_path: Path
) -> None:
    arguments = ["--data", data[kind], "--learning-rate", "1e-3", "--lr-schedule", "constant", *flags]
    assert example(name, *arguments, "--save", tmp_path / "whole") == 0
    assert example(name, *arguments, "--save", tmp_path / "parts", "--steps", "2") == 0
    assert example(name, *arguments, "--save", tmp_path / "parts") == 0
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [line["step"] for line in parts] == [1, 2, 3, 4]
    for ours, theirs in zip(whole, parts, strict=True):
        assert ours["loss"] == theirs["loss"] and ours["grad_norm"] == theirs["grad_norm"]
    assert whole[-1]["valid_loss"] == parts[-1]["valid_loss"]
    assert (tmp_path / "whole" / "loss.png").is_file() and (tmp_path / "whole" / "tokenizer.json").is_file()
    if name != "sft":
        assert 0.0 <= whole[-1]["valid_reward_accuracy"] <= 1.0 and "reward_margin" in whole[0]
    pictures = {"sft": set(), "dpo": {"preferences.png"}, "reward": {"preferences.png", "calibration.png"}}
    assert {each.name for each in (tmp_path / "whole").glob("*.png")} == pictures[name] | {"loss.png"}
    weights, others = (dict(read_full_tensors(latest(tmp_path / each))) for each in ("whole", "parts"))
    assert weights.keys() == others.keys()
    for tensor_name, tensor in weights.items():
        assert torch.equal(tensor, others[tensor_name]), tensor_name


def test_epochs_decide_the_steps(example: Run, data: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["--data", data["chats"], "--save", tmp_path / "run", "--no-pack", "--valid-fraction", "0"]
    assert example("sft", *arguments, "--epochs", "1.5", "--steps", "1", "--warmup-steps", "2") == 0
    assert metrics(tmp_path / "run")[-1]["step"] == 9  # 24 records, 4 a step
    with pytest.raises(UsageError, match=r"global_batch_size \(4\) is more than the 2.4 samples of 0.1 epochs"):
        example("sft", *arguments, "--epochs", "0.1")


def test_masks_are_shown(example: Run, data: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert example("sft", "--data", data["chats"], "--show-masks", "2") == 0
    shown = capsys.readouterr().out
    assert "example 2 of" in shown and ">>>It is" in shown and "training data: 23 examples" in shown


def test_a_reward_model_scores_as_it_was_calibrated(
    example: Run, model: Path, data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "reward"
    assert example("reward", "--data", data["pairs"], "--valid-fraction", "0", "--save", saved) == 0
    calibration = json.loads((latest(saved) / "calibration.json").read_text())  # type: ignore[operator]
    command = ["score", "--model", str(saved), "--data", str(data["pairs"])]
    assert megallm_run([*command, "--out", str(tmp_path / "out.jsonl")]) == 0
    assert megallm_run([*command, "--out", str(tmp_path / "raw.jsonl"), "--raw", "--tokens-at-once", "100"]) == 0
    out, raw = (
        [json.loads(line)["scores"] for line in (tmp_path / f"{each}.jsonl").read_text().splitlines()]
        for each in ("out", "raw")
    )
    assert len(out) == 24 and sum(chosen for chosen, _ in out) / 24 == pytest.approx(0.0, abs=1e-6)
    assert raw[3][1] - calibration["mean"] == pytest.approx(out[3][1], abs=1e-6)
    assert "first is best" in capsys.readouterr().out
    with pytest.raises(UsageError, match="is a language model: train a reward model on it"):
        megallm_run(["score", "--model", str(model), "--data", str(data["pairs"])])


def test_scores_are_in_the_order_of_the_record_and_go_with_an_exported_model(
    example: Run, data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, exported, out = tmp_path / "reward", tmp_path / "exported", tmp_path / "out.jsonl"
    assert example("reward", "--data", data["pairs"], "--valid-fraction", "0", "--save", saved, "--steps", "1") == 0
    assert megallm_run(["export", str(saved), str(exported)]) == 0
    row = {"prompt": "1 + 1?", "responses": ["No.", "It is 2.", "It is 3, or 1."]}
    (tmp_path / "plain.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "scored.jsonl").write_text(json.dumps(row | {"scores": [0, 2, 1]}) + "\n")
    found, said = [], []
    for model, file in ((saved, "plain"), (saved, "scored"), (exported, "plain")):
        capsys.readouterr()
        assert megallm_run(f"score --model {model} --data {tmp_path / file}.jsonl --out {out}".split()) == 0
        found.append(json.loads(out.read_text())["scores"])
        said.append(capsys.readouterr().out)
    assert found[1] == pytest.approx(found[0], abs=1e-6) and found[2] == pytest.approx(found[0], abs=1e-6)
    assert len({round(score, 6) for score in found[0]}) == 3
    best = found[0].index(max(found[0]))
    for called_best, line in zip((0, 1, 0), said, strict=True):
        assert f"first is best {float(best == called_best):.1%}" in line


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of new weights with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("reward")
    config = tiny_config("llama", vocab_size=257, head="scalar", tie_word_embeddings=False)
    Engine(config, Mesh.build(), seed=5).save(str(folder))
    byte_tokenizer().save(folder)
    return folder


@pytest.mark.parametrize(
    ("row", "flags", "words"),
    [
        ({"chosen": "b"}, "--seq-length 10", "f.jsonl:1: a response with its prompt has "),
        ({"chosen": "b"}, "--seq-length 10", " tokens, more than seq_length (10): raise it, or take"),
        ({"chosen": "c"}, "", "no comparison left to use: 1 row left out: 1 chosen equals rejected (first: "),
        ({"chosen": "b"}, "--tokens-at-once 0", "tokens_at_once (0) must be at least 1"),
        ({"messages": []}, "--data {f} {g}", "g.jsonl:1 is a ranking record, "),
    ],
)
def test_what_cannot_be_scored_is_told(
    row: dict[str, Any], flags: str, words: str, reward_model: Path, tmp_path: Path
) -> None:
    files = {name: str(tmp_path / f"{name}.jsonl") for name in "fg"}
    Path(files["f"]).write_text(json.dumps({"prompt": "a", "rejected": "c"} | row) + "\n")
    Path(files["g"]).write_text(json.dumps({"prompt": "a", "responses": ["b", "c"]}) + "\n")
    with pytest.raises(UsageError) as error:
        megallm_run(f"score --model {reward_model} --data {files['f']} {flags}".format(**files).split())
    assert words in str(error.value) and "overflow" not in str(error.value)


def test_a_damaged_checkpoint_is_told_before_a_command_runs(reward_model: Path, tmp_path: Path) -> None:
    shutil.copytree(reward_model, tmp_path / "m")
    (shard,) = (tmp_path / "m").glob("step-*/model/*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"shard-00000\.safetensors is damaged or was cut off .* copy the checkpoint"):
        megallm_run(["score", "--model", str(tmp_path / "m"), "--data", "f.jsonl"])


@pytest.mark.parametrize("content", ["{", "[]", '{"mean": 1.0, "median": 2.0}', '{"mean": "x"}', '{"mean": NaN}'])
def test_a_damaged_calibration_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(ValueError, match=r"calibration\.json is damaged .*: copy it again, remove it, or give --raw"):
        read_calibration(tmp_path)


def test_four_ranks_train_and_leave_what_one_rank_resumes(
    example: Run, model: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    arguments = ["--model", model, "--data", data["pairs"], "--save", tmp_path / "run", *SMALL, "--tp", 2, "--pp", 2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "dpo.py"), *map(str, arguments), "--steps", "2"],
        capture_output=True, text=True, timeout=1800, check=False,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert example("dpo", "--data", data["pairs"], "--save", tmp_path / "run") == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("sft", ["--data", "no.jsonl"], "no.jsonl"),
        ("sft", ["--data", "{pairs}"], "a preference record is no conversation"),
        ("sft", ["--data", "{chats}", "--data-format", "alpaca"], "needs the keys instruction and output"),
        ("sft", ["--data", "{chats}", "--template", "alpacca"], "no chat template is called 'alpacca'"),
        ("sft", ["--data", "{chats}", "--template", "no/such.jinja"], "no such file; give one, or one of alpaca"),
        ("sft", ["--data", "{chats}", "--overflow", "refuse", "--seq-length", "16"], "more than max_length (16)"),
        ("sft", ["--data", "{chats}", "--seq-length", "16"], "no answer within max_length (16)"),
        ("sft", ["--data", "{chats}", "--neftune-alpha", "-1"], "neftune_alpha (-1.0) must be 0 or more"),
        ("sft", ["--data", "{chats}", "--epochs", "0"], "epochs (0.0) must be above 0"),
        ("dpo", ["--data", "{chats}"], "preferences are needed"),
        ("dpo", ["--data", "{ranked}"], "pairs are needed (chosen and rejected), this is ranking"),
        ("dpo", ["--data", "{same}"], "no comparison left to use: 1 row left out: 1 chosen equals rejected (first: "),
        ("dpo", ["--data", "{empty}"], "no comparison left to use: 1 row left out: 1 empty response (first: "),
        ("sft", ["--data", "{mute}"], "no conversation left to use: 1 row left out: 1 empty response (first: "),
        ("dpo", ["--data", "{pairs}", "{ranked}"], "ranked.jsonl:1 is a ranking record, "),
        ("sft", ["--data", "{chats}", "--tokenizer", "bytes"], "a tokenizer.json, or a directory that holds one"),
        ("dpo", ["--data", "{pairs}", "--beta", "0"], "beta (0.0) must be above 0"),
        ("dpo", ["--data", "{pairs}", "--label-smoothing", "0.5"], "must be at least 0 and below 0.5"),
        ("dpo", ["--data", "{pairs}", "--dpo-loss", "ipo", "--label-smoothing", "0.1"], "with dpo_loss ipo"),
        ("dpo", ["--data", "{pairs}", "--ipo-sums"], "ipo_sums with dpo_loss sigmoid"),
        ("reward", ["--data", "{chats}"], "preferences are needed"),
        ("sft", ["--data", "{chats}", "--lora-base", "nf4"], "lora_base nf4 with lora_rank 0"),
        ("sft", ["--data", "{chats}", "--lora-rank", "-1"], "lora_rank (-1) must be at least 1, or 0 for no adapters"),
        ("sft", ["--data", "{chats}", "--lora-rank", "2", "--lora-targets", "lm_head"], "this model has no lm_head"),
        ("reward", ["--data", "{pairs}", "--centering", "-1"], "centering (-1.0) must be 0 or more"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    name: str, arguments: list[str], words: str, example: Run, data: dict[str, Path], tmp_path: Path
) -> None:
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    empty = {"prompt": "a", "chosen": "", "rejected": "b"}
    mute = {"instruction": "a", "output": ""}
    for file, row in (("same", same), ("empty", empty), ("mute", mute)):
        (tmp_path / f"{file}.jsonl").write_text(json.dumps(row) + "\n")
        data[file] = tmp_path / f"{file}.jsonl"
    named = {key: str(path) for key, path in data.items()}
    with pytest.raises(UsageError) as error:
        example(name, *(each.format(**named) for each in arguments), "--save", tmp_path / "run")
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model_is_refused(
    example: Run, model: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    config = tiny_config("llama", vocab_size=101)
    Engine(config, Mesh.build(), seed=5).save(str(tmp_path / "small"))
    with pytest.raises(UsageError, match="has no tokenizer.json beside it"):
        example("sft", "--data", data["chats"], of=tmp_path / "small")
    with pytest.raises(UsageError, match="the tokenizer has 257 ids, but .* has a vocabulary of 101"):
        example("sft", "--data", data["chats"], "--tokenizer", model, of=tmp_path / "small")


def test_a_reward_model_is_no_policy(example: Run, data: dict[str, Path], tmp_path: Path) -> None:
    assert example("reward", "--data", data["pairs"], "--save", tmp_path / "reward", "--steps", "1") == 0
    with pytest.raises(UsageError, match="a reward model, with a scalar head: give a language model"):
        example("dpo", "--data", data["pairs"], of=tmp_path / "reward")


def test_adapters_of_the_model_to_start_from_are_part_of_it(
    example: Run, data: dict[str, Path], tmp_path: Path
) -> None:
    """So that adapters off are the model before training: DPO begins at ln 2, whatever the adapters' rank was."""
    lora = ["--lora-rank", "4", "--learning-rate", "1e-2"]
    assert example("sft", "--data", data["chats"], *lora, "--save", tmp_path / "sft") == 0
    for reference in ("precomputed", "live"):
        saved = tmp_path / reference
        arguments = ["--data", data["pairs"], "--lora-rank", "2", "--reference", reference, "--steps", "1"]
        assert example("dpo", *arguments, "--save", saved, of=tmp_path / "sft") == 0
        first = metrics(saved)[0]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(first["reward_margin"]) < 1e-6


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora-rank", "8"], "has adapters with lora_rank 4"),
        (["--lora-rank", "4", "--lora-alpha", "3"], "has adapters with lora_rank 4"),
        (["--lora-rank", "4", "--lora-base", "nf4"], "has adapters beside weights in the model's dtype"),
        ([], "is of a run with adapters"),
    ],
)
def test_a_run_with_other_adapters_does_not_go_on(
    flags: list[str], words: str, example: Run, data: dict[str, Path], tmp_path: Path
) -> None:
    run = ["--data", data["chats"], "--save", tmp_path / "run"]
    assert example("sft", *run, "--lora-rank", "4", "--steps", "1") == 0
    with pytest.raises(UsageError, match=words):
        example("sft", *run, *flags)


def test_going_on_from_another_model_or_data_is_said(
    example: Run, data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example("dpo", "--data", data["pairs"], "--save", tmp_path / "run", "--steps", "1") == 0
    capsys.readouterr()
    other = tmp_path / "other.jsonl"
    other.write_text(data["pairs"].read_text())
    assert example("dpo", "--data", other, "--save", tmp_path / "run", "--steps", "2") == 0
    said = " ".join(capsys.readouterr())
    assert f"was made with --data {data['pairs']}, and goes on with {other}" in said and "--model" not in said.split(
        "was made with"
    )[1].splitlines()[0]


def test_a_look_at_masks_does_not_mind_what_was_saved(
    example: Run, model: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    config = tiny_config("llama", vocab_size=tokenizer.vocab_size, hidden_size=16)
    Engine(config, Mesh.build(), seed=5).save(str(tmp_path / "other"))
    assert example("sft", "--data", data["chats"], "--show-masks", "1", "--save", tmp_path / "other") == 0


def test_a_tokenizer_that_gives_other_ids_is_refused(example: Run, data: dict[str, Path], tmp_path: Path) -> None:
    char_tokenizer(["0123456789+?Itis., or"]).save(tmp_path)
    with pytest.raises(UsageError, match="is another than that of .*: '.*' has id"):
        example("sft", "--data", data["chats"], "--tokenizer", tmp_path)


def test_a_directory_of_adapters_is_no_model(example: Run, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds adapters in peft's format and no model"):
        example("sft", of=tmp_path)
