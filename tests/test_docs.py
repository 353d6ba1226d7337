"""What the documents say: commands run, flags exist, links lead somewhere, tables and pictures are those of the code.

Every command in a ```bash block of README.md and docs/ is run in a folder of its own, page by page and in order, with
the flags of `shortened` behind it; those of NOT_RUN and of PARSED_PAGES only pass the program's own parser and checks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import megallm.parallel
from megallm.cli.main import COMMANDS
from megallm.cli.main import run as megallm_run
from megallm.config.check import check_run
from megallm.config.flags import parse_run_config
from megallm.config.presets import get_preset, preset_names
from megallm.pipeline.generators import make_schedule
from megallm.pipeline.simulate import simulate

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERY_PAGE = [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md"]

INSTALLS = "installs into an environment of its own"
SUITE = "is the test suite, or a part of it"
RANKS = "starts ranks: the commands on 8, 4 and 2 ranks that are run stand for it"
NOT_RUN = {
    "make demo": INSTALLS,
    "make pipeline": INSTALLS,
    "make test": SUITE,
    "python3 -m venv .venv && source .venv/bin/activate": INSTALLS,
    "pip install -c constraints.txt -e .": INSTALLS,
    "MEGALLM_BUILD_CUDA=1 pip install": INSTALLS,
    "make bench-gpu": "needs a GPU",
    "torchrun --nnodes 8": "needs a cluster",
    "python -m pytest": SUITE,
    "torchrun --standalone --nproc-per-node 2 -m megallm.cli eval": RANKS,
    "torchrun --standalone --nproc-per-node 8 examples/pretrain_gpt.py --tp 8": RANKS,
    "torchrun --standalone --nproc-per-node 8 examples/pretrain_gpt.py --tp 2 --pp 4": RANKS,
    "torchrun --standalone --nproc-per-node 8 examples/pretrain_gpt.py --pp 2 --virtual-stages 2": RANKS,
    "torchrun --standalone --nproc-per-node 8 examples/pretrain_gpt.py --micro-batch-size 2": RANKS,
}
"""Beginning of a command: why no test runs it."""
PARSED_PAGES = {
    "shakespeare.md": "trains for minutes", "preferences.md": "trains for minutes",
    "end_to_end.md": "trains for minutes; test_pipeline_example.py runs the program",
    "library.md": "run below, to compare what it prints",
}  # fmt: skip
"""Pages of which `test_commands_run` runs nothing: why."""



def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE_COMMANDS = load(ROOT / "docs" / "make_commands.py")
FIRST = "python examples/pretrain_gpt.py --data books.txt --save runs/first"
BEFORE = {
    "checkpoints.md": [FIRST, "megallm export runs/first hf/books"],
    "generation.md": [FIRST],
    "rl.md": [
        "python examples/pretrain_gpt.py --data books.txt --save runs/demo",
        "python examples/sft.py --data chats.jsonl --save runs/sft",
        "python examples/reward.py --data preferences.jsonl --save runs/reward",
        "python examples/sft.py --data chats.jsonl --save runs/base_arithmetic",
    ],
}  # fmt: skip
"""What a page takes for granted."""
SMALL = (
    "--warmup-steps 0 --seq-length 16 --global-batch-size 4 --micro-batch-size 2 --eval-every 0 --eval-sequences 4 "
    "--cache-dir cache"
).split()


RL = {"examples/ppo.py", "examples/grpo.py"}
FINETUNING = {f"examples/{name}.py" for name in MAKE_COMMANDS.AFTER_PRETRAINING}
ROLLOUTS = (
    "--steps 2 --warmup-steps 0 --seq-length 256 --global-batch-size 4 --micro-batch-size 2 --rollout-batch-size 4 "
    "--max-new-tokens 8 --template text"
).split()
SHORT = (
    "--warmup-steps 0 --seq-length 96 --global-batch-size 4 --micro-batch-size 2 --eval-every 0 --eval-sequences 4 "
    "--template chatml"
).split()


def commands(page: Path) -> list[str]:
    """The commands of a page's ```bash blocks, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and not line.startswith("#")]


def why_not_run(command: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)


def shortened(words: list[str]) -> list[str]:
    """The command as the test runs it: a hundredth of the steps, few and short sequences, no sample of text."""
    words = [word.replace("step-00000400", "step-00000004") for word in words]
    if RL & set(words):
        return [*words, *ROLLOUTS]
    if words[0] == "torchrun" and FINETUNING & set(words):
        return [*words, *SHORT]
    if FINETUNING & set(words):
        return [*words, *SHORT, *([] if "--show-masks" in words or "--epochs" in words else ["--steps", "2"])]
    if "examples/pretrain_gpt.py" not in words:
        return words
    steps = int(words[words.index("--steps") + 1]) // 100 if "--steps" in words else 1
    words = [*words, "--steps", str(steps), *SMALL, "--sample-prompt", ""]
    if "--data" not in words and "--config" not in words:
        words += ["--data", "books.txt"]
    return words + (["--save-every", "1"] if "--save-every" in words else [])


