"""What is made of the GPU benchmark's rows: verdicts, the table of back ends, the report."""

# ruff: noqa: E402  (benchmarks/ is no package: its path comes first)
from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import report
from gpu_parts import table
from gpu_parts.bars import judge, show
from gpu_parts.cases_losses import GEMMS, MAIN_GRAD
from gpu_parts.rows import FIELDS, UNKNOWN, append_csv, row

FACTS = {"date": "2026-01-01", "gpu": "NVIDIA H200", "driver": "580", "torch": "2.11.0", "triton": "3.6.0",
         "python": "3.12.3", "commit": "abc", "command": "python benchmarks/gpu.py"}  # fmt: skip


def sample_rows() -> list[dict[str, Any]]:
    """A run as it might come back from an H200."""
    common = {"section": "rms_norm", "op": "rms_norm", "case": "H 4096", "size": 4096, "dtype": "bfloat16"}
    rows = [row(**common, contender="triton", direction="fwd", graph_us=31.0, eager_us=60.0, of_ceiling=0.9)]
    rows += [row(**common, contender="triton", direction="bwd", graph_us=60.0, eager_us=80.0, of_ceiling=0.7)]
    rows += [
        row(**common, contender=name, direction="both", graph_us=us, eager_us=2 * us, gb_per_s=3000.0, of_ceiling=0.8)
        for name, us in (("triton", 90.0), ("torch.compile", 100.0), ("liger", 80.0), ("torch", 300.0))
    ]
    head = {"section": "linear_cross_entropy", "op": "linear_cross_entropy", "case": "H V", "size": 128256}
    head |= {"dtype": "bfloat16", "direction": "both"}
    rows += [row(**head, contender=GEMMS, eager_us=33000.0, peak_mib=100.0)]
    rows += [row(**head, contender=MAIN_GRAD, eager_us=36000.0, peak_mib=1100.0)]
    attention = {"section": "attention", "op": "attention", "case": "D 128 S 8192", "size": -1, "dtype": "bfloat16"}
    for name, rate in (("triton", 610.0), ("SDPA flash", 340.0)):
        numbers = {"graph_us": 3.6e5 / rate, "tflop_per_s": rate, "of_ceiling": 0.5}
        rows += [row(**attention, contender=name, direction="fwd", **numbers)]
    step = {"section": "train_1b", "op": "train_step", "case": "Llama 1B S 4096", "dtype": "bfloat16"}
    for name, rate, mfu in (("megallm triton", 60000.0, 0.55), ("hf compile", 50000.0, 0.46)):
        numbers = {"eager_us": 1.0, "tokens_per_s": rate, "mfu": mfu, "loss": 11.9, "peak_mib": 4e4}
        rows += [row(**step, contender=name, direction="step", **numbers)]
    update = {"section": "adamw", "op": "adamw", "case": "fp32", "contender": "triton", "direction": "step", "size": 0}
    rows += [row(**update, graph_us=6900.0, of_ceiling=0.94, launches=1)]
    rows += [row(section="check", op="rope", case="x", contender="triton", status="failed", note="bad | pipe")]
    good = {"section": "check", "case": "H 4096", "contender": "triton", "settings": ["a"]}
    rows += [row(**good, op=op) for op in ("attention", "adamw")]
    return rows


def test_verdicts_name_the_measured_number() -> None:
    found = {v.what: v for v in judge(sample_rows())}
    assert found["RMSNorm forward, H 4096"].is_met is True
    assert found["RMSNorm backward, H 4096"].is_met is False
    assert found["RoPE in place"].is_met is None
    assert found["nothing slower than torch.compile, both"].is_met is True
    assert found["nothing slower than torch.compile, fwd"].is_met is None
    assert found["nothing slower than liger, both"].is_met is False
    assert "1.125 x (rms_norm H 4096)" in found["nothing slower than liger, both"].measured
    assert found[f"linear + CE time ({MAIN_GRAD})"].measured == "1.091 x"
    assert found["attention D 128 causal S 8192 fwd"].is_met is True
    assert found["attention not slower than SDPA flash, fwd"].is_met is True
    assert found["AdamW launches, fp32"].is_met is True
    assert found["training step tokens/s, Llama 1B S 4096"].measured == "1.20 x hf compile"
    assert "NOT MET" in show(list(found.values()))


def pair(op: str, case: str, direction: str, peer: str, ratio: float) -> list[dict[str, Any]]:
    """Ours and a peer on one case, ours so many times as slow."""
    common = {"section": op, "op": op, "case": case, "direction": direction, "dtype": "bfloat16"}
    times = {"triton": 100 * ratio, peer: 100.0}
    return [row(**common, contender=name, graph_us=us, eager_us=500.0) for name, us in times.items()]


