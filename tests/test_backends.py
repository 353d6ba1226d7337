"""The registry of back ends, and the model on interpreted Triton kernels: same loss and gradients as on torch's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from training_cases import MODELS, Case, make_engine, own_batch

from megallm.config.backends import BACKENDS, parse_backends
from megallm.model.fused import check_backends, fused_choices
from megallm.ops import backends as backends_module
from megallm.ops.activation import gated
from megallm.ops.attention import rotary_attention
from megallm.ops.backends import Backends, Choice, choose, refusal
from megallm.ops.backends import Case as Situation
from megallm.ops.moe import grouped_linear, grouped_linear_reference
from megallm.ops.norm import add_norm
from megallm.parallel.linear import ColumnLinear
from megallm.parallel.logprobs import VocabLogits
from megallm.parallel.mesh import Mesh
from megallm.testing.pool import run_ranks
from megallm.testing.tiny import tiny_config
from megallm.testing.tolerances import assert_close
from megallm.trainers.losses import language_model_loss
from megallm_kernels.cpu_adamw import why_absent

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
        (["attention"], "write operation=backend"),
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
        if op != "adamw":
            assert choose(situation(op)) == Choice(name="torch", reason="on cpu")


def test_adamw_runs_in_c_plus_plus_where_that_was_built() -> None:
    choice = choose(situation("adamw"))
    assert choice.name == ("cpu" if why_absent() is None else "torch")
    assert choice.reason in ("C++, avx512", "C++, avx2", "C++, plain", "on cpu")
    assert choose(situation("adamw"), forced="torch").name == "torch"
    gpu = Situation(op="adamw", device=torch.device("cuda"), dtype=torch.float32, size=0)
    assert "with offload" in str(refusal(gpu, "cpu"))


@pytest.mark.parametrize(
    ("op", "name", "message"),
    [
        ("rms_norm", "cuda", "rms_norm=cuda cannot run: it needs a GPU: use rms_norm=torch or triton"),
        ("attention", "flash-attn", "attention=flash-attn cannot run: it needs a GPU"),
        ("adamw", "apex", "adamw=apex cannot run: it needs a GPU"),
    ],
)
def test_a_forced_back_end_that_cannot_run_is_an_error(op: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(situation(op), forced=name)


def test_triton_has_no_fp64_and_no_endless_rows() -> None:
    assert refusal(situation("attention", torch.float64), "triton") == "it has no fp64 form"
    assert "longest row is 256" in str(refusal(situation("attention", size=512), "triton"))
    assert refusal(situation("attention", size=128), "triton") is None


def test_a_choice_is_announced_once() -> None:
    said: list[str] = []
    backends = Backends({"rope": "triton"}, announce=said.append)
    for _ in range(3):
        assert backends.pick("rope", torch.zeros(2), 64) == "triton"
        assert backends.pick("attention", torch.zeros(2), 64) == "torch"
        assert backends.take("attention", "torch", "with dropout") == "torch"
    assert said == ["rope: triton (asked for)", "attention: torch (on cpu)", "attention: torch (with dropout)"]


def test_on_a_cpu_one_line_stands_for_all_operations() -> None:
    said: list[str] = []
    backends = Backends(announce=said.append)
    for op in ("rope", "attention"):
        backends.pick(op, torch.zeros(2), 64)
    assert said == ["every operation: torch (on cpu)"]


def test_an_engine_refuses_a_forced_back_end_before_it_is_built() -> None:
    with pytest.raises(ValueError, match="attention=triton cannot run: it has no fp64 form"):
        make_engine(Case(model=next(iter(MODELS))), precision="fp64", backends=Backends({"attention": "triton"}))


# -- the whole model on interpreted kernels ----------------------------------------------------------------------------

LLAMA, GPT2, _, QWEN3 = list(MODELS)[:4]


def curve(case: Case, forced: dict[str, str]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the first step, and of a second where a step has two microbatches."""
    engine = make_engine(case, backends=Backends(forced))
    found = []
    for step in range(2 if case.mbs == 4 else 1):
        metrics = engine.train_step(own_batch(step, engine.mesh), language_model_loss).metrics()
        found.append((metrics["loss"], metrics["grad_norm"]))
    return found


def curves(rank: int, world_size: int, case: Case) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    return curve(case, FUSED), curve(case, {})


