"""The command line: one flat set of flags, a config file, and the messages of what goes wrong."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from megallm.config.fields import leaf_fields
from megallm.config.flags import ALIASES, build_parser, config_fields, format_config, parse_run_config
from megallm.config.parallel import ParallelConfig
from megallm.config.run import RunConfig
from megallm.config.train import TrainConfig

PUBLISHED_FLAGS = (
    "model from_scratch tp pp cp ep sequence_parallel schedule virtual_stages pipeline_partition zero "
    "micro_batch_size global_batch_size seq_length steps learning_rate lr_schedule warmup_steps weight_decay "
    "max_grad_norm precision recompute seed data save load save_every keep metrics_file log_every"
).split()


def parse(*argv: str, **options: object) -> RunConfig:
    return parse_run_config(argv, **options)[0]  # type: ignore[arg-type]


def error_of(capsys: pytest.CaptureFixture[str], *argv: str, **options: object) -> str:
    """The one line that a refused command line prints; it must exit with code 2."""
    with pytest.raises(SystemExit) as exit_info:
        parse(*argv, **options)
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def test_no_two_sections_share_a_flag() -> None:
    names = [field.name for field in config_fields(RunConfig)]
    assert len(names) == len(set(names))


def test_a_section_with_a_taken_name_is_refused() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Clash(RunConfig):
        tp: int = 3

    with pytest.raises(ValueError, match=r"parallel\.tp and tp would be the same flag|tp and parallel\.tp would be"):
        config_fields(Clash)


def test_published_flags_exist() -> None:
    assert set(PUBLISHED_FLAGS) <= {field.name for field in config_fields(RunConfig)}


def test_every_field_has_a_docstring() -> None:
    assert [field.path for field in leaf_fields(RunConfig) if not field.doc] == []


def test_suggested_flags_exist() -> None:
    parser = build_parser(RunConfig())
    ours = {option for action in parser._actions for option in action.option_strings}
    assert {suggestion.split()[0] for suggestion in ALIASES.values()} <= ours
    assert not set(ALIASES) & ours


def test_nothing_given_is_the_defaults() -> None:
    defaults = RunConfig(model="gpt2", train=TrainConfig(steps=7))
    assert parse() == RunConfig()
    assert parse(defaults=defaults) == defaults


def test_flags_fill_their_sections() -> None:
    run = parse(
        "--tp", "2", "--learning-rate=1e-3", "--data", "0.3", "a", "0.7", "b", "--model", "gpt2", "--from-scratch",
        "--schedule", "interleaved", "--zero", "0", "--no-sequence-parallel", "--save", "out",
    )  # fmt: skip
    assert (run.parallel.tp, run.parallel.schedule, run.parallel.zero) == (2, "interleaved", 0)
    assert run.parallel.sequence_parallel is False
    assert run.optim.learning_rate == 1e-3
    assert run.data.data == ("0.3", "a", "0.7", "b")
    assert (run.model, run.from_scratch, run.checkpoint.save) == ("gpt2", True, "out")


@pytest.mark.parametrize("words", [["3,4,4,3"], ["3", "4", "4", "3"], ["3,4", "4,3"]])
def test_partition_takes_commas_or_spaces(words: list[str]) -> None:
    assert parse("--pipeline-partition", *words).parallel.pipeline_partition == (3, 4, 4, 3)


@pytest.mark.parametrize("word", ["auto", "none"])
def test_auto_takes_back_a_default(word: str) -> None:
    defaults = RunConfig(parallel=ParallelConfig(pipeline_partition=(1, 2), schedule="gpipe"))
    run = parse("--pipeline-partition", word, "--schedule", word, "--decay-steps", word, defaults=defaults)
    assert run.parallel.pipeline_partition is None
    assert run.parallel.schedule is None
    assert run.optim.decay_steps is None
    assert parse("--recompute", "none").train.recompute == "none"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tpp", "4"], "unknown flag --tpp: did you mean --tp?"),
        (["--micro_batch_size", "4"], "unknown flag --micro_batch_size: did you mean --micro-batch-size?"),
        (["--lr", "4"], "unknown flag --lr: did you mean --learning-rate?"),
        (["--preset=gpt2"], "unknown flag --preset: did you mean --model?"),
        (["--zzzzzz"], "unknown flag --zzzzzz ("),
        (["--step", "4"], "unknown flag --step: did you mean --steps?"),
        (["gpt2"], "unexpected argument 'gpt2'"),
        (["--tp", "two"], "--tp: 'two' is not a whole number"),
        (["--tp", "2.0"], "--tp: '2.0' is not a whole number"),
        (["--tp", "auto"], "--tp: 'auto' is not a whole number"),
        (["--tp"], "--tp: expected one argument"),
        (["--learning-rate", "fast"], "--learning-rate: 'fast' is not a number"),
        (["--learning-rate", "nan"], "--learning-rate: 'nan' is not a finite number"),
        (["--precision", "bf17"], "'bf17' is not one of fp64, fp32, bf16, fp16, fp8: did you mean bf16?"),
        (["--zero", "4"], "--zero: '4' is not one of 0, 1, 2, 3"),
        (["--pipeline-partition", "3,x"], "--pipeline-partition: 'x' is not a whole number"),
        (["--config", "missing.yaml"], "cannot read --config missing.yaml: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in error_of(capsys, *argv)


def test_help_shows_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse("--help", defaults=RunConfig(train=TrainConfig(steps=777)), description="Pretrain a GPT.")
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Pretrain a GPT." in text
    assert "Optimizer steps. (default: 777)" in text
    assert all("--" + field.name.replace("_", "-") in text for field in config_fields(RunConfig))
    assert "{fp64,fp32,bf16,fp16,fp8}" in text


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_config_file_takes_flat_names_and_sections(tmp_path: Path) -> None:
    text = "tp: 2\nmicro-batch-size: 4\nmodel: gpt2\ndata: [0.3, a, 1, b]\n"
    text += "optim: {learning_rate: 3e-4, warmup-steps: 5}"
    run = parse("--config", write(tmp_path / "run.yaml", text))
    assert (run.parallel.tp, run.train.micro_batch_size, run.optim.warmup_steps) == (2, 4, 5)
    assert run.optim.learning_rate == 3e-4  # YAML 1.1 reads 3e-4 as a string
    assert run.data.data == ("0.3", "a", "1", "b")
    assert run.model == "gpt2"


def test_config_file_values(tmp_path: Path) -> None:
    text = "sequence_parallel: false\nschedule: auto\ndecay_steps: null\npipeline_partition: [1, 2]\nfrom_scratch: true"
    run = parse("--config", write(tmp_path / "run.yaml", text), defaults=RunConfig())
    assert run.parallel.sequence_parallel is False
    assert run.parallel.schedule is None
    assert run.parallel.pipeline_partition == (1, 2)
    assert run.from_scratch is True
    one = write(tmp_path / "one.yaml", "data: corpus.txt\npipeline_partition: 3,4\nsequence_parallel: auto\n")
    run = parse("--config", one)
    assert run.data.data == ("corpus.txt",)
    assert run.parallel.pipeline_partition == (3, 4)
    assert run.parallel.sequence_parallel is None
    assert parse("--config", write(tmp_path / "empty.yaml", "")) == RunConfig()
    nested = write(tmp_path / "nested.yaml", "data: {data: [x], text_key: body}")
    assert parse("--config", nested).data.text_key == "body"


def test_flags_win_over_file_and_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", "tp: 2\npp: 3\n")
    defaults = RunConfig(parallel=ParallelConfig(tp=5, pp=5, virtual_stages=5))
    parallel = parse("--tp", "7", "--config", path, defaults=defaults).parallel
    assert (parallel.tp, parallel.pp, parallel.virtual_stages) == (7, 3, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpp: 2", "unknown name 'tpp': did you mean tp?"),
        ("parallel: {tpp: 2}", "unknown name 'tpp': did you mean tp?"),
        ("paralel: {tp: 2}", "unknown name 'paralel': did you mean parallel?"),
        ("train: {tp: 2}", "tp is not in the section 'train': it is parallel.tp"),
        ("tp: 2\nparallel: {tp: 2}", "tp is given twice"),
        ("tp: 2\ntp: 3", "tp is given twice"),
        ("micro-batch-size: 2\nmicro_batch_size: 2", "micro_batch_size is given twice"),
        ("tp: two", "tp: 'two' is not a whole number"),
        ("tp: 2.5", "tp: '2.5' is not a whole number"),
        ("tp: [2, 3]", "tp: [2, 3] is not a single value"),
        ("tp: true", "tp: True is not a value for it"),
        ("tp:", "tp: a value is missing"),
        ("save: no", "save: False is not a value for it: put it in quotes"),
        ("from_scratch: 1", "from_scratch: 1 is not true or false"),
        ("precision: bf17", "did you mean bf16?"),
        ("- tp", "expected `name: value` lines"),
        ("tp: [", "is not YAML"),
    ],
)
def test_config_file_mistakes_name_the_file_and_the_key(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str
) -> None:
    path = write(tmp_path / "run.yaml", text)
    error = error_of(capsys, "--config", path)
    assert message in error
    assert "run.yaml" in error


def add_own(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--names", nargs="+", default=[])


def test_own_arguments_come_back_apart(tmp_path: Path) -> None:
    run, own = parse_run_config(["--tp", "2", "--num-prompts", "9"], extra=add_own)
    assert run.parallel.tp == 2
    assert vars(own) == {"num_prompts": 9, "greedy": False, "names": []}
    path = write(tmp_path / "run.yaml", "num_prompts: 5\ngreedy: true\nnames: [a, b]\npp: 2\n")
    run, own = parse_run_config(["--config", path, "--num-prompts", "6"], extra=add_own)
    assert run.parallel.pp == 2
    assert vars(own) == {"num_prompts": 6, "greedy": True, "names": ["a", "b"]}


def test_mistakes_in_own_arguments_get_suggestions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "did you mean --num-prompts?" in error_of(capsys, "--num-prompt", "3", extra=add_own)
    path = write(tmp_path / "run.yaml", "num_promts: 5")
    assert "did you mean num_prompts?" in error_of(capsys, "--config", path, extra=add_own)
    path = write(tmp_path / "run.yaml", "num_prompts: many")
    assert "--num-prompts" in error_of(capsys, "--config", path, extra=add_own)


def test_a_model_brings_values_that_flags_override() -> None:
    def brought(model: str | None) -> dict[str, object]:
        return {"seq_length": 1024, "steps": 3} if model == "gpt2" else {}

    run = parse("--model", "gpt2", "--steps", "5", model_defaults=brought)
    assert (run.train.seq_length, run.train.steps) == (1024, 5)
    assert parse(model_defaults=brought) == RunConfig()


def test_a_subclass_adds_a_section() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Rl:
        clip_range: float = 0.2

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class RlRun(RunConfig):
        rl: Rl = dataclasses.field(default_factory=Rl)

    RlRun.__annotations__["rl"] = Rl  # a local class is no name that a type hint could find
    run = parse("--clip-range", "0.1", "--tp", "2", defaults=RlRun())
    assert run == RlRun(rl=Rl(clip_range=0.1), parallel=ParallelConfig(tp=2))


def test_printed_config_is_aligned_and_marks_changes() -> None:
    lines = format_config(parse("--tp", "2", "--pipeline-partition", "1,2")).split("\n")
    assert len({line.index(" = ") for line in lines}) == 1
    assert [line for line in lines if line.startswith("*")] == [
        line for line in lines if "parallel.tp " in line or "pipeline_partition" in line
    ]
    shown = {line[2:].split(" = ")[0].strip(): line.split(" = ")[1] for line in lines}
    assert shown["parallel.pipeline_partition"] == "1 2"
    assert shown["parallel.schedule"] == "auto"
    assert shown["checkpoint.save"] == "none"
    assert shown["from_scratch"] == "false"


def test_printed_config_can_compare_with_an_examples_defaults() -> None:
    defaults = RunConfig(parallel=ParallelConfig(tp=2))
    assert "*" not in format_config(defaults, defaults=defaults)
