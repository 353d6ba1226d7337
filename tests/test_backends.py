"""The registry of back ends, and the model on interpreted Triton kernels: same loss and gradients as on torch's."""

from __future__ import annotations

import pytest
import torch
from training_cases import MODELS, Case, global_batch, make_engine, own_batch

from megallm.config.backends import BACKENDS, parse_backends
from megallm.ops.backends import Backends, Case as Situation, choose, refusal
from megallm.testing.pool import run_ranks
from megallm.trainers.losses import language_model_loss

CPU = torch.device("cpu")
FUSED = {op: "triton" for op in BACKENDS if op != "grouped_gemm"}
"""Everything a dense model runs."""


def situation(op: str, dtype: torch.dtype = torch.float32, size: int = 64) -> Situation:
    return Situation(op=op, device=CPU, dtype=dtype, size=size)


def test_the_flag_is_parsed() -> None:
    assert parse_backends(["attention=triton", "rms_norm=torch"]) == {"attention": "triton", "rms_norm": "torch"}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["attention"], "write operation=back end"),
        (["atention=triton"], "did you mean attention"),
        (["attention=cuda"], "attention has no back end 'cuda': choose torch or triton or flash-attn"),
        (["rope=triton", "rope=cuda"], "names both triton and cuda"),
    ],
)
def test_a_wrong_flag_is_answered_in_words(items: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_backends(items)


def test_without_a_gpu_torch_runs_and_says_why() -> None:
    for op in BACKENDS:
        assert choose(situation(op)).name == "torch"
        assert choose(situation(op)).reason == "on cpu"


@pytest.mark.parametrize(
    ("op", "name", "message"),
    [
        ("rms_norm", "cuda", "cuda needs a GPU, the tensors are on cpu: use rms_norm=torch or triton"),
        ("attention", "flash-attn", "flash-attn needs a GPU"),
        ("adamw", "apex", "apex needs a GPU"),
    ],
)
def test_a_forced_back_end_that_cannot_run_is_an_error(op: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(situation(op), forced=name)


def test_triton_has_no_fp64_and_no_endless_rows() -> None:
    assert refusal(situation("attention", torch.float64), "triton") == "the kernels have no fp64 form"
    assert "longest row is 256" in str(refusal(situation("attention", size=512), "triton"))
    assert refusal(situation("attention", size=128), "triton") is None


def test_a_choice_is_announced_once() -> None:
    said: list[str] = []
    backends = Backends({"rope": "triton"}, announce=said.append)
    for _ in range(3):
        assert backends.pick("rope", torch.zeros(2), 64) == "triton"
        assert backends.pick("attention", torch.zeros(2), 64) == "torch"
        assert backends.fall_back("attention", "with dropout") == "torch"
    assert said == ["rope: triton (asked for)", "attention: torch (on cpu)", "attention: torch (with dropout)"]


def test_an_engine_refuses_a_forced_back_end_before_it_is_built() -> None:
    with pytest.raises(ValueError, match="attention=triton cannot run: the kernels have no fp64 form"):
        make_engine(Case(model=next(iter(MODELS))), precision="fp64", backends=Backends({"attention": "triton"}))
