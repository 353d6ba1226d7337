"""The compiled part: its build, the machine code, how work is divided among threads, and what is refused."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_build import Built, built, run_setup

from megallm_kernels import compiled, compiled_part

__all__ = ["built"]

REGISTER_BUDGET = {
    "adamw_kernel": 64,
    "rope_kernel": 64,
    "rms_norm_forward_kernel": 88,  # rows over 8192 elements of fp32; 64 below
    "rms_norm_backward_kernel": 128,  # the same: 32 sums a thread; 120 below, where the next row is held as well
    "rms_norm_backward_unaligned_kernel": 40,
    "rms_norm_sum_kernel": 40,
}
"""Of a thread, the most of any instance; 512 threads with 128 registers fill a multiprocessor."""


# The build


def test_the_module_loads_without_a_gpu_and_without_cuda_libraries(built: Built) -> None:
    assert compiled_part.load().module is built.module
    assert b"libcudart.so" not in built.path.read_bytes()


def test_no_kernel_spills_and_registers_stay_in_budget(built: Built) -> None:
    found = re.findall(
        r"entry function '\w*?((?:adamw|rope|rms_norm)_\w*?kernel)I\w*' for '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        built.log, flags=re.DOTALL,
    )  # fmt: skip
    names = [re.sub(r"^.*_cu_[0-9a-f_]+?(?=adamw|rope|rms)", "", name) for name, *_ in found]
    assert {arch for _, arch, *_ in found} == {"sm_80", "sm_90a"}
    assert set(names) == set(REGISTER_BUDGET)
    spills = [(name, *rest) for name, (_, *rest) in zip(names, found, strict=True) if rest[1:4] != ["0", "0", "0"]]
    assert spills == []
    most = {name: max(int(f[-1]) for n, f in zip(names, found, strict=True) if n == name) for name in REGISTER_BUDGET}
    assert {name: n for name, n in most.items() if n > REGISTER_BUDGET[name]} == {}


def test_aligned_instances_take_16_byte_accesses(built: Built) -> None:
    triton = pytest.importorskip("triton", reason="brings the disassembler")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "-sass", "-arch", "sm_90a", str(built.path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = re.split(r"Function : ", text)[1:]
    assert len(kernels) > 40
    assert not re.search(r"\b(LDL|STL|LD|ST)\.", text), "registers spill, or addresses are not known to be global"
    aligned = [k for k in kernels if re.search(r"adamw_kernel|Li[48]E", k.split()[0])]
    norms = 4 + 2 * 2 * 3  # fp32 at 1, 2, 4, 8 vectors; fp16 and bf16, with a weight like it or fp32, at 1, 2 and 4
    assert len(aligned) == 9 + 3 + 2 * norms  # AdamW, RoPE, both passes of RMSNorm
    assert all("LDG.E.128" in k and "STG.E.128" in k for k in aligned)


def test_without_nvcc_the_build_fails_in_words() -> None:
    done = run_setup("build_ext", MEGALLM_BUILD_CUDA="1", PATH="/nowhere")
    assert done.returncode != 0
    assert "nvcc is not in PATH: install the CUDA toolkit" in done.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MEGALLM_BUILD_CUDA": "yes"}, "MEGALLM_BUILD_CUDA is 'yes'"),
        ({"MEGALLM_BUILD_CUDA": "1", "MEGALLM_CUDA_ARCHS": "hopper"}, "MEGALLM_CUDA_ARCHS is 'hopper'"),
    ],
)
def test_wrong_settings_are_refused_in_words(environment: dict[str, str], message: str) -> None:
    if "MEGALLM_CUDA_ARCHS" in environment and shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    done = run_setup("build_ext", **environment)
    assert done.returncode != 0
    assert message in done.stderr


def test_without_the_setting_nothing_is_compiled() -> None:
    done = run_setup("build_ext", PATH="/nowhere", MEGALLM_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "nvcc" not in done.stdout


def test_a_missing_module_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_part, "MODULE", "megallm_kernels._nowhere")
    part = compiled_part.load.__wrapped__()
    assert part.module is None
    assert "was not built: install with MEGALLM_BUILD_CUDA=1" in part.reason
    monkeypatch.setattr(compiled_part, "load", compiled_part.load.__wrapped__)
    with pytest.raises(RuntimeError, match="compiled kernels were asked for"):
        compiled_part.rms_norm_forward(torch.ones(2, 4), torch.ones(4), 1e-6)


@pytest.mark.parametrize(
    ("code", "runs", "does_not"),
    [
        ("sm_80:sm_90a", [(8, 0), (8, 6), (8, 9), (9, 0)], [(7, 5), (9, 1), (10, 0), (12, 0)]),
        ("sm_86:sm_90", [(8, 6), (8, 9), (9, 0)], [(8, 0), (10, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("sm_90a:compute_90", [(9, 0), (10, 0), (12, 1)], [(8, 9)]),
    ],
)
def test_code_runs_on_gpus_of_its_kind(code: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]) -> None:
    assert [compiled_part.covers(code, gpu) for gpu in runs] == [True] * len(runs)
    assert [compiled_part.covers(code, gpu) for gpu in does_not] == [False] * len(does_not)


def test_the_module_says_what_it_was_built_for(built: Built) -> None:
    assert built.module.CODE == "sm_80:sm_90a:compute_90"
    assert compiled.why_absent() is None
    assert compiled.why_absent(torch.device("cpu")) is None


def test_a_gpu_without_code_has_a_reason(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    compiled_part._why_not_on_gpu.cache_clear()
    reason = compiled.why_absent(torch.device("cuda", 0))
    compiled_part._why_not_on_gpu.cache_clear()
    assert reason is not None and "GPU 0 has compute capability 7.5: build again with MEGALLM_CUDA_ARCHS=75" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels would load")
def test_a_gpu_on_which_the_kernels_do_not_load_has_a_reason(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a driver that is too old: here there is none."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    compiled_part._why_not_on_gpu.cache_clear()
    reason = compiled.why_absent(torch.device("cuda", 0))
    compiled_part._why_not_on_gpu.cache_clear()
    assert reason is not None and re.search(r"does not run here: GPU 0: CUDA error \d+, ", reason)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_load_on_this_gpu(built: Built) -> None:
    assert compiled.why_absent(torch.device("cuda")) is None


# Launch shapes and refusals


NORM = {
    "x": 4096, "residual": 0, "weight": 4096, "y": 4096, "new_residual": 0, "rstd": 4096, "rows": 10, "hidden": 4096,
    "x_rows": (1, 4096, 0), "residual_rows": (1, 0, 0), "eps": 1e-6, "dtype": 2, "weight_dtype": 2,
}  # fmt: skip
ROPE = {
    "x": 4096, "out": 4096, "cos": 4096, "sin": 4096, "positions": 0, "cu_seqlens": 0, "tokens": 8192, "heads": 40,
    "half": 64, "rows": 8192, "documents": 0, "strides": (48 * 128, 128), "out_strides": (48 * 128, 128), "dtype": 2,
    "conjugate": False,
}  # fmt: skip
ADAMW = {
    "table": 4096, "chunks": 4096, "ticket": 4096, "step": 4096, "learning_rate": 4096, "grad_divisor": 4096,
    "is_bad": 4096, "num_chunks": 3, "chunk": 1024, "log_beta1": -0.1, "log_beta2": -0.001, "weight1": 0.1,
    "weight2": 0.001, "eps": 1e-8, "weight_decay": 0.1, "grad_dtype": 0, "copy_dtype": -1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("hidden", "dtype", "shape"),
    [
        (8, 2, (8, 1, 32, 4)),
        (128, 2, (8, 1, 32, 4)),
        (4096, 2, (8, 2, 256, 1)),
        (5120, 1, (8, 2, 320, 1)),
        (16384, 2, (8, 4, 512, 1)),
        (16384, 0, (4, 8, 512, 1)),
        (100, 2, (1, 16, 32, 4)),
        (16383, 0, (1, 16, 1024, 1)),
    ],
)
def test_rows_are_divided_among_threads(built: Built, hidden: int, dtype: int, shape: tuple[int, ...]) -> None:
    given = NORM | {"hidden": hidden, "x_rows": (1, hidden, 0), "dtype": dtype, "weight_dtype": dtype}
    found = tuple(built.module.rms_norm_forward_shape(**given).values())
    assert found == shape
    vector, per_thread, threads, rows = found
    assert threads % 32 == 0 and threads * rows <= 1024 and vector * per_thread * threads >= hidden


@pytest.mark.parametrize(
    "change", [{"x": 4098}, {"weight": 4104}, {"y": 4100}, {"x_rows": (1, 4097, 0)}, {"x_rows": (2, 8192, 4100)}]
)
def test_misaligned_rows_are_taken_one_element_at_a_time(built: Built, change: dict[str, Any]) -> None:
    assert built.module.rms_norm_forward_shape(**(NORM | change))["vector"] == 1


def test_partial_sums_fill_the_gpu_and_no_more(built: Built) -> None:
    """By the estimate; on a GPU, CUDA tells how many blocks run at a time."""
    given = {"dtype": 2, "weight_dtype": 0, "num_multiprocessors": 132, "device": -1}
    partials = built.module.rms_norm_partials
    assert partials(rows=8192, hidden=4096, **given) == 132 * 2
    assert partials(rows=8192, hidden=16384, **given) == 132
    assert partials(rows=8192, hidden=128, **given) == 132 * 8 * 4
    assert partials(rows=5, hidden=4096, **given) == 8


def test_the_kernels_fit_the_estimate_of_blocks(built: Built) -> None:
    """Threads of one access have at most 64 registers, others 128: 1024 and 512 of them on a multiprocessor."""
    pattern = r"rms_norm_backward_kernelI\w*?Li[48]ELi(\d)E\w*' for '\w+'.*?Used (\d+) registers"
    found = re.findall(pattern, built.log, re.DOTALL)
    assert len(found) == 2 * 16
    assert all(int(registers) <= (64 if per_thread == "1" else 128) for per_thread, registers in found)


def test_only_the_last_access_of_a_thread_may_lie_outside_its_row(built: Built) -> None:
    """The kernels do not ask for the others."""
    for dtype, step in ((0, 4), (2, 8)):
        for hidden in range(step, 16385, step):
            given = NORM | {"hidden": hidden, "x_rows": (1, hidden, 0), "dtype": dtype, "weight_dtype": dtype}
            vector, per_thread, threads, _ = built.module.rms_norm_forward_shape(**given).values()
            assert vector == step and (per_thread - 1) * threads * vector <= hidden


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        ({}, (8, 8, 20, 1, 8192)),
        ({"heads": 2}, (8, 8, 2, 16, 512)),
        ({"half": 40}, (8, 5, 40, 1, 8192)),
        ({"half": 36}, (1, 36, 7, 1, 8192)),
        ({"dtype": 0}, (4, 16, 14, 1, 8192)),
        ({"x": 4098}, (1, 64, 4, 1, 8192)),
        ({"strides": (48 * 128, 132)}, (1, 64, 4, 1, 8192)),
        ({"out_strides": (48 * 128 + 4, 128)}, (1, 64, 4, 1, 8192)),
        ({"out": 4100}, (1, 64, 4, 1, 8192)),
        ({"half": 600, "dtype": 0, "sin": 4100}, (1, 256, 1, 1, 8192)),
        ({"tokens": 3, "heads": 1, "half": 8}, (8, 1, 1, 3, 1)),
    ],
)
def test_heads_are_divided_among_threads(built: Built, change: dict[str, Any], shape: tuple[int, ...]) -> None:
    assert tuple(built.module.rope_shape(**(ROPE | change)).values()) == shape


@pytest.mark.parametrize(
    ("name", "arguments", "change", "message"),
    [
        ("rms_norm_forward", NORM, {"x": 0}, "x is a null pointer"),
        ("rms_norm_forward", NORM, {"residual": 4096}, "residual and new_residual go together"),
        ("rms_norm_forward", NORM, {"dtype": 3}, "dtype code 3 is none of 0"),
        ("rms_norm_forward", NORM, {"weight_dtype": 1}, r"weight's dtype code 1 is neither that of x \(2\)"),
        ("rms_norm_forward", NORM, {"rows": 0}, "rows is 0, it must be at least 1"),
        ("rms_norm_forward", NORM, {"hidden": 16385}, "hidden is 16385, it must be at most 16384"),
        ("rms_norm_forward", NORM, {"x_rows": (1, 2)}, "got 2 numbers"),
        ("rope", ROPE, {"cos": 0}, "cos is a null pointer"),
        ("rope", ROPE, {"half": 0}, "half of the rotary dim is 0"),
        ("rope", ROPE, {"positions": 8, "cu_seqlens": 8}, "positions or cu_seqlens, not both"),
        ("adamw", ADAMW, {"ticket": 0}, "ticket is a null pointer"),
        ("adamw", ADAMW, {"num_chunks": 0}, "num_chunks is 0"),
        ("adamw", ADAMW, {"chunk": 1022}, "chunk is 1022, it must be a multiple of 4"),
        ("adamw", ADAMW, {"copy_dtype": 0}, "copies must be fp16 or bf16"),
    ],
)
@pytest.mark.parametrize("device", [-1, 0])
def test_bad_arguments_are_refused(
    built: Built, name: str, arguments: dict[str, Any], change: dict[str, Any], message: str, device: int
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(built.module, name)(**(arguments | change), device=device, stream=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the launch would run")
@pytest.mark.parametrize(("name", "arguments"), [("rms_norm_forward", NORM), ("rope", ROPE), ("adamw", ADAMW)])
def test_a_launch_that_cuda_refuses_says_so(built: Built, name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"on GPU 0: CUDA error \d+, "):
        getattr(built.module, name)(**arguments, device=0, stream=0)
