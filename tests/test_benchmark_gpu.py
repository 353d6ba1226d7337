"""The GPU benchmark's code path on CPU: interpreted kernels, tiny shapes, workers that crash or hang."""

# ruff: noqa: E402  (benchmarks/ is no package: its path comes first)
from __future__ import annotations

import csv
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu
import report
from gpu_parts import cases_attention, launches, supervise, table
from gpu_parts.bars import judge, show
from gpu_parts.calls import Buffers, Case, CompileBudget, autograd_directions, differentiable
from gpu_parts.cases_losses import GEMMS, MAIN_GRAD
from gpu_parts.checks import CheckUnit
from gpu_parts.clock import Clock, spread
from gpu_parts.compare import bound, compare, poisoned
from gpu_parts.measure import measure_contender
from gpu_parts.place import Place, make_place
from gpu_parts.rows import FIELDS, append_csv, read_csv, row
from gpu_parts.worker import op_sections

PLACE = Place(device=torch.device("cpu"), tiny=True, seed=3)
FACTS = {"date": "2026-01-01", "gpu": "NVIDIA H200", "driver": "580", "torch": "2.11.0", "triton": "3.6.0",
         "python": "3.12.3", "commit": "abc", "command": "python benchmarks/gpu.py"}  # fmt: skip


def run_gpu(out: Path, *arguments: str) -> tuple[int, list[dict[str, str]]]:
    """Exit code and rows of a tiny run in this process."""
    code = gpu.main(["--tiny", "--device", "cpu", "--in-process", "--out", str(out), "--seed", "3", *arguments])
    return code, read_csv(out / "gpu.csv")


@pytest.mark.slow
def test_every_op_is_timed_beside_its_peers(tmp_path: Path) -> None:
    code, rows = run_gpu(tmp_path, "--skip", "check,train_1b,train_3b")
    assert code == 0
    ours = {(r["section"], r["op"]) for r in rows if r["contender"] == "triton" and r["status"] == "ok"}
    assert {section for section, _ in ours} == set(op_sections())
    assert {r["status"] for r in rows} <= {"ok", "absent"}
    absent = {r["contender"]: r["note"] for r in rows if r["status"] == "absent"}
    assert {"liger", "quack", "flash-attn-4", "cut-cross-entropy", "torch.compile", "SDPA cuDNN", "apex"} <= set(absent)
    assert all(absent.values())
    timed = [r for r in rows if r["status"] == "ok" and r["section"] != "ceilings"]
    assert all(float(r["eager_us"]) > 0 and float(r["host_us"]) > 0 and r["of_ceiling"] for r in timed)
    assert (tmp_path / "gpu-verdicts.txt").read_text().count("\n") >= 18


def test_every_row_carries_the_facts_of_its_run(tmp_path: Path) -> None:
    _, rows = run_gpu(tmp_path, "--sections", "ceilings,rope", "--commit", "f00d")
    assert {r["commit"] for r in rows} == {"f00d"}
    assert all(r["date"] and r["torch"] and r["triton"] and "--sections ceilings,rope" in r["command"] for r in rows)


@pytest.mark.slow
def test_all_checks_pass_and_a_worker_runs_them(tmp_path: Path) -> None:
    out = str(tmp_path)
    code = gpu.main(
        ["--check-only", "--tiny", "--device", "cpu", "--check-workers", "1", "--budget-s", "600", "--out", out]
    )
    rows = read_csv(tmp_path / "gpu.csv")
    bad = [(r["op"], r["case"], r["status"], r["note"]) for r in rows if r["status"] not in ("ok", "skipped")]
    assert (code, bad) == (0, [])
    assert {"rms_norm", "rope", "activation", "attention", "cross_entropy", "adamw", "permute", "grouped_gemm"} <= {
        r["op"] for r in rows if r["status"] == "ok"
    }
    # table rows that only long vectors reach are named, since the tiny sizes leave them out
    assert {r["contender"] for r in rows if r["status"] == "skipped"} == {"coverage"}


