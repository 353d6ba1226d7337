"""PPO and GRPO from flags to files: train, be killed, resume, what a user gets wrong, rewards that fail."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megallm.checkpoint.sharded import latest, read_full_tensors
from megallm.data.tokenizer import byte_tokenizer
from megallm.generate.sampling import Sampling
from megallm.monitor.metrics import read_metrics
from megallm.parallel.mesh import Mesh
from megallm.runtime.failure import RunStopped
from megallm.runtime.launch import UsageError
from megallm.testing.tiny import tiny_config
from megallm.trainers.engine import Engine
from megallm.trainers.rewards import RewardError
from megallm.trainers.scores import Calibration, write_calibration
from megallm.trainers.source import open_model

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = (
    "--steps 4 --seq-length 48 --global-batch-size 4 --micro-batch-size 2 --rollout-batch-size 4 --max-new-tokens 8 "
    "--template text --learning-rate 1e-3"
).split()
GROUPS = ["--samples-per-prompt", "2"]
REWARDS = '''
import os, time

def share(prompt, completion, **record):
    return sum(map(ord, completion)) % 7 / 7 + record["bonus"]

def slow(prompt, completion, **record):
    time.sleep(0.3)
    return float(len(completion))

def broken(prompt, completion, **record):
    if "3" in prompt:
        raise RuntimeError("no such thing")
    return 1.0 * (len(completion) % 3)

def none(prompt, completion, **record):
    return float("nan") if "3" in prompt else 0.5

def named(prompt, completion, answer, wish):
    return 0.0

def blocks(prompt, completion, **record):
    while "3" in prompt:
        pass
    return 0.25
'''
Run = Callable[..., int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a reward model of new weights with a byte tokenizer, prompts and reward functions."""
    root = tmp_path_factory.mktemp("rl")
    tokenizer = byte_tokenizer()
    config = tiny_config("llama", vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, initializer_range=0.3)
    scalar = config.replace(head="scalar", tie_word_embeddings=False)
    short = scalar.replace(position_embedding="learned", max_position_embeddings=16)
    for name, shape in {"model": config, "taste": scalar, "short": short}.items():
        Engine(shape, Mesh.build(), seed=5).save(str(root / name))
        tokenizer.save(root / name)
    Engine(scalar.replace(vocab_size=100), Mesh.build(), seed=5).save(str(root / "small"))
    write_calibration(latest(root / "taste"), Calibration(mean=0.5, std=2.0, responses=10))
    lines = [{"prompt": f"{i}+{i % 4}=", "answer": str(i + i % 4), "bonus": 0.1} for i in range(12)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = [{"prompt": f"Day {i}:", "completion": " the sea was calm."} for i in range(20)]
    (root / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in text))
    (root / "questions.jsonl").write_text('{"question": "1+1"}\n')
    (root / "own.py").write_text(REWARDS)
    return root


