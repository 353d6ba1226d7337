"""The GPU benchmark's code path on CPU: interpreted kernels, tiny shapes, workers that crash or hang."""

# ruff: noqa: E402  (benchmarks/ is no package: its path comes first)
from __future__ import annotations

import math
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu
from gpu_parts import cases_attention, launches, supervise, table
from gpu_parts.calls import Buffers, Case, CompileBudget, autograd_directions, differentiable
from gpu_parts.checks import CheckUnit
from gpu_parts.clock import Clock, spread
from gpu_parts.compare import bound, compare, poisoned
from gpu_parts.decode import step_bytes
from gpu_parts.measure import measure_contender
from gpu_parts.place import Place, make_place
from gpu_parts.rows import UNKNOWN, read_csv, row
from gpu_parts.train import TINY
from gpu_parts.train_worker import model_config
from gpu_parts.worker import op_sections

from megallm.parallel import Engine, Mesh

PLACE = Place(device=torch.device("cpu"), tiny=True, seed=3)
FACTS = {"date": "2026-01-01", "gpu": "NVIDIA H200", "driver": "580", "torch": "2.11.0", "triton": "3.6.0",
         "python": "3.12.3", "commit": "abc", "command": "python benchmarks/gpu.py"}  # fmt: skip


def run_gpu(out: Path, *arguments: str) -> tuple[int, list[dict[str, str]]]:
    """Exit code and rows of a tiny run in this process."""
    code = gpu.main(["--tiny", "--device", "cpu", "--in-process", "--out", str(out), "--seed", "3", *arguments])
    return code, read_csv(out / "gpu.csv")


@pytest.mark.slow
def test_every_op_is_timed_beside_its_peers(tmp_path: Path) -> None:
    code, rows = run_gpu(tmp_path, "--skip", "check,decode,train_1b,train_3b")
    assert code == 0
    ours = {(r["section"], r["op"]) for r in rows if r["contender"] == "triton" and r["status"] == "ok"}
    assert {section for section, _ in ours} == set(op_sections())
    assert {r["status"] for r in rows} <= {"ok", "absent"}
    absent = {r["contender"]: r["note"] for r in rows if r["status"] == "absent"}
    assert {"liger", "quack", "cut-cross-entropy", "torch.compile", "SDPA cuDNN", "apex"} <= set(absent)
    assert {"flash-attn", "flash-attn-2"} <= set(absent)
    assert all(absent.values())
    timed = [r for r in rows if r["status"] == "ok" and r["section"] != "ceilings"]
    assert all(float(r["eager_us"]) > 0 and float(r["host_us"]) > 0 and r["of_ceiling"] for r in timed)
    assert (tmp_path / "gpu-verdicts.txt").read_text().count("\n") >= 18


def test_decoding_is_timed_at_every_batch_with_graphs_and_without(tmp_path: Path) -> None:
    code, rows = run_gpu(tmp_path, "--sections", "decode", "--only", "decode/torch")
    assert code == 0 and {r["status"] for r in rows} == {"ok"}
    assert [(r["case"], r["contender"]) for r in rows] == [
        (f"tiny batch {batch}", f"megallm torch, {kind}") for batch in (1, 8, 32) for kind in ("graphs", "no graphs")
    ]
    assert all(float(r["tokens_per_s"]) > 0 and float(r["gb_per_s"]) > 0 for r in rows)
    assert "decode, batch 32" in (tmp_path / "gpu-verdicts.txt").read_text()


def test_bytes_of_a_decoding_step_are_weights_keys_and_values() -> None:
    config = model_config(TINY)
    model = Engine(config, Mesh.build(), train=False).model
    parameters = sum(p.numel() for p in model.parameters()) - 101 * 32  # the embedding's rows are looked up
    assert step_bytes(model, batch=3, length=10) == 4 * (parameters + 3 * 10 * 2 * 2 * 8 * 2)


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