def test_a_wrong_kernel_fails_its_check_and_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_parts import checks_pointwise

    from megallm_kernels import activation

    launches.import_kernels()
    right = activation.activation_backward
    monkeypatch.setattr(activation, "activation_backward", lambda *a: right(*a) * 1.5)
    unit = next(u for u in checks_pointwise.units(PLACE) if u.op == "activation")
    monkeypatch.setattr("gpu_parts.worker.check_units", lambda place: [unit])
    code, rows = run_gpu(tmp_path, "--sections", "check,activation")
    failed = next(r for r in rows if r["section"] == "check" and r["status"] == "failed")
    assert code == 1 and "gated dx" in failed["note"] and "activation: " in failed["settings"]
    settings = launches.describe(activation, activation.plan(40))
    if settings in failed["settings"]:  # the tiny timing case plans other settings than the check
        timed = [r for r in rows if r["section"] == "activation" and r["contender"] == "triton"]
        assert {r["status"] for r in timed} == {"failed"}


def test_condemned_settings_are_not_timed() -> None:
    launches.import_kernels()
    case = op_sections()["activation"](PLACE)[0]
    sets = case.make(PLACE, PLACE.generator("x"), 2)
    with launches.recorded() as used:
        case.contenders[0].build(sets)["fwd"].call(0)
    assert used
    rows = measure_contender(
        case, case.contenders[0], sets, PLACE, Clock(PLACE), ceilings={}, condemned={next(iter(used)): "check x"},
        budget=CompileBudget(0.0),
    )  # fmt: skip
    assert {r["status"] for r in rows} == {"failed"} and "check x" in rows[0]["note"]


def test_a_peer_that_raises_is_a_row() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    contender = differentiable("peer", broken)
    case = Case(section="s", op="o", name="n", size=1, make=lambda *_: [], contenders=(contender,))
    sets = [Buffers(inputs=(torch.ones(3, requires_grad=True),), grads=(torch.ones(3),))]
    budget = CompileBudget(1.0)
    rows = measure_contender(case, contender, sets, PLACE, Clock(PLACE), ceilings={}, condemned={}, budget=budget)
    assert [(r["status"], r["note"]) for r in rows] == [("error", "RuntimeError: no kernel image")]


def test_backward_repeats_on_one_forward() -> None:
    sets = [Buffers(inputs=(torch.full((3,), 2.0, requires_grad=True),), grads=(torch.ones(3),)) for _ in range(2)]
    calls = autograd_directions(torch.square, sets)
    assert calls["bwd"].setup is not None
    calls["bwd"].setup()
    results = [calls["bwd"].call(1), calls["bwd"].call(1), calls["both"].call(0)]
    assert [each[0].tolist() for each in results] == [[4.0] * 3] * 3  # type: ignore[index]


def test_unwritten_memory_and_nan_never_pass() -> None:
    with poisoned():
        hollow = torch.empty(4)
    assert hollow.isnan().all()
    assert not compare("y", hollow, torch.ones(4)).is_good
    assert not compare("y", torch.ones(3), torch.ones(4)).is_good
    assert compare("y", torch.ones(4).bfloat16(), torch.ones(4)).is_good
    assert not torch.are_deterministic_algorithms_enabled()


def test_bounds_follow_the_dtype() -> None:
    rounded = torch.randn(10000, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float16, torch.bfloat16):
        finding = compare("y", rounded.to(dtype), rounded)
        assert finding.bound / 8 < finding.error < finding.bound
        assert bound(dtype, roundings=4) == pytest.approx(2 * bound(dtype), rel=1e-3)


def test_flops_count_visible_pairs() -> None:
    shape = cases_attention.Shape(tokens=12, seq=12, heads=3, kv_heads=1, dim=8)
    windowed = cases_attention.Shape(tokens=12, seq=12, heads=3, kv_heads=1, dim=8, window=5)
    packed = cases_attention.Shape(tokens=12, seq=7, heads=3, kv_heads=1, dim=8, offsets=(0, 7, 12))
    assert shape.flops == 4 * 8 * 3 * (12 * 13 / 2)
    assert windowed.flops == 4 * 8 * 3 * sum(min(i + 1, 5) for i in range(12))
    assert packed.flops == 4 * 8 * 3 * (28 + 15)


def test_percentiles() -> None:
    found = spread([float(i) for i in range(1, 101)])
    assert (found.p20, found.p50, found.p80) == (21.0, 50.5, 81.0)


# -- supervision ------------------------------------------------------------------------------------------------------