def execute(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command in the current folder: on one rank in this process, under torchrun in processes of its own, whose
    standard output is printed."""
    words = shortened(shlex.split(command))
    if words[0] == "torchrun":
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        start = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        done = subprocess.run(start, capture_output=True, text=True, timeout=1800, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        print(done.stdout)
        return
    if words[0] == "megallm":
        assert megallm_run(words[1:]) == 0
        return
    if words[:2] == ["python", "tests/kernels/compile_all.py"]:  # where kernels are compiled, they are not interpreted
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        start = [sys.executable, str(ROOT / words[1]), *words[2:]]
        subprocess.run(start, check=True, capture_output=True, timeout=1800, env=environment)
        return
    assert words[0] == "python", f"{command}: nobody knows how to run it here: name it in NOT_RUN with the reason"
    monkeypatch.setattr(sys, "argv", words[1:])
    assert load(Path(words[1])).main() == 0


def write_inputs(folder: Path, page: Path) -> None:
    """The files that the pages speak of."""
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "docs" / "img").mkdir(parents=True)
    sentences = [f"It was day {i} of the voyage and the sea was calm as on day {i // 2}." for i in range(300)]
    (folder / "books.txt").write_text("\n".join(sentences))
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences[:60]))
    turns = [("user", "What is it?"), ("assistant", "A voyage.")]
    chats = [{"messages": [{"role": role, "content": f"{text} {i}"} for role, text in turns]} for i in range(24)]
    pairs = [{"prompt": f"Day {i}?", "chosen": "The sea is calm.", "rejected": f"No {i}."} for i in range(24)]
    prompts = [{"prompt": f"Day {i}?", "answer": "calm"} for i in range(4)]
    for name, rows in (("chats", chats), ("preferences", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = re.search(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (folder / "books.yaml").write_text(settings[1] if settings else "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name in PARSED_PAGES:
        pytest.skip(PARSED_PAGES[page.name])
    write_inputs(tmp_path, page)
    monkeypatch.chdir(tmp_path)
    try:
        for command in [*BEFORE.get(page.name, []), *commands(page)]:
            if why_not_run(command) is None:
                execute(command, monkeypatch)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_pass_the_parser_and_the_checks(page: Path) -> None:
    for command in commands(page):
        words = shlex.split(command)
        num_ranks = 1
        if words[0] == "torchrun":
            num_ranks, words = launch(words[1:])
        if words[:2] == ["python", "-m"] and words[2] == "megallm.cli":
            words = ["megallm", *words[3:]]
        if words[0] == "megallm":
            args = MAKE_COMMANDS.command_parser(words[1]).parse_args(words[2:])
            assert num_ranks % (getattr(args, "tp", 1) * getattr(args, "pp", 1) if words[1] != "schedule" else 1) == 0
        elif words[0] == "python" and words[1].endswith(".py"):
            check_script(words[1], words[2:], num_ranks)
        else:
            assert why_not_run(command), f"{command}: nobody knows it: name it in NOT_RUN with the reason"
            for word in words:
                assert not word.startswith("tests/") or (ROOT / word).is_file(), command


def launch(words: list[str]) -> tuple[int, list[str]]:
    """(ranks, the command that each one runs) of torchrun's arguments."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--nproc-per-node", type=int, default=1)
    parser.add_argument("--standalone", action="store_true")
    parser.add_argument("--rdzv-backend")
    parser.add_argument("--rdzv-endpoint")
    parser.add_argument("-m", dest="is_module", action="store_true")
    parser.add_argument("program", nargs=argparse.REMAINDER)
    args = parser.parse_args(words)
    return args.nnodes * args.nproc_per_node, ["python", *(["-m"] if args.is_module else []), *args.program]


def check_script(script: str, words: list[str], num_ranks: int) -> None:
    assert (ROOT / script).is_file(), script
    if script == "examples/generate.py":
        args = MAKE_COMMANDS.command_parser("generate").parse_args(words)
        assert num_ranks % (args.tp * args.pp) == 0
    if script in FINETUNING:
        example = load(ROOT / script)
        run, _ = parse_run_config(words, defaults=example.DEFAULTS, extra=getattr(example, "add_arguments", None))
        assert num_ranks % (run.parallel.tp * run.parallel.pp) == 0
    if script != "examples/pretrain_gpt.py" or "--config" in words:
        return
    example = load(ROOT / script)
    run, _ = parse_run_config(words, defaults=example.DEFAULTS, extra=example.add_arguments)
    if run.model is None or run.model in preset_names():
        assert check_run(run, get_preset(run.model or "tiny"), num_ranks) == [], words


def test_the_custom_loop_prints_the_same_on_one_and_on_four_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = ROOT / "docs" / "library.md"
    write_inputs(tmp_path, page)
    monkeypatch.chdir(tmp_path)
    printed = []
    for command in commands(page):
        execute(command, monkeypatch)
        printed.append([line for line in capsys.readouterr().out.splitlines() if line.strip()])
    torch.set_num_threads(1)
    assert len(printed) == 2 and printed[0] == printed[1]


def test_refusals_are_as_quoted() -> None:
    """The block of parallelism.md: flags, then what one rank is told, continued on deeper lines."""
    text = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    block = re.search(r"^    --.*?\n\n", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    quoted = [" ".join(entry.split()) for entry in re.split(r"^    (?=--)", block[0], flags=re.MULTILINE) if entry]
    example = load(ROOT / "examples" / "pretrain_gpt.py")
    for entry in quoted:
        flag, value, message = entry.replace("(one rank) ", "").split(" ", 2)
        run, _ = parse_run_config([flag, value], defaults=example.DEFAULTS, extra=example.add_arguments)
        with pytest.raises(ValueError) as error:
            check_run(run, get_preset("tiny"), 1)
        assert str(error.value) == message
    assert len(quoted) == 5


def test_not_run_names_commands_that_exist() -> None:
    every = [command for page in PAGES for command in commands(page)]
    assert [start for start in NOT_RUN if not any(command.startswith(start) for command in every)] == []


def test_at_most_two_commands_on_eight_ranks_are_run() -> None:
    every = [command for page in PAGES if page.name not in PARSED_PAGES for command in commands(page)]
    assert sum("--nproc-per-node 8" in command and why_not_run(command) is None for command in every) <= 2


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {command.split()[1] for page in PAGES for command in commands(page) if command.startswith("make ")}
    assert named <= targets


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [target.split("#")[0] for target in targets if not target.startswith(("http:", "https:", "#"))]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.name)
def test_files_named_in_words_exist(page: Path) -> None:
    """A path with a slash that ends in .py is one of ours, from the root or from megallm/."""
    named = set(re.findall(r"(?<![\w/.-])((?:\.\./)?[a-z_]+(?:/[a-z_0-9]+)+\.py)\b", page.read_text(encoding="utf-8")))
    places = (ROOT, ROOT / "megallm", page.parent)
    assert sorted(name for name in named if not any((place / name).is_file() for place in places)) == []


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.name)
def test_pages_are_ascii(page: Path) -> None:
    assert page.read_text(encoding="utf-8").isascii()