def assert_same(fused: list[tuple[float, float]], plain: list[tuple[float, float]]) -> None:
    """Losses and norms of about 4 and 1: sums of some thousand fp32 roundings, amplified a little from step to step."""
    for actual, expected in zip(fused, plain, strict=True):
        assert actual == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case(model=LLAMA, precision="fp32"),
        Case(model=LLAMA, precision="fp32", mbs=8, recompute="selective"),
        Case(model=LLAMA, precision="fp32", mbs=8, recompute="full"),
        Case(model=GPT2, precision="fp32", mbs=8),
        Case(model=QWEN3, precision="fp32", mbs=8),
    ],
    ids=lambda case: case.name,
)
def test_a_model_learns_the_same_on_triton_kernels(case: Case) -> None:
    assert_same(*curves(0, 1, case))


@pytest.mark.parametrize(
    "case",
    [
        Case(model=LLAMA, precision="fp32", mbs=8, tp=2),
        Case(model=LLAMA, precision="fp32", mbs=8, tp=2, sp=False, pp=2),
    ],
    ids=lambda case: case.name,
)
def test_layouts_learn_the_same_on_triton_kernels(case: Case) -> None:
    for fused, plain in run_ranks(curves, case.world_size, case):
        assert_same(fused, plain)


@pytest.mark.parametrize("forced", [{}, {"rms_norm": "triton"}], ids=["torch", "triton"])
def test_a_wide_residual_is_not_rounded_to_the_dtype_of_what_is_added(forced: dict[str, str]) -> None:
    x, residual = torch.full((2, 8), 2**-6, dtype=torch.bfloat16), torch.full((2, 8), 3.0)
    y, total = add_norm(x, residual, torch.ones(8), None, 1e-6, backends=Backends(forced))
    assert total.dtype == y.dtype == torch.float32
    assert torch.equal(total, torch.full((2, 8), 3.0 + 2**-6))


# -- losses over a vocabulary that is cut ------------------------------------------------------------------------------

T, H, V = 7, 12, 101
LOSS_BACKENDS: list[dict[str, str]] = [{}, {"cross_entropy": "triton"}, {"linear_cross_entropy": "triton"}]


def head_case(rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
    """For each back end: per-token log-probs and the loss sum, each with the gradients of hidden and weight."""
    tp = Mesh.build(tp=world_size).tp
    generator = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(T, H, generator=generator), torch.randn(V, H, generator=generator)
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[2] = -100
    factors = torch.randn(T, generator=generator)
    rows = -(-V // world_size)
    own = torch.zeros(rows, H)
    piece = weight[tp.rank * rows : (tp.rank + 1) * rows]
    own[: len(piece)] = piece
    found = []
    for forced in LOSS_BACKENDS:
        for summed in (False, True):
            x, w = hidden.clone().requires_grad_(), torch.nn.Parameter(own.clone())
            head = ColumnLinear(w, None, tp=tp, sequence_parallel=False)
            output = VocabLogits(None, vocab_size=V, tp=tp, backends=Backends(forced), hidden=x, head=head)
            if summed:  # the expected scale is only a hint: another gradient must come out right as well
                output.expected_scale = torch.tensor(0.5)
                value = output.summed_cross_entropy(labels)
                (value * 0.75).backward()
            else:
                value = output.token_logprobs(labels)
                (value * factors).sum().backward()
            grad = w.grad[: len(piece)]
            found.append({"value": value.detach(), "hidden": x.grad, "weight": grad})
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_losses_on_every_back_end_match_dense_fp64(world_size: int) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, H, generator=generator).double().requires_grad_() for n in (T, V))
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[2] = -100
    factors = torch.randn(T, generator=generator).double()
    logprobs = -torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    inputs = (hidden, weight)
    expected = {
        False: (logprobs.detach(), torch.autograd.grad((logprobs * factors).sum(), inputs, retain_graph=True)),
        True: (-logprobs.detach().sum(), torch.autograd.grad(-logprobs.sum() * 0.75, inputs)),
    }
    parts = run_ranks(head_case, world_size)
    for index in range(2 * len(LOSS_BACKENDS)):
        value, (dhidden, dweight) = expected[bool(index % 2)]
        for part in parts:
            assert_close(part[index]["value"], value, terms=H + V, label=f"value {index}")
            assert_close(part[index]["hidden"], dhidden, terms=H + 2 * V, label=f"dhidden {index}")
        whole = torch.cat([part[index]["weight"] for part in parts])
        assert_close(whole, dweight, terms=2 * T + H + V, label=f"dweight {index}")


