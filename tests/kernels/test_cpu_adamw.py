"""AdamW and squared norms on the CPU: against fp64 and torch, the same bits everywhere, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from compiled_build import run_setup
from cpu_build import cpu_part

from megallm_kernels import cpu_adamw
from megallm_kernels.cpu_adamw import cpu_adamw_, squared_norm

__all__ = ["cpu_part"]

U = 2.0**-24
"""Half an ulp: the relative error of one rounded fp32 operation."""
NUMBERS: dict[str, Any] = {
    "learning_rate": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.37,
}  # fmt: skip
SIZES = (0, 1, 7, 15, 17, 1031)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = ("avx512", "avx2", "plain")


@dataclass
class State:
    """Tensors of one call."""

    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    exp_avgs: list[torch.Tensor]
    exp_avg_sqs: list[torch.Tensor]
    copies: list[torch.Tensor]

    def clone(self) -> State:
        return State(*([t.clone() for t in tensors] for tensors in vars(self).values()))

    def update(self, **changes: Any) -> State:
        cpu_adamw_(*vars(self).values(), **({"step": 3} | NUMBERS | changes))
        return self

    def same_bits(self, other: State) -> bool:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return all(torch.equal(_bits(a), _bits(b)) for x, y in pairs for a, b in zip(x, y, strict=True))


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({4: torch.int32, 2: torch.int16}[x.element_size()])


def _shifted(values: torch.Tensor, shift: int) -> torch.Tensor:
    """The same values, beginning `shift` elements past the start of an allocation."""
    return torch.cat([values.new_zeros(shift), values])[shift:]


def _state(
    sizes: tuple[int, ...] = SIZES, *, grad: torch.dtype = torch.float32, copy: torch.dtype | None = None,
    shift: int = 0,
) -> State:  # fmt: skip
    torch.manual_seed(5)
    params = [_shifted(torch.randn(n), shift) for n in sizes]
    grads = [_shifted(torch.randn(n).to(grad), shift) for n in sizes]
    exp_avgs = [_shifted(torch.randn(n) * 0.3, shift) for n in sizes]
    exp_avg_sqs = [_shifted(torch.rand(n) + 1e-4, shift) for n in sizes]
    copies = [] if copy is None else [_shifted(torch.zeros(n, dtype=copy), shift) for n in sizes]
    return State(params, grads, exp_avgs, exp_avg_sqs, copies)


def _isa_or_skip(isa: str) -> str:
    if isa not in cpu_adamw.instruction_sets():
        pytest.skip(f"this machine does not have {isa}")
    return isa


Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _reference(
    before: State, i: int, *, step: int, grad_scale: float, beta1: float, beta2: float, learning_rate: float,
    eps: float, weight_decay: float,
) -> tuple[Triple, Triple]:  # fmt: skip
    """(p, m, v) in fp64, and bounds of what fp32 adds to each, from the fp32 state before the step.

    Every constant is rounded once (U), every operation once more. g: 2 U. m: the weight, the difference, the product
    and g make at most 5 U of w (|g| + |m|), the sum U of m, together under 6 U (|m| + |g|). v: 7 U (w2, two products,
    twice g's 2 U) and U of the sum. d = rate m / (sqrt(v) / c + eps): half of v's 8 U, then root 1, c 2, eps and its
    sum 2, rate and product 2, quotient 1 make 12 U, and m's error. p: keep and its product 3 U (1 - lr wd may round
    from fp64), and the sum U of what is left. 1 + 2^-10 pays for products of errors.
    """
    p, g, m, v = (x[i].double() for x in (before.params, before.grads, before.exp_avgs, before.exp_avg_sqs))
    g = g * grad_scale
    new_m = m + (1 - beta1) * (g - m)
    new_v = beta2 * v + (1 - beta2) * g * g
    denominator = (new_v / (1 - beta2**step)).sqrt() + eps
    rate = learning_rate / (1 - beta1**step)
    d = rate * new_m / denominator
    new_p = p * (1 - learning_rate * weight_decay) - d
    error_m = 6 * U * (m.abs() + g.abs())
    error_v = 8 * U * new_v
    error_p = 3 * U * p.abs() + 12 * U * d.abs() + rate * error_m / denominator + U * new_p.abs()
    slack = 1 + 2.0**-10
    return (new_p, new_m, new_v), (error_p * slack, error_m * slack, error_v * slack)


def _check_step(before: State, after: State, *, decayed: list[bool] | None = None, **given: Any) -> None:
    for i, (p, m, v) in enumerate(zip(after.params, after.exp_avgs, after.exp_avg_sqs, strict=True)):
        numbers = {"step": 3} | NUMBERS | given
        if decayed is not None and not decayed[i]:
            numbers["weight_decay"] = 0.0
        expected, bounds = _reference(before, i, **numbers)
        for name, found, wanted, bound in zip("pmv", (p, m, v), expected, bounds, strict=True):
            worst = ((found.double() - wanted).abs() - bound).max().item() if found.numel() else 0.0
            assert worst <= 0, f"{name} of tensor {i} is {worst} over the bound"


# AdamW


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("grad", DTYPES)
@pytest.mark.parametrize("copy", [None, torch.bfloat16, torch.float16])
def test_matches_fp64_within_rounding(cpu_part: Any, isa: str, grad: torch.dtype, copy: torch.dtype | None) -> None:
    """Every step starts from the fp32 numbers that the one before left, so the bounds are of one step."""
    state = _state(grad=grad, copy=copy)
    decayed = [i % 2 == 0 for i in range(len(SIZES))]
    for step in (1, 2, 3):
        before = state.clone()
        state.update(step=step, decayed=decayed, isa=_isa_or_skip(isa))
        _check_step(before, state, step=step, decayed=decayed)
        assert all(torch.equal(_bits(g), _bits(h)) for g, h in zip(before.grads, state.grads, strict=True))
        assert all(torch.equal(c, p.to(copy)) for c, p in zip(state.copies, state.params, strict=False) if copy)


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_matches_torch_fused(cpu_part: Any, beta1: float, weight_decay: float) -> None:
    """Both are within the bounds of fp64, so twice the bounds of one another; torch's kernel steps from our numbers."""
    state = _state()
    given = {"beta1": beta1, "weight_decay": weight_decay, "grad_scale": 1.0}
    for step in (1, 2, 5):
        before, theirs = state.clone(), state.clone()
        torch._fused_adamw_(
            theirs.params, theirs.grads, theirs.exp_avgs, theirs.exp_avg_sqs, [],
            [torch.tensor(float(step)) for _ in SIZES], amsgrad=False, lr=NUMBERS["learning_rate"], beta1=beta1,
            beta2=NUMBERS["beta2"], weight_decay=weight_decay, eps=NUMBERS["eps"], maximize=False,
        )  # fmt: skip
        state.update(step=step, **given)
        for i in range(len(SIZES)):
            _, bounds = _reference(before, i, **({"step": step} | NUMBERS | given))
            ours = (state.params[i], state.exp_avgs[i], state.exp_avg_sqs[i])
            others = (theirs.params[i], theirs.exp_avgs[i], theirs.exp_avg_sqs[i])
            for a, b, bound in zip(ours, others, bounds, strict=True):
                assert ((a.double() - b.double()).abs() <= 2 * bound).all()


