"""The metrics file survives crashes and restarts; speed, console and picture are what docs/metrics.md says."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megallm.monitor.console import Console, format_count, format_duration, step_line, validation_line
from megallm.monitor.metrics import MetricsWriter, read_metrics
from megallm.monitor.throughput import Throughput, memory_gib


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def line(step: int, **more: object) -> dict[str, object]:
    return {"step": step, "loss": 5.0 / step, "grad_norm": 1.25, "learning_rate": 3e-4, "tokens": 64 * step, **more}


def written(path: Path, steps: range) -> Path:
    with MetricsWriter(path) as writer:
        for step in steps:
            writer.write(line(step))
    return path


def test_each_line_is_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "metrics.jsonl"
    writer = MetricsWriter(path)
    assert read_metrics(path) == []
    writer.write(line(1))
    assert read_metrics(path) == [line(1)]
    writer.write(line(2, valid_loss=5.5))
    assert read_metrics(path)[-1]["valid_loss"] == 5.5
    writer.close()


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": np.int64(1), "loss": math.nan, "a": torch.tensor(0.5), "b": -math.inf, "mfu": None})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "step": 1, "loss": None, "a": 0.5, "b": None, "mfu": None,
    }  # fmt: skip


def test_resume_cuts_later_steps_so_that_none_appears_twice(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", range(1, 8))
    with MetricsWriter(path, resume_step=4) as writer:
        for step in range(5, 10):
            writer.write(line(step, tokens=0))
    lines = read_metrics(path)
    assert [each["step"] for each in lines] == list(range(1, 10))
    assert lines[:4] == [line(step) for step in range(1, 5)]
    assert all(each["tokens"] == 0 for each in lines[4:])
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_from_the_beginning_starts_an_empty_file(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", range(1, 3))
    MetricsWriter(path).close()
    assert read_metrics(path) == []


@pytest.mark.parametrize("rest", ['{"step": 4, "lo', "\x00\x00\x00", "17"])
def test_a_half_written_last_line_is_left_out_and_removed_on_resume(tmp_path: Path, rest: str) -> None:
    path = written(tmp_path / "metrics.jsonl", range(1, 4))
    with open(path, "a") as file:
        file.write(rest)
    assert [each["step"] for each in read_metrics(path)] == [1, 2, 3]
    with MetricsWriter(path, resume_step=3) as writer:
        writer.write(line(4))
    assert [each["step"] for each in read_metrics(path)] == [1, 2, 3, 4]


def test_a_broken_line_in_the_middle_is_refused_by_number(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", range(1, 4))
    path.write_text(path.read_text().replace('{"step": 2', "<<<"))
    with pytest.raises(ValueError, match="line 2 is not one JSON object"):
        read_metrics(path)


@pytest.mark.parametrize("step", [4, 3, 0, None, "5"])
def test_a_step_that_does_not_grow_is_refused(tmp_path: Path, step: object) -> None:
    path = written(tmp_path / "metrics.jsonl", range(1, 5))
    with MetricsWriter(path, resume_step=4) as writer, pytest.raises(ValueError, match="cannot follow step 4"):
        writer.write({"step": step})


def test_a_line_without_a_step_is_refused(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "m.jsonl") as writer, pytest.raises(ValueError, match=r"needs a step.*\['loss'\]"):
        writer.write({"loss": 1.0})


def test_lap_divides_tokens_and_flops_by_time() -> None:
    clock = FakeClock()
    throughput = Throughput(flops_per_token=600.0, peak_flops=1e6, num_devices=4, clock=clock)
    clock.now += 7.0  # building the model is not training
    throughput.start()
    clock.now += 2.0
    lap = throughput.lap(tokens=3000, steps=4)
    assert (lap.step_time_s, lap.tokens_per_s, lap.mfu) == (0.5, 1500.0, pytest.approx(1500 * 600 / 4e6))


def test_mfu_is_none_where_no_peak_is_known() -> None:
    throughput = Throughput(flops_per_token=600.0, peak_flops=None)
    assert throughput.lap(tokens=1).mfu is None


def test_time_left_is_the_median_pace_without_the_first_lap() -> None:
    clock = FakeClock()
    throughput = Throughput(flops_per_token=1.0, peak_flops=None, clock=clock)
    assert throughput.eta_s(10) is None
    for seconds in (90.0, 1.0, 1.0, 30.0):
        clock.now += seconds
        throughput.lap(tokens=1)
    assert throughput.eta_s(10) == 10.0
    assert throughput.eta_s(-1) == 0.0


def test_memory_is_the_peak_resident_set_off_gpu() -> None:
    before = memory_gib(torch.device("cpu"))
    block = torch.ones(2**25)  # 0.125 GiB
    assert 0.01 < before <= memory_gib() < 1000
    assert block.sum() > 0


LARGE_PARENT = """
import subprocess, sys
block = b"1" * 2**30
print(subprocess.run([sys.executable, "-c", sys.argv[1]], check=True, capture_output=True, text=True).stdout)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a count that exec begins anew")
def test_the_peak_of_a_parent_is_not_the_childs() -> None:
    """A program started by vfork inherits getrusage's peak: a notebook's or a test's gigabyte is not its own."""
    child = "from megallm.monitor.throughput import memory_gib; print(memory_gib())"
    done = subprocess.run([sys.executable, "-c", LARGE_PARENT, child], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 0.01 < float(done.stdout) < 0.9, done.stdout


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (999.7, "1.00k"), (12_345, "12.3k"), (999_600, "1.00M"), (4.56e11, "456G")],
)
def test_counts_are_short(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (72, "1:12"), (3723, "1:02:03"), (183845, "2d 03:04:05")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_console_line_is_the_documented_one() -> None:
    metrics = {**line(20), "loss": 5.1234, "tokens_per_s": 12_300, "step_time_s": 0.41, "mfu": None, "memory_gib": 1.0}
    expected = "step   20/200 | loss   5.123 | grad norm   1.25 | lr 3.0e-04 |  12.3k tok/s |   0.41 s | eta 1:12"
    assert step_line(metrics, total_steps=200, eta_s=72) == expected


def test_console_columns_stay_aligned_whatever_the_numbers() -> None:
    usual = {
        "step": 1,
        "loss": 8.3178,
        "grad_norm": 1.0,
        "learning_rate": 1e-5,
        "tokens_per_s": 950,
        "step_time_s": 1.5,
    }
    odd = {
        "step": 1000,
        "loss": None,
        "grad_norm": 123456.7,
        "learning_rate": 0.0,
        "tokens_per_s": 1.2e7,
        "step_time_s": 0.002,
    }
    bars = [[at for at, char in enumerate(step_line(m, total_steps=1000)) if char == "|"] for m in (usual, odd)]
    assert bars[0] == bars[1]
    assert validation_line(7, {"loss": 5.0}, total_steps=1000).index("|") == bars[0][0]


def test_console_shows_what_a_trainer_adds() -> None:
    text = step_line({**line(1), "reward_margin": 0.123456, "mfu": 0.412}, total_steps=9)
    assert "| mfu 41.2% |" in text and text.endswith("| reward margin 0.1235")


def test_console_prints_header_once_first_last_due_steps_and_every_validation() -> None:
    stream = io.StringIO()
    console = Console(total_steps=23, log_every=10, header="tiny, 1 rank", stream=stream)
    for step in range(1, 24):
        console.step(line(step))
    console.validation(23, {"loss": math.nan})
    lines = stream.getvalue().splitlines()
    assert lines[0] == "tiny, 1 rank"
    assert [text.split("/")[0].split()[-1] for text in lines[1:]] == ["1", "10", "20", "23", "23"]
    assert lines[-1].startswith("valid") and "nan" in lines[-1]
    assert "\r" not in stream.getvalue()


def test_console_rate_limit_leaves_out_steps_that_come_too_soon() -> None:
    clock, stream = FakeClock(), io.StringIO()
    console = Console(total_steps=100, min_interval_s=5.0, stream=stream, clock=clock)
    for step in range(1, 101):
        clock.now += 1.0
        console.step(line(step))
    assert stream.getvalue().count("\n") == 1 + 19 + 1  # the first, every fifth second, the last


def test_plot_draws_one_run_and_several(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    from megallm.monitor.plots import plot_loss

    first = tmp_path / "first.jsonl"
    with MetricsWriter(first) as writer:
        for step in range(1, 101):
            writer.write(
                line(step, loss=math.nan if step == 50 else 5 / step, **({"valid_loss": 1.0} if step == 9 else {}))
            )
    second = written(tmp_path / "second.jsonl", range(1, 2))
    plot_loss(first, tmp_path / "pictures" / "one.png", title="one")
    plot_loss([first, second], tmp_path / "two.png")
    for png in (tmp_path / "pictures" / "one.png", tmp_path / "two.png"):
        assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and png.stat().st_size > 10_000


def test_plot_refuses_a_file_without_a_loss(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    from megallm.monitor.plots import plot_loss

    path = written(tmp_path / "metrics.jsonl", range(1, 1))
    with pytest.raises(ValueError, match="no line with a loss"):
        plot_loss(path, tmp_path / "loss.png")


def test_smoothing_keeps_constants_and_the_first_value() -> None:
    from megallm.monitor.plots import smooth

    assert smooth(np.full(7, 2.5), 3) == pytest.approx(np.full(7, 2.5))
    assert smooth(np.array([9.0, 1.0, 2.0, 6.0]), 1) == pytest.approx([9.0, 4.0, 3.0, 4.0])