BAD_WORKER = """
import argparse, json, os, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
for name in ("--folder", "--name", "--shard"):
    parser.add_argument(name)
args = parser.parse_args()
folder = Path(args.folder)
done = json.loads((folder / "plan.json").read_text())["done"]
lines = (folder / f"rows-{args.name}.jsonl").open("a")
for key in ("s/op/first/us", "s/op/crashes/us", "s/op/hangs/us", "s/op/last/us"):
    if key in done:
        continue
    (folder / f"current-{args.name}.json").write_text(json.dumps({"key": key, "since": time.time()}))
    if "crashes" in key:
        os.abort()
    if "hangs" in key:
        time.sleep(600)
    lines.write(json.dumps({"status": "ok", "section": "s", "case": key}) + "\\n")
    lines.write(json.dumps({"done": key}) + "\\n")
    lines.flush()
"""


def test_a_crash_and_a_hang_cost_one_unit_each(tmp_path: Path) -> None:
    script = tmp_path / "bad_worker.py"
    script.write_text(BAD_WORKER)
    results = supervise.Results(csv=tmp_path / "gpu.csv", facts=FACTS)
    plan: dict[str, Any] = {"sections": ["s"], "deadlines": {"s": time.time() + 60}}
    supervise.run_sections(plan, results, tmp_path, num_workers=1, unit_limit_s=2.0, program=(str(script),))
    states = {r["case"]: r["status"] for r in results.rows}
    assert states == {"s/op/first/us": "ok", "crashes": "crashed", "hangs": "hung", "s/op/last/us": "ok"}
    assert len(read_csv(tmp_path / "gpu.csv")) == 4


def test_what_does_not_fit_the_budget_is_skipped_and_said(tmp_path: Path) -> None:
    _, rows = run_gpu(tmp_path, "--sections", "rope,activation", "--budget-s", "0")
    assert [(r["section"], r["status"]) for r in rows] == [("rope", "skipped"), ("activation", "skipped")]
    assert all("time is used up" in r["note"] for r in rows)


def test_deadlines_share_the_budget_in_order() -> None:
    ends = gpu.deadlines(list(gpu.SHARES), started=1000.0, budget_s=460.0)
    assert list(ends.values()) == sorted(ends.values())
    assert ends["train_3b"] == pytest.approx(1000.0 + 460.0 - gpu.SPARE_S)
    assert set(op_sections()) | {"ceilings", "check", "train_1b", "train_3b"} == set(gpu.SHARES)


def test_unknown_sections_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--sections", "rope,rops"])
    assert "rops" in capsys.readouterr().err
    with pytest.raises(ValueError, match="add --tiny"):
        make_place("cpu", tiny=False, seed=1)


# -- training steps ---------------------------------------------------------------------------------------------------


def test_ours_and_the_peer_start_from_the_same_loss(tmp_path: Path) -> None:
    from gpu_parts import train, train_worker
    from gpu_parts.rows import JsonLines

    task = train.task_of("train_1b", device="cpu", tiny=True)
    lines = JsonLines(tmp_path / "rows.jsonl")
    for contender in ("megallm torch", "hf eager"):
        train_worker.run(task, contender, lines)
    ours, peer = lines.new()
    assert (ours["status"], peer["status"]) == ("ok", "ok"), (ours, peer)
    assert math.isclose(ours["loss"], peer["loss"], rel_tol=1e-5)
    assert ours["tokens_per_s"] > 0 and "rms_norm=torch" in ours["note"]


# -- verdicts, table, report ------------------------------------------------------------------------------------------


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
    assert found["nothing slower than torch.compile"].is_met is True
    assert found["nothing slower than liger"].is_met is False
    assert "1.12 x (rms_norm H 4096 both)" in found["nothing slower than liger"].measured
    assert found[f"linear + CE time ({MAIN_GRAD})"].measured == "1.091 x"
    assert found["attention D 128 causal S 8192 fwd"].is_met is True
    assert found["attention not slower than SDPA flash"].is_met is True
    assert found["AdamW launches, fp32"].is_met is True
    assert found["training step tokens/s, Llama 1B S 4096"].measured == "1.20 x hf compile"
    assert "NOT MET" in show(list(found.values()))


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


def test_check_units_have_unique_names() -> None:
    from gpu_parts.checks import check_units

    launches.import_kernels()
    units: list[CheckUnit] = check_units(PLACE)
    assert len({unit.key for unit in units}) == len(units) > 40