@pytest.fixture
def example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`example("ppo", "--reward", ...)`: its exit code, run in this process on the small model."""

    def call(name: str, *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *given(folder), *map(str, arguments)])
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        code: int = module.main()
        return code

    return call


def given(folder: Path) -> list[str]:
    return ["--model", str(folder / "model"), "--data", str(folder / "prompts.jsonl"), *SMALL]


def own(folder: Path, name: str) -> str:
    return f"{folder / 'own.py'}:{name}"


def metrics(folder: Path) -> list[dict[str, Any]]:
    timed = ("step_time_s", "tokens_per_s", "memory_gib", "mfu")
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in timed and not k.startswith("share_")} for line in lines]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("ppo", []),
        ("ppo", ["--kl-coefficient", "0.2", "--kl-target", "0.01", "--kl-horizon", "10", "--normalize-scores",
                 "running", "--score-clip", "2", "--missing-end-penalty", "1", "--update-epochs", "2",
                 "--max-approx-kl", "0.01"]),
        ("ppo", ["--lora-rank", "4", "--lora-dropout", "0.1", "--critic-warmup", "1", "--overlong-buffer", "2"]),
        ("ppo", ["--zero", "1", "--offload-frozen", "--whiten-rewards", "--value-clip", "0", "--overlong-buffer", "4"]),
        ("ppo", ["--ptx-coefficient", "0.5", "--ptx-data", "TEXT", "--temperature", "0.7", "--kl-coefficient", "0"]),
        ("grpo", [*GROUPS, "--valid-data", "PROMPTS", "--eval-every", "2"]),
        ("grpo", [*GROUPS, "--advantage", "rloo", "--kl-coefficient", "0.05", "--kl-in", "reward", "--kl-estimator",
                  "k1", "--aggregation", "sequence", "--normalize-scores", "batch"]),
        ("grpo", [*GROUPS, "--dynamic-sampling", "2", "--advantage", "dr_grpo", "--aggregation", "constant",
                  "--importance", "sequence", "--clip-low", "3e-4", "--clip-high", "4e-4", "--zero", "3"]),
        ("grpo", [*GROUPS, "--advantage", "reinforce++_baseline", "--kl-coefficient", "0.05", "--lora-rank", "2",
                  "--entropy-coefficient", "0.01", "--dual-clip", "3"]),
        ("grpo", ["--advantage", "reinforce++", "--kl-coefficient", "0.05", "--kl-in", "reward", "--kl-estimator",
                  "k3", "--valid-data", "PROMPTS", "--eval-every", "2"]),
    ],
)  # fmt: skip
def test_a_run_leaves_its_files_and_goes_on_where_it_stopped(
    name: str, flags: list[str], example: Run, folder: Path, tmp_path: Path
) -> None:
    files = {"TEXT": str(folder / "text.jsonl"), "PROMPTS": str(folder / "prompts.jsonl")}
    flags = [files.get(flag, flag) for flag in flags]
    arguments = ["--reward", folder / "taste", f"0.5*{own(folder, 'share')}", *flags, "--save-every", "2",
                 "--lr-schedule", "constant"]  # fmt: skip
    assert example(name, *arguments, "--save", tmp_path / "whole") == 0
    assert example(name, *arguments, "--save", tmp_path / "parts", "--steps", "2") == 0
    assert example(name, *arguments, "--save", tmp_path / "parts") == 0
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert whole == parts
    for each in ("", "critic") if name == "ppo" else ("",):
        weights, others = (dict(read_full_tensors(latest(tmp_path / run / each))) for run in ("whole", "parts"))
        assert all((weights[key] == others[key]).all() for key in weights)
    last = whole[-1]
    assert {"score", "score_taste", "score_share", "entropy", "mismatch", "response_length", "ratio"} <= set(last)
    assert ("explained_variance" in last) == (name == "ppo") and ("ptx_loss" in last) == ("--ptx-data" in flags)
    assert ("silent_groups" in last) == (name == "grpo" and "reinforce++" not in flags)
    samples = [json.loads(line) for line in (tmp_path / "parts" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in samples] == [1, 2, 3, 4]
    assert set(samples[0]["samples"][0]) == {"prompt", "completion", "score", "finish_reason"}
    assert (tmp_path / "whole" / "rl.png").is_file() and (tmp_path / "whole" / "tokenizer.json").is_file()


def test_held_out_prompts_are_answered_greedily(example: Run, folder: Path, tmp_path: Path) -> None:
    """The last validation is what the saved policy says to the first prompts, in their order."""
    shown = tmp_path / "said.txt"
    (tmp_path / "said.py").write_text(f"""
def said(prompt, completion, **record):
    with open({str(shown)!r}, "a") as file:
        print(repr((prompt, completion)), file=file)
    return float(len(completion))
