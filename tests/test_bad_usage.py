"""What a user gets wrong: one clear line on stderr, exit code 2, before any rank talks to another."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "pretrain_gpt.py"
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def run(arguments: list[str], *, folder: Path, world_size: int = 1, program: str = "example") -> tuple[int, str]:
    """(exit code, stderr) of the example, of another one by its name or of `megallm`, as rank 0 of `world_size`, in a
    process of its own.

    No process group can exist: the other ranks do not. A program that waited for them would not return.
    """
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    child = fork.Process(target=_child, args=(send, arguments, folder, world_size, program))
    child.start()
    child.join(60)
    assert child.exitcode is not None, "still running after 60 s"
    return child.exitcode, receive.recv() if receive.poll() else ""


def _child(send: Any, arguments: list[str], folder: Path, world_size: int, program: str) -> None:
    os.chdir(folder)
    sys.argv = ["pretrain_gpt.py", *arguments]
    if world_size > 1:
        os.environ.update(dict.fromkeys(LAUNCH, "0") | {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": "1"})
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    said = io.StringIO()
    code = 0
    leave = os._exit
    os._exit = lambda status: (_ for _ in ()).throw(SystemExit(status))  # type: ignore[assignment]
    with contextlib.redirect_stderr(said):
        try:
            if program == "megallm":
                from megallm.cli.main import main

                main()
            else:
                path = EXAMPLE if program == "example" else EXAMPLE.with_name(program)
                runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 99
    send.send(said.getvalue())
    leave(code)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("usage")
    (root / "short.txt").write_text("too short")
    (root / "empty.txt").write_text("")
    (root / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    (root / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (root / "no_key.jsonl").write_text('{"body": "fine"}\n')
    for name, config in {
        "bert": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        "no_weights": {
            "model_type": "llama", "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        },
    }.items():  # fmt: skip
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
    return root


CASES = {
    "tp_does_not_divide_heads": (["--tp", "3"], 3, ["num_attention_heads", "tp (3)"]),
    "world_size_not_divisible": (["--tp", "2", "--pp", "2"], 6, ["world size (6)", "4"]),
    "global_batch_not_divisible": (["--global-batch-size", "10", "--micro-batch-size", "4"], 1, ["10", "4"]),
    "more_stages_than_layers": (["--pp", "16", "--global-batch-size", "64"], 16, ["num_hidden_layers"]),
    "interleaved_microbatches": (
        ["--pp", "2", "--virtual-stages", "2", "--global-batch-size", "12", "--micro-batch-size", "4"], 2,
        ["interleaved", "multiple of pp"],
    ),
    "virtual_stages_with_1f1b": (["--pp", "2", "--virtual-stages", "2", "--schedule", "1f1b"], 2, ["virtual_stages"]),
    "unknown_preset": (["--model", "lama3-8b"], 1, ["lama3-8b", "llama3-8b"]),
    "missing_model_directory": (["--model", "./nowhere"], 1, ["nowhere"]),
    "missing_file": (["--data", "nowhere.txt"], 1, ["nowhere.txt"]),
    "empty_data": (["--data", "empty.txt"], 1, ["empty.txt"]),
    "broken_line": (["--data", "broken.jsonl"], 1, ["broken.jsonl", "2"]),
    "missing_key": (["--data", "no_key.jsonl"], 1, ["no_key.jsonl", "text"]),
    "data_shorter_than_a_sequence": (["--data", "short.txt", "--tokenizer", "bytes"], 1, ["seq_length"]),
    "token_beyond_vocabulary": (
        ["--model", "no_weights", "--from-scratch", "--data", "text.txt", "--tokenizer", "bytes", "--tp", "1"], 1,
        ["vocabulary", "101"],
    ),
    "missing_tokenizer": (
        ["--data", "text.txt", "--tokenizer", "byte"], 1, ["no tokenizer at byte", "`bytes`, or `chars`"],
    ),
    "unsupported_architecture": (["--model", "bert"], 1, ["bert", "llama", "qwen3", "gpt2", "mistral"]),
    "config_without_weights": (["--model", "no_weights"], 1, ["no_weights", "safetensors"]),
    "nothing_to_load": (["--load", "nowhere"], 1, ["nowhere"]),
    "unknown_flag": (["--learning-rat", "1"], 1, ["--learning-rate"]),
    "unknown_optimizer": (["--optimizer", "lion"], 1, ["--optimizer", "lion", "muon"]),
    "whole_matrices_of_shards": (["--optimizer", "muon", "--zero", "3"], 2, ["muon with zero 3", "zero 1 or 2"]),
    "muon_on_the_host": (["--optimizer", "muon", "--zero", "1", "--offload", "optimizer"], 2, ["muon", "only AdamW"]),
    "unknown_operation": (["--backend", "atention=triton"], 1, ["atention", "did you mean attention"]),
    "unknown_back_end": (["--backend", "attention=cuda"], 1, ["attention=cuda", "triton"]),
    "back_end_that_cannot_run": (["--backend", "rms_norm=cuda"], 1, ["rms_norm=cuda", "needs a GPU", "rms_norm=torch"]),
    "back_end_named_in_the_first_of_two_flags": (
        ["--backend", "attention=flash-attn", "--backend", "rope=torch"], 1, ["attention=flash-attn", "needs a GPU"],
    ),
    "back_end_of_an_operation_it_lacks": (["--backend", "layer_norm=torch"], 1, ["has no layer_norm", "rms_norm"]),
    "no_such_zero_stage": (["--zero", "4"], 1, ["--zero", "4"]),
    "shards_that_do_not_divide": (["--zero", "1", "--zero-shard-size", "3"], 4, ["zero_shard_size (3)", "4 data-par"]),
    "shards_of_nothing": (["--zero-shard-size", "2"], 2, ["zero_shard_size (2)", "zero 1, 2 or 3"]),
    "nothing_gathered_to_keep": (["--zero", "2", "--zero-keep"], 2, ["zero_keep", "stage 3"]),
    "fp8_without_fp8_hardware": (
        ["--precision", "fp8"], 1, ["compute capability 8.9 or newer", "this is a cpu", "use precision bf16"],
    ),
    "fp8_on_a_layout_without_multiples_of_16": (
        ["--precision", "fp8", "--fp8-emulate", "--model", "no_weights", "--from-scratch", "--tp", "4"], 4,
        ["no linear of this model at tp 4", "multiples of 16", "qkv_proj 24 x 32", "smaller tp"],
    ),
    "fp8_details_of_another_precision": (["--precision", "bf16", "--fp8-keep-ends"], 1, ["fp8_keep_ends", "bf16"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_usage_is_one_line_and_exit_code_2(case: str, folder: Path) -> None:
    arguments, world_size, words = CASES[case]
    code, said = run([*arguments, "--save", "out"], folder=folder, world_size=world_size)
    lines = [line for line in said.splitlines() if line.strip()]
    assert code == 2, said
    assert "Traceback" not in said
    assert len([line for line in lines if "error:" in line]) == 1, said
    for word in words:
        assert word in said, said
    assert not (folder / "out").exists()


PLACES = {
    "pretrain_gpt.py": ("example", ["--save"]),
    "a metrics file": ("example", ["--save", "out", "--metrics-file"]),
    "sft.py": ("sft.py", ["--save"]),
    "grpo.py": ("grpo.py", ["--save"]),
    "pipeline.py": ("pipeline.py", ["--tp", "1", "--pp", "1", "--save"]),
}


@pytest.mark.parametrize("place", ["text.txt", "text.txt/below", "/proc/nowhere"])
@pytest.mark.parametrize("case", PLACES)
def test_where_nothing_can_be_written_nothing_begins(case: str, place: str, folder: Path) -> None:
    """A file is no directory to save in, and one to be replaced by metrics."""
    if (case, place) == ("a metrics file", "text.txt"):
        place = "no_weights"
    program, flags = PLACES[case]
    code, said = run([*flags, place], folder=folder, program=program)
    assert code == 2 and said.startswith(f"error: {place} ") and said.count("\n") == 1, said
    assert not (folder / "runs").exists() and not (folder / "out").exists()


@pytest.mark.parametrize("program", ["example", "pipeline.py"])
def test_a_directory_is_no_config_file(program: str, folder: Path) -> None:
    code, said = run(["--config", "no_weights"], folder=folder, program=program)
    assert code == 2 and "no_weights: is a directory" in said.lower() and said.count("\n") == 1, said


COMMANDS = {
    "doctor_of_no_ranks": (["doctor", "--tp", "0"], ["tp (0)", "at least 1"]),
    "doctor_of_heads_that_do_not_divide": (["doctor", "--tp", "3"], ["tp (3)", "use tp 2, 4 or 8"]),
    "doctor_of_an_operation_it_lacks": (["doctor", "--backend", "layer_norm=torch"], ["has no layer_norm"]),
    "eval_missing_data": (["eval", "--model", "no_weights", "--data", "nowhere.jsonl"], ["no_weights"]),
    "eval_of_a_preset": (["eval", "--model", "tiny", "--data", "broken.jsonl"], ["tiny", "weights"]),
    "eval_onto_its_data": (
        ["eval", "--model", "no_weights", "--data", "broken.jsonl", "--per-document", "out/../broken.jsonl"],
        ["out/../broken.jsonl is read, and would be overwritten"],
    ),
    "generate_onto_its_prompts": (
        ["generate", "--model", "no_weights", "--prompts", "broken.jsonl", "--out", "./broken.jsonl"], ["is read"],
    ),
    "judge_onto_its_data": (
        ["judge", "--model", "no_weights", "--data", "no_key.jsonl", "broken.jsonl", "--out", "broken.jsonl"],
        ["broken.jsonl is read"],
    ),
    "score_onto_its_data": (
        ["score", "--model", "no_weights", "--data", "broken.jsonl", "--out", "broken.jsonl"], ["broken.jsonl is read"],
    ),
    "self_instruct_onto_its_seeds": (
        ["self-instruct", "--model", "no_weights", "--seeds", "broken.jsonl", "--out", "broken.jsonl"], ["is read"],
    ),
    "no_tokens_at_once": (
        ["eval", "--model", "no_weights", "--data", "broken.jsonl", "--tokens-at-once", "0"], ["tokens_at_once (0)"],
    ),
    "generate_without_prompt": (["generate", "--model", "bert"], ["--prompt"]),
    "generate_onto_a_directory": (
        ["generate", "--model", "no_weights", "--prompt", "x", "--out", "bert"], ["bert is a directory"],
    ),
    "generate_below_a_file": (
        ["generate", "--model", "no_weights", "--prompt", "x", "--out", "text.txt/x"], ["text.txt is not a directory"],
    ),
    "generate_onto_a_device": (
        ["generate", "--model", "no_weights", "--prompt", "x", "--out", "/dev/null"], ["/dev/null is a device"],
    ),
    "eval_onto_a_directory": (
        ["eval", "--model", "no_weights", "--data", "broken.jsonl", "--per-document", "bert"], ["bert is a directory"],
    ),
    "prepare_where_nothing_can_be": (["prepare", "--out", "/proc/nowhere/x"], ["/proc/nowhere/x.bin cannot be"]),
    "prepare_without_a_name": (["prepare", "--out", "bert/"], ["'bert/' is a directory", "such as bert/tokens"]),
    "export_onto_a_file": (["export", "bert", "text.txt"], ["text.txt is not a directory"]),
    "schedule_onto_a_directory": (["schedule", "--out", "bert"], ["bert is a directory"]),
    "memory_onto_a_directory": (["memory", "--out", "bert"], ["bert is a directory"]),
    "chat_without_tokens": (
        ["chat", "--model", "no_weights", "--max-new-tokens", "0"], ["max_new_tokens (0) must be at least 1"],
    ),
    "export_of_nothing": (["export", "nowhere", "out"], ["nowhere"]),
    "schedule_that_cannot_be": (
        ["schedule", "--pp", "4", "--microbatches", "6", "--schedule", "interleaved", "--virtual-stages", "2"],
        ["multiple of pp"],
    ),
    "unknown_command": (["trian"], ["trian"]),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_bad_commands_are_one_line_and_exit_code_2(case: str, folder: Path) -> None:
    arguments, words = COMMANDS[case]
    code, said = run(arguments, folder=folder, program="megallm")
    assert code == 2, said
    assert "Traceback" not in said
    for word in words:
        assert word in said, said