def test_the_tables_of_flags_are_those_of_the_parsers() -> None:
    """Else: python docs/make_commands.py."""
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert MAKE_COMMANDS.page_with(MAKE_COMMANDS.generated()) == page


def test_every_command_has_a_table() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"## megallm {name}" not in page] == []


def test_every_public_name_is_explained() -> None:
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    assert [name for name in megallm.parallel.__all__ if name not in page] == []


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved"])
def test_pictures_of_schedules_are_there(name: str) -> None:
    picture = ROOT / "docs" / "img" / f"{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert f"(img/{name}.png)" in (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", commands(ROOT / "docs" / "pipeline.md")[::4])
def test_printed_schedules_are_as_quoted(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The first command's table and the last one's bubble."""
    assert megallm_run(shlex.split(command)[1:]) == 0
    printed = capsys.readouterr().out.splitlines()
    quoted = printed[:3] if "--slots" in command else [line for line in printed if line.startswith("bubble:")]
    page = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")
    assert [line for line in quoted if f"    {line.rstrip()}\n" not in page] == []


@pytest.mark.parametrize(
    ("row", "virtual_stages"), [("gpipe", 1), ("1f1b", 1), ("interleaved, v = 2", 2), ("interleaved, v = 4", 4)]
)
def test_the_table_of_bubbles_is_what_is_simulated(row: str, virtual_stages: int) -> None:
    page = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")
    line = next(line for line in page.splitlines() if line.startswith(f"| {row} |"))
    cells = [cell.strip() for cell in line.split("|")[3:7]]
    name = row.split(",")[0]
    schedules = [
        make_schedule(name, pp=4, virtual_stages=virtual_stages, num_microbatches=m) for m in (4, 8, 16, 32)
    ]
    assert cells == [f"{round(100 * simulate(schedule).bubble + 1e-9, 2):g} %" for schedule in schedules]