def outlier_case(rank: int, world_size: int, lowest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and the gradient of the rank's logits where its first column, and others, are `lowest`."""
    tp = Mesh.build(tp=world_size).tp
    own = outlier_logits(lowest).chunk(world_size, dim=-1)[tp.rank].clone().requires_grad_()
    logprobs = VocabLogits(own, vocab_size=10, tp=tp).token_logprobs(torch.tensor([1, 7, 9, 2]))
    logprobs.sum().backward()
    assert own.grad is not None
    return logprobs.detach(), own.grad


def outlier_logits(lowest: float) -> torch.Tensor:
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    logits[:, 5], logits[0, 0], logits[3, 4] = lowest, lowest, lowest
    return logits


@pytest.mark.parametrize("lowest", [float("-inf"), -1e30, -1e5])
def test_very_negative_logits_do_not_disturb_the_others_on_any_rank(lowest: float) -> None:
    wide = outlier_logits(lowest).double().requires_grad_()
    expected = wide.log_softmax(-1).gather(1, torch.tensor([[1], [7], [9], [2]])).squeeze(1)
    expected.sum().backward()
    assert wide.grad is not None
    parts = run_ranks(outlier_case, 2, lowest)
    for logprobs, _ in parts:
        assert_close(logprobs, expected.detach(), terms=10)
    assert_close(torch.cat([grad for _, grad in parts], dim=1), wide.grad, terms=10)


def head_output(forced: dict[str, str]) -> tuple[torch.Tensor, VocabLogits]:
    tp = Mesh.build().tp
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(T, H, generator=generator).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(V, H, generator=generator))
    head = ColumnLinear(weight, None, tp=tp, sequence_parallel=False)
    return hidden, VocabLogits(None, vocab_size=V, tp=tp, backends=Backends(forced), hidden=hidden, head=head)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_summed_loss_without_gradients_makes_none(mode: type, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(T)
    expected = head_output({})[1].summed_cross_entropy(labels).detach()

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("gradients were made")

    monkeypatch.setattr("megallm_kernels.linear_cross_entropy.losses_and_gradients", refuse)
    with mode():
        value = head_output({"linear_cross_entropy": "triton"})[1].summed_cross_entropy(labels)
    assert_close(value, expected, terms=T * (H + V))


def test_an_expected_scale_of_zero_does_not_spoil_the_gradient() -> None:
    labels = torch.arange(T)
    grads = []
    for forced in ({}, {"linear_cross_entropy": "triton"}):
        hidden, output = head_output(forced)
        output.expected_scale = torch.tensor(0.0)
        (output.summed_cross_entropy(labels) * 0.75).backward()
        assert hidden.grad is not None
        grads.append(hidden.grad)
    assert_close(grads[1], grads[0], terms=H + 2 * V)


@pytest.mark.parametrize(
    ("op", "dtype", "size", "why"),
    [
        ("attention", torch.float32, 256, "at most 128"),
        ("decode_attention", torch.float32, 256, "at most 128"),
        ("attention", torch.bfloat16, 256, None),
        ("attention", torch.float32, 128, None),
        ("layer_norm", torch.float32, 16384, "longest row is 8192"),
        ("layer_norm", torch.bfloat16, 16384, None),
        ("rms_norm", torch.float32, 16384, None),
        ("rms_norm", torch.bfloat16, 8200, "multiple of 16"),
        ("rms_norm", torch.bfloat16, 8208, None),
    ],
)
def test_forms_that_would_spill_are_refused(op: str, dtype: torch.dtype, size: int, why: str | None) -> None:
    found = refusal(Situation(op=op, device=CPU, dtype=dtype, size=size), "triton")
    assert found is None if why is None else found is not None and why in found


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that packages are imported from."""
    monkeypatch.syspath_prepend(tmp_path)
    backends_module._import_error.cache_clear()
    yield tmp_path
    backends_module._import_error.cache_clear()
    for name in [n for n in sys.modules if n.split(".")[0] in ("flash_attn", "apex", "amp_C")]:
        del sys.modules[name]


@pytest.mark.parametrize("error", ["ImportError('undefined symbol: x')", "OSError('libcudart.so.12: no such file')"])
def test_a_broken_package_is_not_called_missing(installed: Path, error: str) -> None:
    (installed / "flash_attn").mkdir()
    (installed / "flash_attn" / "__init__.py").write_text(f"raise {error}\n")
    module, why = backends_module.flash_attention_module(CPU)
    assert module == "" and why is not None
    assert "is installed and does not import" in why and error.split("'")[1] in why


def test_flash_attention_2_serves_where_4_is_missing(installed: Path) -> None:
    (installed / "flash_attn").mkdir()
    (installed / "flash_attn" / "__init__.py").write_text("")
    (installed / "flash_attn" / "flash_attn_interface.py").write_text("")
    assert backends_module.flash_attention_module(CPU) == ("flash_attn.flash_attn_interface", None)
    (installed / "flash_attn" / "cute.py").write_text("")
    backends_module._import_error.cache_clear()
    importlib.invalidate_caches()
    assert backends_module.flash_attention_module(CPU) == ("flash_attn.cute", None)


def test_an_apex_without_its_cuda_parts_is_named_as_the_wrong_one(installed: Path) -> None:
    assert backends_module.apex_refusal() == "NVIDIA's apex is not installed"
    (installed / "apex").mkdir()
    (installed / "apex" / "__init__.py").write_text("")
    why = backends_module.apex_refusal()
    assert why is not None and "apex.optimizers" in why and "PyPI's is another project" in why


@pytest.mark.parametrize(
    ("forced", "rope"),
    [
        ({"attention": "triton"}, "triton (in place, in front of its attention)"),
        ({"attention": "triton", "rope": "torch"}, "torch (asked for)"),
        ({}, "torch (on cpu)"),
    ],
)
def test_what_is_told_beforehand_is_what_runs(forced: dict[str, str], rope: str) -> None:
    lines: list[str] = []
    backends = Backends(forced, announce=lines.append)
    told = fused_choices(MODELS["llama_untied"], backends, tp=1, device=CPU, dtype=torch.float32)
    assert {case.op: f"{choice.name} ({choice.reason})" for case, choice in told}["rope"] == rope
    engine = make_engine(Case(model="llama_untied", mbs=8, precision="fp32"), backends=backends)
    before = list(lines)
    engine.train_step(own_batch(0, engine.mesh), language_model_loss)
    assert lines == before, "nothing is left to be chosen while training"
    assert f"rope: {rope}" in lines or not forced


# -- experts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forced", [{}, {"grouped_gemm": "triton"}], ids=["torch", "triton"])
def test_grouped_linear_matches_its_reference(forced: dict[str, str]) -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(11, 6, generator=generator), torch.randn(4, 5, 6, generator=generator)
    offsets = torch.tensor([0, 3, 3, 8, 10], dtype=torch.int32)  # an empty expert, a row of nobody
    own = [t.clone().requires_grad_() for t in (x, weight)]
    wide = [t.double().requires_grad_() for t in (x, weight)]
    dy = torch.randn(11, 5, generator=generator)
    y = grouped_linear(*own, offsets, backends=Backends(forced))
    expected = grouped_linear_reference(*wide, offsets)
    assert_close(y, expected, terms=6)
    grads = zip(torch.autograd.grad(y, own, dy), torch.autograd.grad(expected, wide, dy.double()), strict=True)
    for actual, wanted in grads:
        assert_close(actual, wanted, terms=6)


# -- torch.compile -----------------------------------------------------------------------------------------------------


def test_what_a_layer_runs_between_its_products_compiles_without_graph_breaks() -> None:
    """With the choices made when the model was built, as an engine does, and nothing run before."""
    forced = {op: "triton" for op in ("rms_norm", "rope", "attention", "activation")}
    backends = Backends(forced)
    config = tiny_config("llama", hidden_size=16, head_dim=16, num_attention_heads=4, num_key_value_heads=1)
    check_backends(backends, config.replace(intermediate_size=32), tp=1, device=CPU, dtype=torch.float32)
    generator = torch.Generator().manual_seed(4)
    packed, weight = torch.randn(8, 6, 16, generator=generator), torch.randn(16, generator=generator)
    rotary = (torch.randn(8, 8, generator=generator), torch.randn(8, 8, generator=generator))

    def layer(packed: torch.Tensor, weight: torch.Tensor, backends: Backends) -> torch.Tensor:
        out = rotary_attention(
            packed * 1.0, rotary, num_heads=4, batch_size=2, in_place=True, backends=backends
        ).view(8, 4, 16)
        y, residual = add_norm(out, 2 * out, weight, None, 1e-5, backends=backends)
        return gated(y.flatten(1), "silu", backends=backends).square().sum() + residual.sum()

    inputs = (packed.requires_grad_(), weight.requires_grad_())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs, backends), inputs)
    expected = torch.autograd.grad(layer(*inputs, Backends(forced)), inputs)
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted)