""")
    example("grpo", *GROUPS, "--reward", f"{tmp_path / 'said.py'}:said", "--valid-data", folder / "prompts.jsonl",
            "--eval-sequences", "5", "--save", tmp_path / "run")  # fmt: skip
    lines = metrics(tmp_path / "run")
    assert [("valid_score" in line) for line in lines] == [False, False, False, True]
    source = open_model(str(tmp_path / "run"))
    engine = Engine(source.config, Mesh.build(), train=False)
    source.load_weights(engine)
    tokenizer = byte_tokenizer()
    asked = [f"{i}+{i % 4}=" for i in range(5)]
    greedy = Sampling(temperature=0.0, stop_ids=(tokenizer.eos_id,))
    found = engine.rollout([tokenizer.encode(each) for each in asked], max_new_tokens=8, sampling=greedy)
    said = [ast.literal_eval(line) for line in shown.read_text().splitlines()[-5:]]
    assert sorted(prompt for prompt, _ in said) == asked
    assert lines[-1]["valid_response_length"] == sum(map(len, found.token_ids)) / 5
    assert lines[-1]["valid_score"] == sum(len(completion) for _, completion in said) / 5


def test_a_reward_model_of_another_template_is_told(
    example: Run, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(folder / "taste", tmp_path / "other")
    config = latest(other) / "config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps(plain | {"run": {"data": {"template": "alpaca"}}}))
    for reward in (folder / "taste", other):
        example("ppo", "--reward", reward, "--steps", "1")
        is_told = "was trained with --template alpaca, prompts are written with text" in capsys.readouterr().out
        assert is_told == (reward == other)


def test_a_damaged_calibration_is_told_before_anything_starts(example: Run, folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder / "taste", tmp_path / "other")
    (file,) = latest(other).glob("*calibration*")
    file.write_text("{")
    with pytest.raises(UsageError, match="is damaged .*: copy it again, remove it"):
        example("ppo", "--reward", other, "--save", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--reward", "--critic", "--model"])
def test_damaged_weights_are_told_before_anything_starts(
    flag: str, example: Run, folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(folder / ("model" if flag == "--model" else "taste"), tmp_path / "other")
    file = next(latest(other).glob("model/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    rewards = [] if flag == "--reward" else ["--reward", folder / "taste"]
    with pytest.raises(UsageError, match="is damaged or was cut off .*: copy the checkpoint again"):
        example("ppo", *rewards, flag, other, "--save", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_first_iteration_knows_that_nothing_has_moved(example: Run, folder: Path, tmp_path: Path) -> None:
    """The policy is the reference: KL 0, ratio 1, sampler and training forward agree."""
    example("ppo", "--reward", folder / "taste", "--steps", "1", "--update-epochs", "1", "--rollout-batch-size", "4",
            "--save", tmp_path)  # fmt: skip
    (first,) = metrics(tmp_path)
    assert first["kl"] == pytest.approx(0.0, abs=1e-6) and first["mismatch"] == pytest.approx(1.0, abs=1e-4)
    assert first["ratio"] == pytest.approx(1.0, abs=1e-5) and first["clip_fraction"] == 0.0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--global-batch-size", "3"], ["rollout_batch_size 4 * samples_per_prompt 1 = 4", "global_batch_size (3)"]),
        (["--max-new-tokens", "48"], ["max_new_tokens (48)", "seq_length (48)"]),
        (["--seq-length", "300", "--max-new-tokens", "100"], ["the longest prompt (", "100 new ones", "model has 64"]),
        (["--temperature", "0"], ["temperature (0.0)", "above 0"]),
        (["--reward", "exact_anwser"], ["'exact_anwser'", "exact_answer"]),
        (["--reward", "missing.py:f"], ["missing.py"]),
        (["--reward", "MODEL"], ["is a language model", "examples/reward.py"]),
        (["--kl-target", "6", "--kl-coefficient", "0"], ["kl_target (6.0)", "kl_coefficient"]),
        (["--ptx-coefficient", "1"], ["ptx_coefficient (1.0)", "ptx_data"]),
        (["--missing-end-penalty", "1", "--missing-end-score", "-1"], ["missing_end_penalty", "give one of them"]),
        (["--dual-clip", "0.9"], ["dual_clip (0.9)", "above 1"]),
        (["--critic-tp", "2"], ["the critic, on tp 2 x pp 1", "world size (1)"]),
        (["--frozen-pp", "3"], ["taste/step-00000000, on tp 1 x pp 3"]),
        (["--reward", "SHORT"], ["short/step-00000000, on tp 1 x pp 1", "seq_length (48)"]),
        (["--critic", "SMALL"], ["the critic has a vocabulary of 100"]),
        (["--offload-frozen", "--zero", "3"], ["offload_frozen with zero 3"]),
        (["--critic-warmup", "4"], ["critic_warmup (4)", "steps (4)"]),
        (["--top-p", "0.9"], ["unknown flag --top-p"]),
        (["--eval-every", "2"], ["eval_every (2)", "valid_data"]),
        (["--reward", "python_tests"], ["needs the column 'tests'", "answer, bonus, prompt"]),
        (["--reward", "OWN.PY:NAMED"], ["own.py:named needs the column 'wish'", "answer, bonus, prompt"]),
        (["--data", "QUESTIONS.JSONL"], ["questions.jsonl:1", "no prompt", "['question']", "the key prompt"]),
        (["--reward", "length", "--offload-frozen", "--kl-coefficient", "0"], ["offload_frozen without a frozen"]),
        (["--template", "nothing"], ["'nothing'", "or text for none"]),
    ],
)
def test_what_a_user_gets_wrong_is_told_in_words(
    flags: list[str], words: list[str], example: Run, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(folder / flag.lower()) if flag.isupper() else flag for flag in flags]
    rewards = [] if "--reward" in flags else ["--reward", str(folder / "taste")]
    with pytest.raises((UsageError, SystemExit)) as error:
        example("ppo", *rewards, *flags, "--save", tmp_path)
    said = str(error.value) + capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not list(tmp_path.iterdir())


def test_text_beside_minibatches_without_an_answer_keeps_its_weight(
    example: Run, folder: Path, tmp_path: Path
) -> None:
    assert example(
        "grpo", "--samples-per-prompt", "4", "--reward", own(folder, "none"), "--on-reward-error", "skip", "--ptx-data",
        folder / "text.jsonl", "--ptx-coefficient", "1", "--kl-coefficient", "0.1", "--global-batch-size", "2",
        "--save", tmp_path,
    ) == 0  # fmt: skip
    lines = metrics(tmp_path)
    assert {line.get("left_out", 0) for line in lines} >= {0, 4}  # of 16 answers, those to a prompt with a 3
    for line in lines:
        assert line["loss"] < 20.0 and line["grad_norm"] < 100.0 and line["ptx_loss"] < 20.0


@pytest.mark.parametrize(
    "flags", [[], ["--critic-warmup", "1", "--ptx-coefficient", "1", "--ptx-data", "text.jsonl"]], ids=["", "ptx"]
)
def test_answers_that_are_all_left_out_stop_the_run(
    flags: list[str], example: Run, folder: Path, tmp_path: Path
) -> None:
    flags = [str(folder / flag) if flag.endswith(".jsonl") else flag for flag in flags]
    cut = ["--max-new-tokens", "2", "--overlong", "mask"]
    with pytest.raises(RunStopped, match="iteration 3 has no answer to train on.*, the 3rd such one in a row"):
        example("ppo", "--reward", folder / "taste", *cut, *flags, "--save", tmp_path)
    assert [line["updates"] for line in metrics(tmp_path)] == [0, 0] and latest(tmp_path).name == "step-00000002"


def test_the_reference_stays_what_it_was_when_the_run_began(example: Run, folder: Path, tmp_path: Path) -> None:
    """The model's directory gets a newer checkpoint between two parts of a run."""
    shutil.copytree(folder / "model", tmp_path / "model")
    other = ["--model", tmp_path / "model", "--reward", folder / "taste", "--kl-coefficient", "0.1"]
    assert example("ppo", *other, "--save", tmp_path / "whole") == 0
    assert example("ppo", *other, "--save", tmp_path / "parts", "--steps", "2") == 0
    shutil.copytree(latest(tmp_path / "whole"), tmp_path / "model" / "step-00000009")
    assert example("ppo", *other, "--save", tmp_path / "parts") == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    shutil.rmtree(tmp_path / "model" / "step-00000000")
    with pytest.raises(UsageError, match="which is no longer there: the run would go on with another model"):
        example("ppo", *other, "--save", tmp_path / "parts", "--steps", "5")
    for model in ("model", "model/step-00000009"):
        with pytest.raises(UsageError, match="is the directory of --model"):
            example("ppo", "--model", tmp_path / model, *other[2:], "--save", tmp_path / "model")


