"""examples/pipeline.py: mistakes of every stage are told before the first one runs."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megallm.config.end_to_end import EndToEndConfig, with_layout, with_settings
from megallm.data.tokenizer import byte_tokenizer
from megallm.trainers.end_to_end import check

PROGRAM = Path(__file__).parents[1] / "examples" / "pipeline.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("pipeline", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONFIG: EndToEndConfig = with_layout(load().DEFAULTS, tp=1, pp=1)


def told(folder: Path, *settings: str) -> None:
    check(with_settings(CONFIG, settings), str(folder / "runs"), world_size=1, device=torch.device("cpu"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.py").write_text("def good(prompt, completion):\n    return 1.0\n")
    rows = {"answers": {"prompt": "a", "completion": "b"}, "ranked": {"prompt": "a", "responses": ["b", "c"]},
            "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"}}  # fmt: skip
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"oops"\n')
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("base.data=missing.txt", "base: data missing.txt does not exist"),
        ("base.valid_data=missing.txt", "base: data missing.txt does not exist"),
        ("base.tokenizer=nowhere", "base: no tokenizer at nowhere"),
        ("base.model=nowhere", "base: unknown model 'nowhere'"),
        ("sft.data=missing.jsonl", "sft: missing.jsonl does not exist"),
        ("sft.data=f.py", "sft: f.py: records are read from .jsonl"),
        ("sft.data=broken.jsonl", "sft: broken.jsonl:2: not JSON"),
        ("sft.data=pairs.jsonl", "sft: pairs.jsonl:1: a preference record is no conversation"),
        ("sft.data=answers.jsonl sft.valid_data=missing.jsonl", "sft: missing.jsonl does not exist"),
        ("sft.data_format=nonsense", "sft: --data-format 'nonsense' is not known"),
        ("sft.template=nonsense", "sft: no chat template is called 'nonsense'"),
        ("sft.lora_rank=4 sft.lora_targets=nothing", "sft: lora_targets: this model has no nothing"),
        ("sft.backend=grouped_gemm=torch", "sft: --backend grouped_gemm=torch: this model has no grouped_gemm"),
        ("reward.data=f.py", "reward: f.py: records are read from .jsonl"),
        ("reward.data=answers.jsonl", "reward: answers.jsonl:1: preferences are needed"),
        ("reward.template=no/such.jinja", "reward: --template no/such.jinja: no such file"),
        ("reward.valid_data=missing.jsonl", "reward: missing.jsonl does not exist"),
        ("ppo.data=missing.jsonl", "ppo: missing.jsonl does not exist"),
        ("ppo.valid_data=missing.jsonl", "ppo: missing.jsonl does not exist"),
        ("ppo.template=nonsense", "ppo: no chat template is called 'nonsense'"),
        ("ppo.tokenizer=nowhere", "ppo: no tokenizer at nowhere"),
        ("ppo.reward=nonsense", "ppo: reward 'nonsense' is none"),
        ("ppo.reward=f.py:nope", "ppo: f.py:nope: "),
        ("ppo.reward=format:(", "ppo: format:(: '(' is not what format takes"),
        ("ppo.reward=exact_answer ppo.data=answers.jsonl", "ppo: reward exact_answer needs the column 'answer'"),
        ("ppo.critic=/nope", "ppo: /nope: no such model directory"),
        ("ppo.critic_tp=3", "ppo: the critic, on tp 3 x pp 1: "),
        ("ppo.frozen_tp=2", "runs/reward, on tp 2 x pp 1: world size (1) is not divisible"),
        ("ppo.ptx_coefficient=1 ppo.ptx_data=missing.jsonl", "ppo: missing.jsonl does not exist"),
        ("ppo.precision=fp8", "ppo: precision fp8 needs a GPU"),
        ("dpo.data=ranked.jsonl", "dpo: pairs are needed (chosen and rejected), this is ranking"),
        ("dpo.template=nonsense", "dpo: no chat template is called 'nonsense'"),
        ("dpo.data=pairs.jsonl dpo.valid_data=f.py", "dpo: f.py: records are read from .jsonl"),
        ("evaluation.prompts=f.py", "evaluation: f.py: records are read from .jsonl"),
    ],
)  # fmt: skip
def test_mistakes_of_every_stage_are_told_before_the_first(folder: Path, settings: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        told(folder, *settings.split())
    assert not (folder / "runs").exists()


def test_weights_in_4_bits_taken_up_twice_are_told_before_the_first(folder: Path) -> None:
    nf4 = ("lora_rank=4", "lora_base=nf4")
    with pytest.raises(ValueError, match="dpo: .*adapters beside weights in 4 bits"):
        told(folder, *(f"{name}.{each}" for name in ("sft", "dpo") for each in nf4))


def test_another_tokenizer_than_the_one_to_come_is_told_before_the_first(folder: Path) -> None:
    byte_tokenizer().save(folder / "own.json")
    told(folder, "base.tokenizer=bytes", "dpo.tokenizer=own.json")
    own = json.loads((folder / "own.json").read_text())
    vocab = own["model"]["vocab"]
    a, b = list(vocab)[:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (folder / "other.json").write_text(json.dumps(own))
    with pytest.raises(ValueError, match="dpo: --tokenizer other.json is another than that of"):
        told(folder, "base.tokenizer=bytes", "dpo.tokenizer=other.json")


def test_what_an_earlier_stage_is_to_write_is_not_looked_for(folder: Path) -> None:
    told(folder, "ppo.critic=runs/reward", "ppo.reward=2*runs/reward", "ppo.tokenizer=runs/sft")
    told(folder, "dpo.template=runs/sft", "ppo.reward=f.py:good", "reward.data=ranked.jsonl", "ppo.data=answers.jsonl")


def test_a_late_mistake_ends_the_program_at_once_with_code_2(folder: Path) -> None:
    words = ["--tp", "1", "--pp", "1", "--save", "runs", "ppo.reward=nonsense"]
    done = subprocess.run([sys.executable, str(PROGRAM), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "ppo: reward 'nonsense' is none" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == "" and not (folder / "runs").exists()