def test_matches_torch_optimizer_over_several_steps(cpu_part: Any) -> None:
    """An optimizer of torch's and the function from one start; 5 steps add up to at most 5 times a step's bounds."""
    torch.manual_seed(2)
    theirs = torch.nn.Parameter(torch.randn(1031))
    ours, m, v = theirs.detach().clone(), torch.zeros(1031), torch.zeros(1031)
    optimizer = torch.optim.AdamW([theirs], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    largest = ours.abs().max()
    for step in range(1, 6):
        theirs.grad = torch.randn(1031)
        cpu_adamw_(
            [ours], [theirs.grad], [m], [v], step=step, learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8,
            weight_decay=0.1,
        )  # fmt: skip
        optimizer.step()
    # A step moves p by about lr: 4 U |p| a step and side, and of the order of 100 U lr, which is less.
    assert (ours - theirs.detach()).abs().max() <= 2 * 5 * (4 * largest + 100 * 1e-3) * U


@pytest.mark.parametrize("isa", ISAS[:2])
@pytest.mark.parametrize("grad", DTYPES)
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_every_instruction_set_gives_the_same_bits(cpu_part: Any, isa: str, grad: torch.dtype, shift: int) -> None:
    for copy in (None, torch.bfloat16, torch.float16):
        state = _state((*SIZES, 33, 64, 4099), grad=grad, copy=copy, shift=shift)
        plain = state.clone().update(isa="plain")
        assert replace(state).update(isa=_isa_or_skip(isa)).same_bits(plain)


def test_threads_do_not_change_a_bit(cpu_part: Any) -> None:
    assert cpu_part.HAS_THREADS or pytest.skip("built without OpenMP")
    state = _state((300_001, 5, 70_000, 0, 31), grad=torch.bfloat16, copy=torch.bfloat16)
    one = state.clone().update(num_threads=1)
    for num_threads in (2, 3, 7):
        assert state.clone().update(num_threads=num_threads).same_bits(one)
    assert state.clone().update().same_bits(one)


def test_many_small_tensors_are_one_large_one(cpu_part: Any) -> None:
    whole = _state((3000 * 37,), grad=torch.bfloat16, copy=torch.bfloat16)
    split = State(*([piece.clone() for piece in tensors[0].split(37)] for tensors in vars(whole).values()))
    whole.update(num_threads=2)
    split.update(num_threads=2)
    assert State(*([torch.cat(tensors)] for tensors in vars(split).values())).same_bits(whole)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_are_rounded_as_torch_rounds(cpu_part: Any, isa: str, dtype: torch.dtype) -> None:
    """Every 16-bit number, the two fp32 ones beside it, half way to the next and beside that; with a rate of 0."""
    exact = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    near = [exact.view(torch.int32) + change for change in (0, 1, -1)]
    half = 0x8000 if dtype == torch.bfloat16 else 0x1000
    near += [exact.view(torch.int32) + half + change for change in (0, 1, -1)]
    tiny = torch.arange(1, 4000) * 2.0**-27  # fp16's denormals, and what lies between them
    p = torch.cat([torch.cat(near).view(torch.float32), tiny, -tiny])
    zeros, copy = torch.zeros(len(p)), torch.empty(len(p), dtype=dtype)
    cpu_adamw_(
        [p], [zeros], [zeros.clone()], [zeros.clone()], [copy], step=1, learning_rate=0.0, beta1=0.9, beta2=0.95,
        eps=1e-8, weight_decay=0.0, isa=_isa_or_skip(isa),
    )  # fmt: skip
    expected, is_nan = p.to(dtype), p.isnan()
    assert torch.equal(copy.isnan(), is_nan)
    assert torch.equal(copy[~is_nan], expected[~is_nan])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_widened_as_torch_widens(cpu_part: Any, isa: str, dtype: torch.dtype) -> None:
    """With beta1 0.75, m goes from 0 to g / 4, for every 16-bit number: denormals, infinities and NaNs among them."""
    grad = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    p, m, v = torch.zeros(3, len(grad))
    cpu_adamw_(
        [p], [grad], [m], [v], step=1, learning_rate=0.0, beta1=0.75, beta2=0.5, eps=1e-8, weight_decay=0.0,
        isa=_isa_or_skip(isa),
    )  # fmt: skip
    torch.testing.assert_close(m, grad.float() * 0.25, rtol=0, atol=0, equal_nan=True)


# Norms


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_norm_matches_fp64(cpu_part: Any, isa: str, dtype: torch.dtype) -> None:
    """Squares are exact in fp64, and n of them added in any order are off by at most n 2^-53, relatively.

    16 squares of 2-byte elements are added in fp32 first: 15 roundings of 2^-24.
    """
    torch.manual_seed(3)
    tensors = [_shifted(torch.randn(n).to(dtype), 1) for n in (*SIZES, 31, 33, 16384, 50_000)]
    expected = math.fsum(float(x) ** 2 for t in tensors for x in t.double())
    found = squared_norm(tensors, isa=_isa_or_skip(isa))
    bound = sum(t.numel() for t in tensors) * 2.0**-53 + (15 * 2.0**-24 if dtype.itemsize == 2 else 0)
    assert abs(found - expected) <= bound * expected
    assert found == squared_norm(tensors, isa="plain")
    assert squared_norm([], isa=isa) == 0.0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e19, 1e30])
