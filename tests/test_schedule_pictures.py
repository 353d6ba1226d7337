"""Pictures of schedules and the command that prints them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megallm.cli import schedule as schedule_command
from megallm.pipeline.generators import interleaved, one_f_one_b
from megallm.pipeline.picture import format_text, save_png
from megallm.pipeline.simulate import simulate


def test_text_of_slots_and_of_times() -> None:
    schedule = one_f_one_b(2, 3)
    assert format_text(schedule).splitlines()[1:] == [
        "rank 0  0  1  .  0' 2  1' .  2'",
        "rank 1  .  0  0' 1  1' 2  2' .",
    ]
    assert format_text(simulate(schedule)).splitlines()[1:] == [
        "rank 0  0  1  .  .  0'--- 2  1'--- .  2'---",
        "rank 1  .  0  0'--- 1  1'--- 2  2'--- .  .",
    ]


def test_text_names_chunks_and_wraps() -> None:
    lines = format_text(interleaved(2, 2, 2), max_width=33).splitlines()
    assert lines[1].startswith("rank 0  a0  a1  b0  b1")
    assert all(len(line) <= 33 for line in lines[1:])
    assert sum(line.startswith("rank 1") for line in lines) > 1


def test_png_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures are optional")
    save_png(interleaved(2, 2, 2), tmp_path / "s.png", dpi=40)
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_schedule_command_prints_bubble_and_formula(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    schedule_command.add_arguments(parser)
    assert schedule_command.run(parser.parse_args(["--pp", "4", "--microbatches", "8", "--virtual-stages", "2"])) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("interleaved: pp 4, 2 virtual stages, 8 microbatches")
    assert "bubble:    18.75 % of the compute time (formula for free p2p: 18.75 %" in printed
    assert "peak live: 5.5 4.5 3.5 2.5 microbatches" in printed
    with pytest.raises(ValueError, match="multiple of pp"):
        schedule_command.run(parser.parse_args(["--pp", "4", "--microbatches", "6", "--schedule", "interleaved"]))