def test_rewards_stay_what_they_were_when_the_run_began(example: Run, folder: Path, tmp_path: Path) -> None:
    """The reward model's directory gets a newer checkpoint, with another calibration; the critic keeps its offset."""
    shutil.copytree(folder / "taste", tmp_path / "taste")
    arguments = ["--reward", f"0.5*{tmp_path / 'taste'}", own(folder, "share")]
    assert example("ppo", *arguments, "--save", tmp_path / "whole") == 0
    assert example("ppo", *arguments, "--save", tmp_path / "parts", "--steps", "2", "--lr-schedule", "constant") == 0
    newer = shutil.copytree(latest(tmp_path / "whole") / ".." / "critic" / "step-00000004", tmp_path / "newer")
    shutil.copytree(newer, tmp_path / "taste" / "step-00000009")
    write_calibration(tmp_path / "taste" / "step-00000009", Calibration(mean=-3.0, std=1.0, responses=10))
    assert example("ppo", *arguments, "--save", tmp_path / "parts") == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert {"score_taste", "score_share"} <= set(metrics(tmp_path / "whole")[0])


def test_a_fixed_kl_coefficient_is_the_one_that_is_asked_for_now(
    example: Run, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--reward", folder / "taste", "--save", tmp_path]
    assert example("ppo", *arguments, "--kl-coefficient", "0.05", "--steps", "1") == 0
    assert example("ppo", *arguments, "--kl-coefficient", "0.7", "--steps", "2") == 0
    assert "was made with" not in "".join(capsys.readouterr())
    assert example("ppo", *arguments, "--kl-coefficient", "0.7", "--steps", "3", "--temperature", "0.9") == 0
    assert "was made with --temperature 1.0, and goes on with 0.9" in "".join(capsys.readouterr())
    assert [line["kl_coefficient"] for line in metrics(tmp_path)] == [0.05, 0.7, 0.7]


def test_grpo_without_groups_and_ppo_from_grpos_checkpoint_are_refused(
    example: Run, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="critic_tp .2. and critic_pp .None. are PPO's"):
        example("grpo", "--reward", own(folder, "share"), *GROUPS, "--critic-tp", "2", "--save", tmp_path)
    with pytest.raises(UsageError, match="samples_per_prompt .1. makes no groups"):
        example("grpo", "--reward", own(folder, "share"), "--samples-per-prompt", "1", "--save", tmp_path)
    with pytest.raises(UsageError, match=r"global_batch_size \(7\): use 28 answers"):  # 7 and 4 an answer's prompt
        example(
            "grpo", "--reward", own(folder, "share"), "--samples-per-prompt", "4", "--global-batch-size", "7", "--save",
            tmp_path,
        )  # fmt: skip
    for flags, said in (("--dynamic-sampling 1", "has no groups"), ("--importance sequence", "has one a token")):
        with pytest.raises(UsageError, match=said):
            example(
                "grpo", "--reward", own(folder, "share"), "--advantage", "reinforce++", *flags.split(), "--save",
                tmp_path,
            )  # fmt: skip
    example("grpo", "--reward", own(folder, "share"), *GROUPS, "--steps", "1", "--save", tmp_path)
    with pytest.raises(UsageError, match="has no critic beside it"):
        example("ppo", "--reward", folder / "taste", "--save", tmp_path)


@pytest.mark.parametrize(
    ("function", "kind"), [("broken", "no such thing"), ("none", "nan"), ("blocks", "blocked")]
)
def test_a_reward_that_fails_stops_the_run_with_its_prompt_and_nothing_is_lost(
    function: str, kind: str, example: Run, folder: Path, tmp_path: Path
) -> None:
    good = ["--reward", own(folder, "share"), *GROUPS, "--save", tmp_path, "--save-every", "1", "--keep", "0"]
    assert example("grpo", *good, "--steps", "2") == 0
    bad = ["--reward", own(folder, function), "--reward-timeout", "1", *good[2:], "--rollout-batch-size", "12"]
    with pytest.raises(RewardError) as error:
        example("grpo", *bad)
    assert function in str(error.value) and kind in str(error.value) and "3" in str(error.value)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 2
    assert latest(tmp_path).name == "step-00000002"
    for policy, others in (("skip", {"left_out"}), ("zero", set())):
        assert example("grpo", *bad, "--steps", "3", "--on-reward-error", policy, "--save", tmp_path / policy) == 0
        line = read_metrics(tmp_path / policy / "metrics.jsonl")[-1]
        assert {"left_out"} & set(line) == others and line["loss"] == line["loss"]


def test_a_reward_that_fails_leaves_a_checkpoint_of_the_iterations_before(
    example: Run, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "late.py").write_text("""
asked = 0

def late(prompt, completion, **record):
    global asked
    asked += 1
    return 1e300 if asked == 9 else float(len(completion) % 3)
""")
    arguments = ["--reward", f"{tmp_path / 'late.py'}:late", "--save", tmp_path / "run", "--save-every", "0"]
    with pytest.raises(RewardError, match="scored 1e.300"):
        example("ppo", *arguments)
    assert latest(tmp_path / "run").name == "step-00000002" and len(metrics(tmp_path / "run")) == 2
    assert example("ppo", *arguments) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def start(folder: Path, name: str, ranks: int, *arguments: object) -> subprocess.Popen[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*(launch if ranks > 1 else [sys.executable]), str(EXAMPLES / f"{name}.py"), *given(folder)]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip


def test_killed_in_the_middle_of_a_rollout_it_loses_that_rollout_alone(folder: Path, tmp_path: Path) -> None:
    """The resumed run equals the unbroken one, and no reward process is left."""
    arguments = ["--reward", folder / "taste", own(folder, "slow"), "--save-every", "1", "--steps", "3"]
    whole = start(folder, "ppo", 1, *arguments, "--save", tmp_path / "whole")
    assert whole.wait(timeout=300) == 0, whole.stdout.read() if whole.stdout else ""
    broken = start(folder, "ppo", 1, *arguments, "--save", tmp_path / "parts")
    deadline = time.monotonic() + 240
    while latest(tmp_path / "parts") is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)  # in the rewards of the second iteration, a second long
    os.kill(broken.pid, signal.SIGKILL)
    broken.wait(timeout=60)
    resumed = start(folder, "ppo", 1, *arguments, "--save", tmp_path / "parts")
    assert resumed.wait(timeout=300) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


@pytest.mark.parametrize("number", range(2))
def test_ranks_that_finish_at_different_lengths_do_not_wait_for_ever(number: int, folder: Path, tmp_path: Path) -> None:
    """Random layouts, lengths and batches, under a watchdog."""
    draw = random.Random(number)
    ranks, layout = draw.choice([(2, ["--tp", "2"]), (2, ["--pp", "2"]), (2, []), (2, ["--zero", "3"])])
    flags = ["--max-new-tokens", draw.randint(1, 20), "--decode-batch", draw.randint(1, 6)]
    flags += ["--seed", draw.randint(0, 99)]
    job = start(folder, "grpo", ranks, *layout, *flags, *GROUPS, "--reward", own(folder, "share"), "--steps", "2",
                "--dynamic-sampling", "1", "--save", tmp_path)  # fmt: skip
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said
