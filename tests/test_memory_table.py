"""What is printed and drawn about memory: the table of a run, `megallm memory`, the picture, and what pages quote."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megallm.cli.main import run as megallm_run
from megallm.config.checkpoint import CheckpointConfig
from megallm.config.data import DataConfig
from megallm.config.numerics import NumericsConfig
from megallm.config.parallel import ParallelConfig
from megallm.config.presets import get_preset
from megallm.config.run import RunConfig
from megallm.config.train import TrainConfig
from megallm.monitor.memory import MeasuredMemory
from megallm.monitor.memory_table import format_bytes, format_memory_table
from megallm.planner.memory import CauseBytes, MemoryPlan, predict_memory
from megallm.runtime.launch import UsageError
from megallm.trainers import memory, pretrain

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
MIB = 2**20

DEVICE = CauseBytes(parameters=20 * MIB, gradients=40 * MIB, optimizer=0, activations=3000 * MIB, buffers=MIB // 2)
PLAN = MemoryPlan(pp_rank=0, device=DEVICE, host=CauseBytes())
OFFLOADED = MemoryPlan(pp_rank=1, device=DEVICE, host=CauseBytes(parameters=10 * MIB, optimizer=60 * MIB))
MEASURED = MeasuredMemory(
    device=CauseBytes(parameters=20 * MIB, gradients=40 * MIB, optimizer=0, activations=None, buffers=None),
    host=CauseBytes(parameters=10 * MIB, gradients=100, optimizer=60 * MIB),
    peak=60 * MIB,
)


def test_the_table_of_a_plan() -> None:
    assert format_memory_table(PLAN, capacity=2048 * MIB) == "\n".join(
        (
            "memory of a rank     predicted",
            "  parameters          20.0 MiB",
            "  gradients           40.0 MiB",
            "  optimizer                  0",
            "  activations         2.93 GiB",
            "  buffers              0.5 MiB",
            "  total               2.99 GiB",
            "  the device has      2.00 GiB  less than is needed",
        )
    )


def test_the_table_with_measures_and_a_host() -> None:
    assert format_memory_table(OFFLOADED, MEASURED) == "\n".join(
        (
            "memory of a rank        device      device        host        host",
            "                     predicted    measured   predicted    measured",
            "  parameters          20.0 MiB    20.0 MiB    10.0 MiB    10.0 MiB",
            "  gradients           40.0 MiB    40.0 MiB           0     0.1 KiB",
            "  optimizer                  0           0    60.0 MiB    60.0 MiB",
            "  activations         2.93 GiB           -           0           0",
            "  buffers              0.5 MiB           -           0           0",
            "  total               2.99 GiB    60.0 MiB    70.0 MiB    70.0 MiB",
        )
    )


def test_the_allocator_has_a_row_where_there_is_one() -> None:
    gpu = MeasuredMemory(device=MEASURED.device, host=CauseBytes(), peak=1, allocator_peak=64 * MIB)
    lines = format_memory_table(PLAN, gpu, capacity=80 * 10**9).splitlines()
    assert lines[-2:] == ["  allocator                       64.0 MiB", "  the device has     74.51 GiB"]


@pytest.mark.parametrize(
    ("count", "text"), [(None, "-"), (0, "0"), (1023, "1.0 KiB"), (MIB, "1.0 MiB"), (2**30, "1.00 GiB")]
)
def test_bytes_as_text(count: int | None, text: str) -> None:
    assert format_bytes(count) == text


def offloading(tmp_path: Path) -> RunConfig:
    (tmp_path / "text.txt").write_text("It was day 1 of the voyage and the sea was calm as on the day before.\n" * 99)
    return RunConfig(
        parallel=ParallelConfig(offload="optimizer"),
        train=TrainConfig(seq_length=16, steps=1),
        data=DataConfig(data=(str(tmp_path / "text.txt"),)),
        checkpoint=CheckpointConfig(),
    )


def test_a_run_that_its_host_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = offloading(tmp_path)
    monkeypatch.setattr(memory, "available_host_memory", lambda: 50 * MIB)
    found = pretrain.plan(run, world_size=1, cache_dir=tmp_path)
    needed = found.job.memory.host.total
    assert needed == 16 * (found.job.memory.device.parameters or 0) // 4  # fp32: weights, sums, two moments
    with pytest.raises(ValueError, match=r"offload needs 0.\d GiB .* each of 8 ranks.* but 0.0 GiB are available"):
        pretrain.plan(run, world_size=8, local_world_size=8, cache_dir=tmp_path)


def test_the_table_in_the_docs_is_what_is_predicted() -> None:
    plan = predict_memory(
        get_preset("tiny").replace(vocab_size=2048), ParallelConfig(zero=3), dp=2, micro_batch_size=8, seq_length=128,
        num_microbatches=1, numerics=NumericsConfig(precision="bf16"), device_type="cpu",
    )  # fmt: skip
    page = PAGE.read_text(encoding="utf-8")
    assert [line for line in format_memory_table(plan).splitlines() if f"    {line}" not in page] == []


def test_figure_1_of_the_paper_is_printed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "states.png"
    words = ["memory", "--parameters", "7.5e9", "--ranks", "64", "--grad-dtype", "bf16", "--out", str(out)]
    assert megallm_run(words) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r"\d +\S", line)]
    totals = {(row[1], row[0]): row[5] for row in rows}
    assert [totals["none", zero] for zero in "0123"] == ["120.00", "31.41", "16.64", "1.88"]
    assert [totals["optimizer", zero] for zero in "0123"] == ["30.00", "30.00", "15.00", "0.23"]
    assert totals["optimizer+params", "3"] == "0.00"
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (PAGE.parent / "img" / "zero_memory.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "(img/zero_memory.png)" in PAGE.read_text(encoding="utf-8")


def test_the_largest_models_are_as_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    assert megallm_run(["memory", "--ranks", "1", "--device-gb", "80", "--host-gb", "1000"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r"\d +\S", line)]
    largest = {(row[1], row[0]): row[-1] for row in rows}
    quoted = re.findall(r"^\|.*\| (\d+\.\dB) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    shown = [("none", "0"), ("optimizer", "0"), ("optimizer", "2"), ("optimizer+params", "3")]
    assert quoted == [largest[each] for each in shown]


@pytest.mark.parametrize("flag", ["--parameters", "--ranks", "--device-gb", "--host-gb", "--layer-parameters"])
def test_sizes_must_be_positive(flag: str) -> None:
    with pytest.raises(UsageError, match=f"{flag} is 0: give a number above 0"):
        megallm_run(["memory", flag, "0"])


def test_a_cpu_has_no_capacity_of_its_own() -> None:
    assert memory.device_capacity(torch.device("cpu")) is None