def test_squared_norm_of_bf16_leaves_the_range_of_fp32(cpu_part: Any, isa: str, size: float) -> None:
    x = torch.full((20_000,), size, dtype=torch.bfloat16)
    expected = 20_000 * float(x[0]) ** 2
    assert squared_norm([x], isa=_isa_or_skip(isa)) == pytest.approx(expected, rel=1e-6)


def test_squared_norm_does_not_depend_on_threads(cpu_part: Any) -> None:
    torch.manual_seed(4)
    tensors = [torch.randn(n) for n in (400_003, 1, 100_000)] + [torch.randn(3000).bfloat16() for _ in range(99)]
    assert len({squared_norm(tensors, num_threads=n) for n in (1, 2, 3, 8, None)}) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_squared_norm_keeps_what_is_not_finite(cpu_part: Any, bad: float) -> None:
    x = torch.ones(100_000)
    x[70_001] = bad
    found = squared_norm([x])
    assert math.isnan(found) if math.isnan(bad) else found == math.inf


# Fallback and refusals


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module was not built."""
    monkeypatch.setattr(cpu_adamw, "MODULE", "megallm_kernels._nowhere")
    monkeypatch.setattr(cpu_adamw, "load", cpu_adamw.load.__wrapped__)


def test_without_the_module_torch_does_the_same_if_asked(absent: None) -> None:
    state = _state(grad=torch.bfloat16, copy=torch.bfloat16)
    before = state.clone()
    decayed = [i % 2 == 0 for i in range(len(SIZES))]
    state.update(decayed=decayed, fallback=True)
    _check_step(before, state, decayed=decayed)
    assert all(torch.equal(c, p.bfloat16()) for c, p in zip(state.copies, state.params, strict=True))
    expected = sum(float((g.double() ** 2).sum()) for g in state.grads)
    assert squared_norm(state.grads, fallback=True) == pytest.approx(expected, rel=1e-12)


def test_without_the_module_nothing_is_silent(absent: None) -> None:
    assert "was not built: install again where a C++ compiler is" in (cpu_adamw.why_absent() or "")
    assert cpu_adamw.instruction_sets() == ()
    with pytest.raises(RuntimeError, match="compiled CPU form was asked for, but .* was not built"):
        _state().update()
    with pytest.raises(RuntimeError, match="was not built"):
        squared_norm([torch.ones(3)])


def test_without_a_compiler_the_build_says_so_and_goes_on(tmp_path: Any) -> None:
    out = [f"--build-temp={tmp_path}", f"--build-lib={tmp_path / 'library'}"]
    done = run_setup("build_ext", "--force", *out, PATH="/nowhere", CC="/nowhere/cc", CXX="/nowhere/c++")
    assert done.returncode == 0, done.stderr
    assert "megallm_kernels._cpu does not build, so AdamW on the CPU is left to torch" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": []}, "lists of equal lengths"),
        ({"decayed": [True]}, "1 entries of decayed"),
        ({"decayed": []}, "0 entries of decayed"),
        ({"params": [torch.ones(4).half(), torch.ones(4)]}, r"params\[0\] is torch.float16; it must be torch.float32"),
        ({"exp_avgs": [torch.ones(4), torch.ones(4).bfloat16()]}, r"exp_avgs\[1\] is torch.bfloat16"),
        ({"grads": [torch.ones(4), torch.ones(4).half()]}, "gradients of one dtype"),
        ({"grads": [torch.ones(4).double()] * 2}, r"grads\[0\] is torch.float64"),
        ({"copies": [torch.ones(4)] * 2}, r"copies\[0\] is torch.float32"),
        ({"exp_avg_sqs": [torch.ones(4), torch.ones(5)]}, r"exp_avg_sqs\[1\] has 5 elements, params\[1\] has 4"),
        ({"grads": [torch.ones(8)[::2]] * 2}, r"grads\[0\] \(4,\) has strides \(2,\): it must be contiguous"),
        ({"grads": [torch.ones(4, device="meta")] * 2}, r"grads\[0\] is on meta: this AdamW is for CPU memory"),
        ({"step": 0}, "number of this update: 1 for the first"),
        ({"beta2": 1.0}, r"beta2 \(1.0\) must be at least 0 and less than 1"),
        ({"num_threads": 0}, r"num_threads \(0\) must be at least 1"),
        ({"isa": "sse9"}, "does not have the instruction set 'sse9': it has .*plain"),
    ],
)
def test_bad_arguments_are_refused(cpu_part: Any, change: dict[str, Any], message: str) -> None:
    tensors = {name: [torch.ones(4), torch.ones(4)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    with pytest.raises(ValueError, match=message):
        cpu_adamw_(**({**tensors, "step": 1, **NUMBERS} | change))


def test_a_norm_refuses_in_words(cpu_part: Any) -> None:
    with pytest.raises(ValueError, match=r"tensors\[1\] is torch.int64"):
        squared_norm([torch.ones(2), torch.ones(2, dtype=torch.int64)])


def test_autograd_notices_the_update(cpu_part: Any) -> None:
    state = _state((5,))
    version = state.params[0]._version
    state.update()
    assert state.params[0]._version > version
