"""examples/pipeline.py: the stages run one after another and not twice, and their report stands alone."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megallm.config.check import check_run
from megallm.config.check_end_to_end import check_end_to_end
from megallm.config.check_finetune import before_epochs
from megallm.config.check_rl import check_rl
from megallm.config.end_to_end import STAGES, from_file, learned_from, wired, with_layout, with_settings
from megallm.config.presets import get_preset
from megallm.monitor.charts import Bars, Line, bar_chart, line_chart, number
from megallm.monitor.end_to_end_report import read_run, render
from megallm.monitor.report import Chart, Page, Section, Table, html_page
from megallm.runtime.environment import is_launched
from megallm.trainers.end_to_end import cost
from megallm.trainers.end_to_end_records import begun, check_begun, finished

ROOT = Path(__file__).parents[1]


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PIPELINE = load(ROOT / "examples" / "pipeline.py")
DEFAULTS = PIPELINE.DEFAULTS
PAIRS = [("day", "night"), ("sun", "moon"), ("sea", "land"), ("east", "west")]
TINY = """
all: {global_batch_size: 4, micro_batch_size: 2, seq_length: 48, eval_every: 0, eval_sequences: 4, warmup_steps: 1}
base: {data: words.txt, steps: 2, tokenizer_vocab_size: 280}
sft: {data: answers.jsonl, steps: 2}
reward: {data: pairs.jsonl, steps: 2, valid_fraction: 0.2}
ppo: {data: prompts.jsonl, steps: 2, critic_warmup: 0, rollout_batch_size: 4, max_new_tokens: 6, update_epochs: 1}
dpo: {data: pairs.jsonl, steps: 2, valid_fraction: 0.2}
evaluation: {prompts: held_out.jsonl, num_prompts: 4, num_pairs: 8, num_shown: 2, max_new_tokens: 6}
"""


def write_inputs(folder: Path) -> None:
    text = [f"the {a} is long and the {b} is {i} hours away" for i in range(80) for a, b in PAIRS]
    (folder / "words.txt").write_text("\n".join(text))
    rows: dict[str, list[dict[str, str]]] = {"answers": [], "pairs": [], "prompts": [], "held_out": []}
    for i in range(10):
        for a, b in PAIRS:
            prompt = f"what is not {a} {i}?"
            rows["answers"].append({"prompt": prompt, "completion": b})
            rows["pairs"].append({"prompt": prompt, "chosen": b, "rejected": f"{a} {a}"})
            rows["prompts"].append({"prompt": prompt})
            rows["held_out"].append({"prompt": f"and what is not {a} {i}?"})
    for name, records in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    (folder / "tiny.yaml").write_text(TINY)


def run(folder: Path, *words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "XDG_CACHE_HOME": str(folder / "cache")}
    program = str(ROOT / "examples" / "pipeline.py")
    start = [sys.executable, program, "--config", "tiny.yaml", "--save", "runs/p", *words]
    done = subprocess.run(
        start, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A finished run on the default layout, started as one command, and what it printed."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_inputs(folder)
    yield folder, run(folder)


class Checked(HTMLParser):
    """Every element is closed in order; what it refers to is collected."""

    VOID = ("meta", "br", "line", "circle", "rect", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID or (tag == "circle" or tag == "rect"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def parsed(text: str) -> Checked:
    checked = Checked()
    checked.feed(text)
    checked.close()
    assert checked.open == []
    return checked


def check_report(text: str) -> None:
    checked = parsed(text)
    assert checked.headings == [
        "From text to a policy", "Results", "Before and after", "Pretraining", "Supervised fine-tuning", "Reward model",
        "PPO", "DPO", "Times and machine", "Settings",
    ]  # fmt: skip
    assert [each for each in checked.references if not each.startswith("#")] == []
    assert {each[1:] for each in checked.references} <= set(checked.ids)
    assert re.findall(r"https?://|url\(|@import|<script", text) == []
    assert "not finished" not in text and text.count("<svg") >= 18


def test_one_command_runs_every_stage_on_tp2_pp2(whole: tuple[Path, str]) -> None:
    folder, said = whole
    assert [f"stage {i} of 6" in said for i in range(1, 7)] == [True] * 6
    assert said.count("4 ranks = tp 2 x pp 2 x dp 1") == 5
    assert "expected about" in said
    found = json.loads((folder / "runs/p/evaluation.json").read_text())
    assert list(found["models"]) == ["base", "sft", "ppo", "dpo"]
    assert len(found["samples"]) == 2 and set(found["samples"][0]["answers"]) == set(found["models"])
    assert found["models"]["sft"]["win_rate"] is None and 0.0 <= found["models"]["ppo"]["win_rate"] <= 1.0
    assert found["reward"]["pairs"] == 8 and len(found["reward"]["differences"]) == 8
    assert found["machine"]["ranks"] == "4"
    check_report((folder / "runs/p/report.html").read_text(encoding="utf-8"))


def test_finished_stages_are_skipped_and_others_go_on(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    record, before = folder / "runs/p/dpo/stage.json", begun(folder / "runs/p", "dpo")
    record.unlink()  # as if it had been stopped behind its last checkpoint
    (folder / "runs/p/report.html").unlink()
    said = run(folder, "--tp", "1", "--pp", "1")  # on any layout
    assert said.count("skipped") == 4 and "stage 5 of 6: DPO" in said and "nothing left to train" in said
    assert json.loads(record.read_text())["resumed_from"] == 2
    assert before is not None and begun(folder / "runs/p", "dpo") == before
    reward = begun(folder / "runs/p", "reward")
    assert before.began_from.keys() == {"sft"} and reward is not None and before.began_from == reward.began_from
    assert "stage 6 of 6: evaluation" in said
    check_report((folder / "runs/p/report.html").read_text(encoding="utf-8"))


def test_other_settings_are_refused_for_finished_stages(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    config = from_file(DEFAULTS, str(folder / "tiny.yaml"))
    check_begun(with_settings(config, ["dpo.log_every=3"]), str(folder / "runs/p"))
    with pytest.raises(ValueError, match=r"sft was finished with other settings \(sft.optim.learning_rate: 0.001, now"):
        check_begun(with_settings(config, ["sft.learning_rate=0.5"]), str(folder / "runs/p"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dpo.global_batch_size=5", "dpo: global_batch_size (5) is not divisible by micro_batch_size"),
        ("ppo.max_new_tokens=128", "ppo: max_new_tokens (128) leaves no room"),
        ("all.tp=3", "base: "),
        ("evaluation.max_new_tokens=500", "evaluation: max_new_tokens (500) leaves no room"),
    ],
)
def test_mistakes_in_late_stages_are_found_at_once(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_end_to_end(wired(with_settings(DEFAULTS, [text]), "out"), get_preset("tiny"), 4)


def test_the_report_alone_needs_no_ranks_and_tells_what_is_missing(whole: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = whole
    assert "report.html" in run(folder, "--report-only")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n')
    text = render(read_run(tmp_path))
    assert "not finished" in text and "Supervised fine-tuning" in parsed(text).headings
    with pytest.raises(FileNotFoundError, match="holds no run"):
        read_run(tmp_path / "sft")


def test_every_stage_begins_from_the_one_before() -> None:
    config = wired(DEFAULTS, "out")
    assert [config.stage(name).checkpoint.save for name in STAGES] == [f"out/{name}" for name in STAGES]
    models = {name: config.stage(name).model for name in STAGES}
    assert models == {"base": None, "sft": "out/base", "reward": "out/sft", "ppo": "out/sft", "dpo": "out/sft"}
    assert config.ppo.rewards.reward == ("out/reward",)


def test_what_a_stage_learns_depends_on_those_before_and_not_on_the_layout() -> None:
    assert set(learned_from(DEFAULTS, "ppo")) == {"base", "sft", "reward", "ppo"}
    same = with_settings(with_layout(DEFAULTS, tp=1, pp=4), ["all.micro_batch_size=1", "dpo.beta=0.5"])
    assert learned_from(same, "ppo") == learned_from(DEFAULTS, "ppo")
    assert learned_from(with_settings(DEFAULTS, ["base.seed=3"]), "ppo") != learned_from(DEFAULTS, "ppo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ppo.steps", "write PART.NAME=VALUE"),
        ("pp.steps=3", "unknown part 'pp'"),
        ("ppo.step=3", "unknown name 'step'"),
        ("sft.model=x", "sft.model follows from the stages"),
        ("all.save=x", "save follows from the stages"),
        ("all.nothing=1", "no stage has 'nothing'"),
        ("evaluation.num_prompts=x", "num_prompts"),
        ("ppo=3", "write PART.NAME=VALUE"),
    ],
)
def test_wrong_settings_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        with_settings(DEFAULTS, [text])


def test_the_preset_of_a_cluster_passes_the_checks() -> None:
    config = wired(from_file(DEFAULTS, str(PIPELINE.PRESETS["cluster"])), "out")
    for name in STAGES:
        stage = config.stage(name)
        assert (stage.parallel.tp, stage.parallel.pp, stage.numerics.precision) == (4, 2, "bf16")
        assert check_run(before_epochs(stage), get_preset("llama3-8b"), 32) == []
    check_rl(config.ppo)
    assert config.evaluation.prompts == ("data/held_out_prompts.jsonl",)


def test_a_damaged_record_is_named(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    record = folder / "runs/p/base/stage.json"
    before = record.read_text()
    record.write_text("{")
    try:
        with pytest.raises(ValueError, match="stage.json is damaged"):
            check_begun(DEFAULTS, str(folder / "runs/p"))
    finally:
        record.write_text(before)
    assert finished(folder / "runs/p", "base") is not None and finished(folder, "nothing") is None


def test_more_steps_cost_more() -> None:
    longer = with_settings(DEFAULTS, [f"{name}.steps={2 * DEFAULTS.stage(name).train.steps}" for name in STAGES])
    assert all(cost(name, longer) == 2 * cost(name, DEFAULTS) for name in STAGES)


def test_only_a_launcher_makes_ranks() -> None:
    assert not is_launched({"WORLD_SIZE": "4"}) and is_launched({"RANK": "0"})


def test_charts_hold_every_point_and_survive_odd_data() -> None:
    chart = line_chart([Line("a", [1, 2, 3], [0.1, float("nan"), 0.3]), Line("b", [2], [5.0], marks=True)], level=0.2)
    assert "nan" not in chart and chart.count("<polyline") == 2 and "legend" in chart
    parsed(chart)
    assert "nothing was measured" in line_chart([Line("a", [], [])])
    assert "nothing was measured" in line_chart([Line("a", [1.0], [float("nan")])])
    parsed(line_chart([Line("a", [1, 2], [3.0, 3.0])]))  # flat
    parsed(line_chart([Line("a", [7], [3.0])]))
    bars = bar_chart(Bars(edges=[0, 1, 2], counts=[[1, 0], [2, 2]], names=("x", "y")), x_name="x", y_name="n")
    assert bars.count("<rect") == 3
    assert [number(each) for each in (0.0, 0.05, 1200.0, 2e-5, -3.5)] == ["0", "0.05", "1,200", "2e-5", "\u22123.5"]


def test_texts_of_models_cannot_break_the_page() -> None:
    evil: Any = "</table><script>alert('x')</script>&amp;"
    page = Page(title=evil, lead=evil, sections=[
        Section(title=evil, charts=[Chart(title=evil, svg=line_chart([Line(evil, [1], [1])], y_name=evil))],
                tables=[Table(head=(evil,), rows=[(evil,)])], settings={evil: [(evil, evil)]}),
    ])  # fmt: skip
    text = html_page(page)
    assert "<script" not in text
    parsed(text)