@pytest.mark.parametrize(
    ("op", "peer"), [("attention", "SDPA flash"), ("rms_norm", "liger"), ("rope", "torch.compile")]
)
def test_a_slower_forward_alone_is_seen(op: str, peer: str) -> None:
    rows = pair(op, "a", "fwd", peer, 1.05) + pair(op, "a", "bwd", peer, 0.8) + pair(op, "a", "both", peer, 0.9)
    rows += pair(op, "b", "fwd", peer, 0.7)
    found = {v.what.rpartition(", ")[2]: v for v in judge(rows) if "slower" in v.what and peer in v.what}
    assert {direction: v.is_met for direction, v in found.items()} == {"fwd": False, "bwd": True, "both": True}
    assert found["fwd"].measured == f"1 of 2 slower; worst 1.050 x ({op} a)"


def test_only_noise_of_a_percent_is_forgiven_and_said() -> None:
    rows = pair("attention", "a", "fwd", "SDPA flash", 1.009) + pair("attention", "a", "bwd", "SDPA flash", 1.011)
    found = {v.what: v for v in judge(rows)}
    close, slower = (found[f"attention not slower than SDPA flash, {name}"] for name in ("fwd", "bwd"))
    assert close.demanded == "<= 1 x (noise 1 %)"
    assert close.is_met is True and close.measured == "0 of 1 slower, 1 within noise; worst 1.009 x (attention a)"
    assert slower.is_met is False


def test_a_graph_is_not_compared_with_an_eager_call() -> None:
    rows = pair("attention", "a", "fwd", "SDPA flash", 0.5)
    rows[0]["eager_us"] = 600.0
    del rows[1]["graph_us"]
    verdict = next(v for v in judge(rows) if v.what == "attention not slower than SDPA flash, fwd")
    assert verdict.is_met is False and "1.200 x" in verdict.measured


def test_the_table_of_back_ends_takes_what_was_measured_right(tmp_path: Path) -> None:
    target = tmp_path / "measured.csv"
    target.write_text(",".join(table.COLUMNS) + "\nNVIDIA A100,rope,bfloat16,128,torch,9.0,2.11,3.6,old\n")
    fresh = table.table_rows(sample_rows(), FACTS)
    assert table.update_table(target, fresh) == len(fresh)
    table.update_table(target, fresh)  # twice changes nothing
    with target.open() as file:
        rows = list(csv.DictReader(file))
    found = {(r["op"], r["size"], r["backend"]): r["microseconds"] for r in rows if r["gpu"] == "NVIDIA H200"}
    assert found == {
        ("rms_norm", "4096", "triton"): "90.0", ("rms_norm", "4096", "torch"): "300.0",
        ("linear_cross_entropy", "128256", "triton"): "36000.0", ("adamw", "0", "triton"): "6900.0",
    }  # fmt: skip
    assert len(rows) == 5 and rows[0]["gpu"] == "NVIDIA A100"


def test_the_report_is_the_same_twice(tmp_path: Path) -> None:
    append_csv(tmp_path / "gpu.csv", sample_rows(), FACTS)
    texts = []
    for _ in range(2):
        assert report.main(["--results", str(tmp_path)]) == 0
        texts.append((tmp_path / "REPORT.md").read_text())
    assert texts[0] == texts[1]
    for expected in ("## NVIDIA H200", "| H 4096 | triton | 31.0 (90.0 %) |", "1.20 x hf compile", "bad / pipe"):
        assert expected in texts[0]
    pictures = sorted(path.name for path in (tmp_path / "img").glob("*.png"))
    assert pictures == ["nvidia-h200-attention.png", "nvidia-h200-bandwidth.png"]


def test_the_report_leaves_out_gpus_without_a_name(tmp_path: Path) -> None:
    for name in (UNKNOWN, "", "cpu, interpreted"):
        append_csv(tmp_path / "gpu.csv", sample_rows(), FACTS | {"gpu": name})
    assert report.main(["--results", str(tmp_path)]) == 0
    assert "##" not in (tmp_path / "REPORT.md").read_text()


def test_a_report_without_rows_has_no_pictures(tmp_path: Path) -> None:
    assert report.main(["--results", str(tmp_path)]) == 0
    assert not (tmp_path / "img").exists()


def test_a_file_of_other_columns_is_not_extended(tmp_path: Path) -> None:
    (tmp_path / "gpu.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        append_csv(tmp_path / "gpu.csv", [row(op="x")], FACTS)
    with pytest.raises(AssertionError):
        row(colour="red")
    assert len(set(FIELDS)) == len(FIELDS)