@pytest.fixture
def flash_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for the package flash_attn: the settings of every call."""
    from megallm.ops import attention, backends

    calls: list[dict[str, Any]] = []

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: Any) -> torch.Tensor:
        calls.append({"shape": (*q.shape, k.size(2)), "contiguous": q.is_contiguous(), **settings})
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    package = types.ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(backends, "refusal", lambda case, name: None)
    for module in (attention, backends):
        monkeypatch.setattr(module, "flash_attention_module", lambda device: ("flash_attn", None))
    return calls


@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-2"])
def test_flash_attention_2_is_timed_as_the_library_calls_it(name: str, flash_calls: list[dict[str, Any]]) -> None:
    case = op_sections()["attention"](PLACE)[0]
    contenders = {each.name: each for each in case.contenders}
    sets = case.make(PLACE, PLACE.generator("x"), 2)
    directions = contenders[name].build(sets)
    assert list(directions) == ["fwd", "bwd", "both"]
    gradients = directions["both"].call(1)
    expected = contenders["torch"].build(sets)["both"].call(1)
    for found, right in zip(gradients, expected, strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(found, right.transpose(1, 2))
    (call,) = flash_calls
    assert call == {"shape": (2, 32, 4, 16, 2), "contiguous": False, "causal": True, "window_size": (-1, -1)}
    assert name != "flash-attn" or directions["fwd"].note == "flash_attn.flash_attn_func"


def test_flash_attention_has_the_same_window_both_ways(flash_calls: list[dict[str, Any]]) -> None:
    case = next(each for each in op_sections()["attention_more"](PLACE) if "window" in each.name)
    contenders = {each.name: each for each in case.contenders}
    sets = case.make(PLACE, PLACE.generator("x"), 2)
    for name in ("flash-attn", "flash-attn-2"):
        contenders[name].build(sets)["fwd"].call(0)
    assert flash_calls[0] == flash_calls[1] and flash_calls[0]["window_size"] == (19, 0)


def test_the_row_of_flash_attention_names_its_back_end() -> None:
    common = {"section": "attention", "op": "attention", "case": "D 128 S 4096", "size": 128, "dtype": "bfloat16"}
    times = {"flash-attn": 7.0, "flash-attn-2": 9.0}
    rows = [row(**common, direction="both", graph_us=us, contender=name) for name, us in times.items()]
    found = table.table_rows(rows, FACTS)
    assert [(r["backend"], r["microseconds"]) for r in found] == [("flash-attn", "7.0")]


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
    assert set(op_sections()) | {"ceilings", "check", "decode", "train_1b", "train_3b"} == set(gpu.SHARES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sections rope,rops", "no such section: rops"),
        ("--check-only --sections attention", "--sections names attention: give one of the two"),
        ("--check-only --sections check,rope", "--sections names rope: give one of the two"),
        ("--check-only --skip check", "--skip leaves it out: give one of the two"),
        ("--check-only --sections attention --skip check", "--sections names attention"),
        ("--sections rope,check --skip rope", "both name rope: take it out of one"),
        ("--skip " + ",".join(gpu.SHARES), "no section is left"),
        ("--device cpu", "add --tiny"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        gpu.parse(arguments.split())
    assert refused.value.code == 2 and message in capsys.readouterr().err


def test_sections_that_agree_are_taken() -> None:
    assert gpu.choose_sections("check", skip="", check_only=True) == ["check"]
    assert gpu.choose_sections("", skip="rope,moe", check_only=True) == ["check"]
    assert gpu.choose_sections("rope,check", skip="moe", check_only=False) == ["check", "rope"]
    assert set(gpu.SHARES) - set(gpu.choose_sections("", skip="check", check_only=False)) == {"check"}
    with pytest.raises(ValueError, match="add --tiny"):
        make_place("cpu", tiny=False, seed=1)


@pytest.mark.parametrize("sections", ["ceilings", "check", "train_1b"])
def test_without_a_gpu_one_line_says_what_is_missing(
    sections: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "results"
    assert gpu.main(["--sections", sections, "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert "CUDA" in printed.err and "--tiny --device cpu" in printed.err
    assert not out.exists()


def test_a_gpu_that_nobody_can_name_is_not_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("gpu_parts.rows._gpu_and_driver", lambda: (UNKNOWN, UNKNOWN))
    assert gpu.main(["--sections", "ceilings", "--out", str(tmp_path / "results")]) == 2
    assert "nvidia-smi" in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_a_worker_that_cannot_begin_is_a_bad_row(tmp_path: Path) -> None:
    script = tmp_path / "no_worker.py"
    script.write_text("raise SystemExit(3)\n")
    results = supervise.Results(csv=tmp_path / "gpu.csv", facts=FACTS)
    plan: dict[str, Any] = {"sections": ["rope"], "deadlines": {"rope": time.time() + 60}}
    supervise.run_sections(plan, results, tmp_path, num_workers=1, unit_limit_s=20.0, program=(str(script),))
    assert [(r["section"], r["status"]) for r in results.rows] == [("rope", "crashed")]
    assert "code 3" in results.rows[0]["note"] and gpu.report_end(results, 1.0) == 1


def test_compile_all_refuses_an_unknown_op_in_words() -> None:
    script = BENCHMARKS.parent / "tests" / "kernels" / "compile_all.py"
    done = subprocess.run([sys.executable, str(script), "nope"], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 2 and done.stdout == ""
    assert "no such op: nope; there are activation, adamw" in done.stderr and "Traceback" not in done.stderr


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


def test_check_units_have_unique_names() -> None:
    from gpu_parts.checks import check_units

    launches.import_kernels()
    units: list[CheckUnit] = check_units(PLACE)
    assert len({unit.key for unit in units}) == len(units) > 40
