"""The compiled RMSNorm, RoPE and AdamW against fp64, on CPU tensors: the same arguments and arithmetic as on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled_build import built

from megallm.ops.adamw import adamw_reference_
from megallm.testing.tolerances import assert_close
from megallm_kernels import compiled, compiled_part
from megallm_kernels.adamw_plan import AdamWPlan

__all__ = ["built"]
pytestmark = pytest.mark.usefixtures("built")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def norm64(s: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    s = s.double()
    return s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 64), (4, 4096), (130, 96), (2, 16384), (3, 16383)])
def test_rms_norm_is_the_norm_in_fp64(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, residual = (random(*shape, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    for weight in (random(shape[-1], dtype=dtype, device=device), random(shape[-1], device=device)):
        y, rstd = compiled.rms_norm(x, weight, EPS)
        assert_close(y, norm64(x, weight), terms=shape[-1])
        expected = torch.rsqrt(x.double().pow(2).mean(-1) + EPS).flatten()
        assert_close(rstd, expected, terms=shape[-1])
        y, new_residual, _ = compiled.add_rms_norm(x, residual, weight, EPS)
        assert torch.equal(new_residual, x + residual)  # one rounding: of the sum
        assert_close(y, norm64(new_residual, weight), terms=shape[-1])


def gradients(function: Any, inputs: list[torch.Tensor], dys: list[torch.Tensor]) -> list[torch.Tensor]:
    inputs = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*inputs)
    torch.autograd.backward(outputs, dys)
    return [t.grad for t in inputs if t.grad is not None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 4, 64), (50, 96), (9, 2048), (5, 16384)])
def test_rms_norm_gradients_are_those_in_fp64(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, residual, dy, dres = (random(*shape, dtype=dtype, device=device, seed=seed) for seed in range(4))
    weight = random(shape[-1], dtype=dtype, device=device)

    def fused(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        return compiled.add_rms_norm(x, residual, weight, EPS)[:2]

    def exact(s: torch.Tensor, weight: torch.Tensor) -> Any:
        return norm64(s, weight), s.double()

    dx, dresidual, dweight = gradients(fused, [x, residual, weight], [dy, dres])
    want_dx, want_dweight = gradients(exact, [(x + residual).double(), weight.double()], [dy.double(), dres.double()])
    assert torch.equal(dx, dresidual)
    rows = x.numel() // shape[-1]
    assert_close(dx, want_dx, terms=shape[-1])
    assert_close(dweight, want_dweight, terms=rows + shape[-1])


@pytest.mark.parametrize("kind", ["slice", "expanded", "transposed", "offset"])
def test_rms_norm_reads_any_strides(kind: str) -> None:
    def view(seed: int) -> torch.Tensor:
        if kind == "slice":  # of a packed buffer: rows have two strides
            return random(6, 8, 32, seed=seed)[:, 2:5, :16]
        if kind == "expanded":
            return random(1, 1, 16, seed=seed).expand(6, 3, 16)
        if kind == "transposed":
            return random(16, 3, 6, seed=seed).permute(2, 1, 0)
        return random(6 * 3 * 16 + 1, seed=seed)[1:].view(6, 3, 16)

    x, residual, dy, dres = (view(seed) for seed in range(4))
    weight = random(16)
    y, _, rstd = compiled.add_rms_norm(x, residual, weight, EPS)
    assert_close(y, norm64(x + residual, weight), terms=16)
    given = (dy, x, weight, rstd, dres, True)
    contiguous = [t.contiguous() if isinstance(t, torch.Tensor) else t for t in given]
    for got, want in zip(
        compiled.rms_norm_backward(*given), compiled.rms_norm_backward(*contiguous), strict=True
    ):
        assert torch.equal(got, want)


def test_the_sum_s_gradient_is_stride_0() -> None:
    x, weight = random(5, 16).requires_grad_(), random(16).requires_grad_()
    compiled.rms_norm(x, weight, EPS)[0].sum().backward()
    (want,) = gradients(lambda x: norm64(x, weight.detach()).sum(), [x.double()], [torch.ones((), dtype=torch.float64)])
    assert x.grad is not None
    assert_close(x.grad, want, terms=16)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty_rows_launch_nothing(shape: tuple[int, int]) -> None:
    x, weight = torch.zeros(shape, requires_grad=True), torch.ones(shape[1], requires_grad=True)
    y, _ = compiled.rms_norm(x, weight, EPS)
    y.sum().backward()
    assert y.shape == shape and weight.grad is not None and torch.equal(weight.grad, torch.zeros(shape[1]))


def tables(rows: int, half: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(rows)[:, None] * 10000.0 ** (-torch.arange(half) / max(half, 1))
    return angle.cos().to(device), angle.sin().to(device)


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    compiled_part.rotate(x, x, cos, sin)


def rope64(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    c, s = (table.double()[rows][:, None] for table in (cos, sin))
    x1, x2, rest = x.double().split([cos.size(1), cos.size(1), x.size(2) - 2 * cos.size(1)], dim=2)
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s, rest], dim=2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "rotary"), [(1, 2, 2), (5, 16, 16), (3, 80, 80), (4, 64, 32), (2, 7, 6)])
def test_rope_rotates_slices_in_place(heads: int, dim: int, rotary: int, dtype: torch.dtype, device: str) -> None:
    packed = random(11, heads + 2, dim, dtype=dtype, device=device)
    before = packed.clone()
    cos, sin = tables(11, rotary // 2, device)
    compiled.rope_(packed[:, 1:-1], cos, sin)
    rows = torch.arange(11, device=device)
    assert_close(packed[:, 1:-1], rope64(before[:, 1:-1], cos, sin, rows), terms=4)
    assert torch.equal(packed[:, [0, -1]], before[:, [0, -1]])
    compiled.rope_(packed[:, 1:-1], cos, sin, conjugate=True)
    assert_close(packed, before, terms=8)


@pytest.mark.parametrize("device", DEVICES)
def test_rope_rows_come_from_positions_or_documents(device: str) -> None:
    x, (cos, sin) = random(7, 2, 8, device=device), tables(20, 4, device)
    positions = torch.tensor([3, 19, 0, 0, 5, 6, 1], device=device)
    assert_close(compiled.rope(x, cos, sin, positions), rope64(x, cos, sin, positions), terms=4)
    documents = torch.tensor([0, 3, 3, 5], dtype=torch.int32, device=device)  # one empty, two tokens past the end
    rows = torch.tensor([0, 1, 2, 0, 1, 2, 3], device=device)
    assert_close(compiled.rope(x, cos, sin, None, documents), rope64(x, cos, sin, rows), terms=4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_position_without_a_row_gives_nan(device: str) -> None:
    x, (cos, sin) = random(4, 2, 8, device=device), tables(5, 4, device)
    y = compiled.rope(x, cos, sin, torch.tensor([4, 5, -1, 0], device=device))
    assert y[1:3].isnan().all() and not y[::3].isnan().any()


def test_a_new_tensor_keeps_what_is_not_rotated_of_strided_input() -> None:
    x, (cos, sin) = random(3, 6, 10)[:, 1:4].transpose(1, 2).contiguous().transpose(1, 2), tables(3, 2)
    before = x.clone()
    y = compiled.rope(x, cos, sin)
    assert y.is_contiguous() and torch.equal(x, before)
    assert_close(y, rope64(x, cos, sin, torch.arange(3)), terms=4)


def test_rope_s_gradient_turns_back() -> None:
    x, dy, (cos, sin) = random(4, 3, 8), random(4, 3, 8, seed=1), tables(4, 4)
    (dx,) = gradients(lambda x: compiled.rope(x, cos, sin), [x], [dy])
    assert torch.equal(dx, compiled.rope(dy, cos, sin, None, None, True))


def adamw_arguments(device: str, grad: torch.dtype, copy: torch.dtype | None) -> tuple[Any, ...]:
    sizes = (1, 7, 0, 509, 1031, 40_000)
    starts = (0, 2, 0, 2, 0, 2)  # every other tensor begins two elements past an aligned address
    kinds = [torch.float32, grad, torch.float32, torch.float32, *([] if copy is None else [copy])]
    params, grads, exp_avgs, exp_avg_sqs, *rest = (
        [random(start + n, dtype=kind, device=device, seed=i)[start:] for start, n in zip(starts, sizes, strict=True)]
        for i, kind in enumerate(kinds)
    )
    for v in exp_avg_sqs:
        v.square_()
    copies = rest[0] if rest else []
    lists = (params, grads, exp_avgs, exp_avg_sqs, copies)
    plan = AdamWPlan.build(*lists, decayed=[i % 2 == 0 for i in range(len(sizes))])
    scalars = [torch.tensor(value, device=device) for value in (2.0, 1e-2, 4.0, 0.0)]
    return (*lists, *scalars, plan.table, plan.chunks, plan.ticket, plan.host_table, 0.9, 0.999, 1e-8, 0.1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad", DTYPES)
@pytest.mark.parametrize("copy", [None, torch.bfloat16, torch.float16])
def test_adamw_is_the_specification_s(grad: torch.dtype, copy: torch.dtype | None, device: str) -> None:
    given = adamw_arguments(device, grad, copy)
    exact = [[t.double() for t in tensors] for tensors in given[:4]]
    compiled.adamw_update(*given)
    rate = given[6].double().item()
    for i, (p, g, m, v) in enumerate(zip(*exact, strict=True)):
        wd = 0.1 if i % 2 == 0 else 0.0
        adamw_reference_(p, g / 4.0, m, v, step=3, lr=rate, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=wd)
        for got, want in ((given[0], p), (given[2], m), (given[3], v)):
            assert_close(got[i], want, terms=8)
        if copy is not None:
            assert torch.equal(given[4][i], given[0][i].to(copy))
    assert given[5].item() == 3 and given[11].item() == 0


def test_adamw_keeps_its_plan_and_counts_steps() -> None:
    *lists, step, learning_rate, divisor, is_bad = adamw_arguments("cpu", torch.bfloat16, torch.bfloat16)[:9]
    arguments: dict[str, Any]
    arguments = {"step": step, "learning_rate": learning_rate, "grad_divisor": divisor, "is_bad": is_bad}
    arguments |= {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    version, plan = lists[0][0]._version, compiled.adamw_(None, *lists, **arguments)
    assert compiled.adamw_(plan, *lists, **arguments) is plan
    assert step.item() == 4 and lists[0][0]._version > version
    lists[1] = [g.view(torch.float16) for g in lists[1]]
    assert compiled.adamw_(plan, *lists, **arguments) is not plan


def test_a_bad_adamw_step_changes_nothing() -> None:
    given = adamw_arguments("cpu", torch.float32, torch.bfloat16)
    before = [t.clone() for tensors in given[:5] for t in tensors]
    given[8].fill_(1)
    compiled.adamw_update(*given)
    assert all(torch.equal(a, b) for a, b in zip([t for ts in given[:5] for t in ts], before, strict=True))
    assert given[5].item() == 2


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (compiled.rms_norm, lambda: (random(3, 16).requires_grad_(), random(16).requires_grad_(), EPS)),
        (compiled.add_rms_norm, lambda: (random(3, 16).requires_grad_(), random(3, 16), random(16), EPS)),
        (compiled.rms_norm_backward, lambda: (random(3, 16), random(3, 16), random(16), random(3), None, True)),
        (compiled.rope, lambda: (random(3, 2, 8).requires_grad_(), *tables(3, 4))),
        (compiled.rope_, lambda: (random(3, 2, 8), *tables(3, 4))),
        (compiled.adamw_update, lambda: adamw_arguments("cpu", torch.bfloat16, torch.bfloat16)),
    ],
)
def test_opcheck(operator: Any, arguments: Any) -> None:
    torch.library.opcheck(operator, arguments())


def test_the_operators_compile_into_a_full_graph() -> None:
    x, weight, (cos, sin) = random(3, 16), random(16), tables(3, 8)

    def block(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y, _ = compiled.rms_norm(x, weight, EPS)
        return compiled.rope(y[:, None], cos, sin)

    whole = torch.compile(block, fullgraph=True, backend="aot_eager")
    dy = random(3, 1, 16, seed=1)
    for got, want in zip(gradients(whole, [x, weight], [dy]), gradients(block, [x, weight], [dy]), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compiled_part.rms_norm_forward(torch.ones(2, 4), torch.ones(3), EPS), r"weight \(3,\) on cpu"),
        (lambda: compiled_part.rms_norm_forward(torch.ones(2, 4).double(), torch.ones(4), EPS), "takes fp32, fp16"),
        (lambda: compiled_part.rms_norm_forward(torch.ones(2, 20000), torch.ones(20000), EPS), "hidden is 20000"),
        (lambda: rotate_(torch.ones(2, 3), *tables(2, 2)), "rope takes x"),
        (lambda: rotate_(torch.ones(2, 3, 8)[..., ::2], *tables(2, 2)), "unit stride"),
        (lambda: rotate_(torch.ones(3, 1, 4), *tables(2, 2)), "2 rows for 3 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
