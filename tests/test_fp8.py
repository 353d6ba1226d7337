"""Fp8 products: rounding within the formats' bounds, linears against fp64, shards against the whole.

Everything runs by emulation on CPU; the same products by torch._scaled_mm are compared with it here, and on a GPU where
there is one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megallm.ops.fp8 import (
    E4M3,
    E5M2,
    Fp8Recipe,
    Quantized,
    hardware_refusal,
    quantize,
    reference_product,
    scaled_product,
    scaled_product_,
    tensor_core_product,
)
from megallm.parallel.grad_sink import GradSink
from megallm.parallel.linear import ColumnLinear, RowLinear
from megallm.parallel.mesh import Mesh
from megallm.parallel.products import Fp8Products
from megallm.testing.pool import run_ranks
from megallm.testing.tolerances import SIGMAS, assert_close

ROUNDING = {E4M3: 2.0**-4, E5M2: 2.0**-3}
"""Largest relative error of rounding to nearest, of normal numbers."""
UNDERFLOW = {E4M3: 2.0**-10, E5M2: 2.0**-17}
"""Largest error of subnormal ones, times the inverse scale: half a step."""
FORMATS = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
ROWWISE = pytest.mark.parametrize("rowwise", [False, True], ids=["tensorwise", "rowwise"])
SCALING = pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
CPU = torch.device("cpu")
T, IN, OUT = 20, 96, 160
"""T is not a multiple of 16."""


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def meaning(q: Quantized) -> torch.Tensor:
    """The numbers it stands for, fp64."""
    return q.values.double() * q.inverse.double()


# Quantisation


@FORMATS
@ROWWISE
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32], ids=str)
def test_every_number_is_rounded_to_nearest(dtype: torch.dtype, rowwise: bool, source: torch.dtype) -> None:
    x = (rand(40, 300, seed=1) * torch.exp2(torch.linspace(-30, 10, 300))).to(source)
    q = quantize(x, dtype, rowwise=rowwise)
    error = (meaning(q) - x.double()).abs()
    assert (error <= torch.maximum(ROUNDING[dtype] * x.double().abs(), UNDERFLOW[dtype] * q.inverse.double())).all()


@FORMATS
@ROWWISE
def test_the_range_is_used_and_never_left(dtype: torch.dtype, rowwise: bool) -> None:
    most = torch.finfo(dtype).max
    for seed, size in enumerate([1e-25, 1e-6, 0.9999999, 1.0, 447.0, 448.0, 448.00003, 449.0, 57344.0, 57345.0, 3e38]):
        x = rand(7, 16, seed=seed, dtype=torch.float32).clamp(-1.0, 1.0)
        x[:, 3] = -1.0
        q = quantize(x * size, dtype, rowwise=rowwise)
        largest = q.values.float().abs().amax(dim=1 if rowwise else (0, 1))
        assert ((largest >= most / 2) & (largest <= most)).all(), size
        assert (torch.frexp(q.inverse)[0] == 0.5).all(), "not a power of 2"


@FORMATS
@pytest.mark.parametrize("exponent", [-60, -7, 1, 50])
def test_powers_of_2_scale_exactly(dtype: torch.dtype, exponent: int) -> None:
    x = rand(20, 32, seed=2)
    one, other = quantize(x, dtype), quantize(x * 2.0**exponent, dtype)
    assert torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8))
    assert other.inverse == one.inverse * 2.0**exponent


@pytest.mark.parametrize(("dtype", "reach"), [(E4M3, 224 * 2**6), (E5M2, 28672 * 2**14)], ids=["e4m3", "e5m2"])
def test_rounding_hardly_depends_on_the_largest_number(dtype: torch.dtype, reach: int) -> None:
    x = rand(1, 64, seed=3, dtype=torch.float32).sign() * (1.0 + torch.rand(1, 64))
    alone = meaning(quantize(x, dtype))
    for factor, is_equal in ((100.0, True), (reach * 0.999, True), (reach * 100.0, False)):
        beside = torch.cat([x, torch.tensor([[factor]])], dim=1)
        assert torch.equal(meaning(quantize(beside, dtype))[:, :64], alone) is is_equal


def test_rows_of_different_size_need_scales_of_their_own() -> None:
    x = rand(8, 256, seed=4, dtype=torch.float64) * torch.logspace(-9, 0, 8).unsqueeze(1)
    error = {rowwise: (meaning(quantize(x, E4M3, rowwise=rowwise)) - x).norm(dim=1) for rowwise in (False, True)}
    assert (error[True] <= ROUNDING[E4M3] * x.norm(dim=1)).all()
    assert (error[True] <= error[False] * 1.001).all()
    assert error[False][0] == x[0].norm(), "the smallest row is lost"


@FORMATS
@ROWWISE
def test_zeros_stay_and_tiny_tensors_do_not_overflow(dtype: torch.dtype, rowwise: bool) -> None:
    q = quantize(torch.zeros(3, 16, dtype=torch.bfloat16), dtype, rowwise=rowwise)
    assert (q.values.float() == 0).all() and q.inverse.isfinite().all() and (q.inverse > 0).all()
    x = torch.full((3, 16), 1e-38)
    x[1] = 0.0
    assert (meaning(quantize(x, dtype, rowwise=rowwise)) - x).abs().max() <= 1e-38


@FORMATS
@ROWWISE
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_visible(dtype: torch.dtype, rowwise: bool, bad: float) -> None:
    x, w = rand(6, 32, seed=5), rand(16, 32, seed=6)
    x[4, 7] = bad
    q = quantize(x, dtype, rowwise=rowwise)
    is_bad = meaning(q).isnan().all(dim=1)
    assert is_bad.tolist() == ([False] * 4 + [True, False] if rowwise else [True] * 6)
    y = reference_product(q, quantize(w, E4M3, rowwise=rowwise), torch.bfloat16)
    assert torch.equal(y.isnan().all(dim=1), is_bad)


def test_any_layout_is_quantised_alike_and_transposition_pads() -> None:
    x = rand(24, 10, seed=7)
    for rowwise in (False, True):
        strided, packed = (quantize(each, E4M3, rowwise=rowwise) for each in (x.t(), x.t().contiguous()))
        assert strided.values.is_contiguous() and torch.equal(meaning(strided), meaning(packed))
    q = quantize(x, E5M2)
    assert torch.equal(meaning(q.transposed())[:, :24], meaning(q).t())
    assert q.transposed().values.shape == (10, 32) and (q.transposed().values[:, 24:].float() == 0).all()


# Products


def compare_with_reference(device: torch.device, rows: int) -> None:
    """torch's operation against the emulation: the same fp8 numbers, sums in another order, one rounding more or less.

    Not with `fast`, whose partial sums are only as good as the hardware makes them: within 2^-10.
    """
    a, b = rand(rows, 96, seed=8).to(device), rand(32, 96, seed=9).to(device)
    for rowwise, first, dtype, fast in (
        (False, E4M3, torch.bfloat16, False), (False, E5M2, torch.bfloat16, False), (False, E5M2, torch.float32, False),
        (True, E4M3, torch.bfloat16, False), (False, E4M3, torch.bfloat16, True), (True, E4M3, torch.bfloat16, True),
    ):  # fmt: skip
        qa, qb = quantize(a, first, rowwise=rowwise), quantize(b, E4M3, rowwise=rowwise)
        expected = reference_product(qa, qb, dtype)
        actual = tensor_core_product(qa, qb, dtype, fast=fast)
        allowed = torch.finfo(dtype).eps + (2.0**-10 if fast else 96**0.5 * torch.finfo(torch.float32).eps)
        magnitude = reference_product(
            Quantized(qa.values.float().abs().to(first), qa.inverse),
            Quantized(qb.values.float().abs().to(E4M3), qb.inverse), torch.float32,
        )  # fmt: skip
        assert ((actual.float() - expected.float()).abs() <= allowed * magnitude).all(), (rowwise, first, dtype, fast)


def test_scaled_mm_of_torch_agrees_with_the_emulation() -> None:
    try:
        tensor_core_product(quantize(torch.ones(16, 16), E4M3), quantize(torch.ones(16, 16), E4M3), torch.float32)
    except RuntimeError as error:
        pytest.skip(f"this torch has no _scaled_mm on CPU: {error}")
    compare_with_reference(CPU, rows=20)


@SCALING
@pytest.mark.parametrize("tokens", [1, 20, 64])
def test_every_product_has_the_layout_that_a_gpu_needs(
    scaling: Any, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's shape function holds tensors without data to the rules of CUDA: order of memory, multiples of 16."""
    dtypes = []

    def check(a: Quantized, b: Quantized, dtype: torch.dtype) -> torch.Tensor:
        empty = [Quantized(each.values.to("meta"), each.inverse.to("meta")) for each in (a, b)]
        dtypes.append((a.values.dtype, tensor_core_product(empty[0], empty[1], dtype).dtype))
        return reference_product(a, b, dtype)

    monkeypatch.setattr("megallm.ops.fp8.reference_product", check)
    recipe, bf16 = Fp8Recipe(scaling=scaling), torch.bfloat16
    backward(recipe, bf16, has_sink=True, tokens=tokens)
    once = [(E4M3, bf16), (E5M2, bf16), (E5M2, torch.float32)] if scaling == "tensorwise" else [(E4M3, bf16)] * 2
    assert dtypes == 2 * once
    with pytest.raises(RuntimeError, match="row_major"):
        q = quantize(rand(32, 48, seed=1), E4M3)
        check(Quantized(q.values.t(), q.inverse), Quantized(q.values.t(), q.inverse), bf16)


@pytest.mark.skipif(
    hardware_refusal(torch.device("cuda" if torch.cuda.is_available() else "cpu")) is not None,
    reason="no GPU with compute capability 8.9 or newer",
)
def test_tensor_cores_agree_with_the_emulation() -> None:
    device = torch.device("cuda")
    for rows in (1, 20, 256):
        compare_with_reference(device, rows)
    for scaling in ("tensorwise", "rowwise"):  # the layer as a whole, its sink aligned and not
        for shift in (0, 1):
            runs = []
            for emulate in (False, True):
                recipe = Fp8Recipe(scaling=scaling, emulate=emulate)  # type: ignore[arg-type]
                runs.append(backward(recipe, torch.bfloat16, device=device, has_sink=True, shift=shift))
            for actual, expected in zip(*runs, strict=True):
                assert_close(actual, expected, terms=160)
    q, out = quantize(rand(16, 32, seed=1).to(device), E4M3), torch.empty(257, device=device)
    scaled_product_(out[1:].view(16, 16), q, q)
    assert torch.equal(out[1:].view(16, 16), scaled_product(q, q, dtype=torch.float32))


def backward(
    recipe: Fp8Recipe, dtype: torch.dtype, *, device: torch.device = CPU, has_sink: bool = False, shift: int = 0,
    tokens: int = T,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(y, dx, dW) of a column-parallel layer on one rank; with a sink the sum of two equal microbatches."""
    weight = rand(OUT, IN, seed=12)
    x, dy = rand(tokens, IN, seed=11), rand(tokens, OUT, seed=13)
    x, dy = x.to(device, dtype).requires_grad_(), dy.to(device, dtype)
    parameter = nn.Parameter(weight.to(device, dtype))
    tp = Mesh.build(device=device).tp
    layer = ColumnLinear(parameter, None, tp=tp, sequence_parallel=False, products=Fp8Products(recipe))
    if has_sink:
        buffer = torch.full((OUT * IN + shift,), torch.nan, device=device)[shift:].view(OUT, IN)
        layer.grad_sinks["weight"] = sink = GradSink(buffer, lambda: None)
        sink.expect(2)
        layer(x).backward(dy)
        x.grad = None
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    grad = layer.grad_sinks["weight"].buffer if has_sink else parameter.grad
    assert grad is not None
    return y.detach(), x.grad, grad


def check_bound(name: str, actual: torch.Tensor, a: torch.Tensor, b: torch.Tensor, u: float) -> None:
    """`actual` against a b^T in fp64: rounded factors of relative error u, then rounded itself, a random walk."""
    a, b = a.double(), b.double()
    spread = ((a * a) @ (b * b).t()).sqrt()
    allowed = SIGMAS * u * spread + torch.finfo(actual.dtype).eps * (a @ b.t()).abs()
    error = (actual.double() - a @ b.t()).abs()
    assert (error <= allowed).all(), f"{name}: {(error / allowed).max()}"
    assert error.max() > 0.02 * allowed.max(), f"{name} was not in fp8"


@SCALING
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_linear_against_fp64(scaling: Any, dtype: torch.dtype) -> None:
    recipe = Fp8Recipe(scaling=scaling)
    x, w, dy = rand(T, IN, seed=11), rand(OUT, IN, seed=12), rand(T, OUT, seed=13)
    y, dx, dw = backward(recipe, dtype)
    u, v = ROUNDING[E4M3], ROUNDING[recipe.gradient_format]
    check_bound("y", y, x, w, (u * u + u * u) ** 0.5)
    check_bound("dx", dx, dy, w.t(), (v * v + u * u) ** 0.5)
    if scaling == "tensorwise":
        check_bound("dw", dw, dy.t(), x.t(), (v * v + u * u) ** 0.5)
    else:
        assert_close(dw, dy.double().t() @ x.double(), terms=T)


@SCALING
def test_the_weight_gradient_is_summed_in_fp32(scaling: Any) -> None:
    """Of two equal microbatches it is twice the gradient of one, which was not rounded to bf16 on its way."""
    summed = backward(Fp8Recipe(scaling=scaling), torch.bfloat16, has_sink=True)[2]
    single = backward(Fp8Recipe(scaling=scaling), torch.float32)[2]
    assert summed.dtype == torch.float32
    assert_close(summed, 2 * single, terms=T)
    assert not torch.equal(summed, summed.bfloat16().float())


def test_a_layer_takes_no_tokens_and_a_bias() -> None:
    weight, bias = nn.Parameter(rand(32, 16, seed=1)), nn.Parameter(rand(32, seed=2))
    tp = Mesh.build().tp
    products = Fp8Products(Fp8Recipe())
    for kind in (ColumnLinear, RowLinear):
        layer = kind(weight, bias, tp=tp, sequence_parallel=False, products=products)
        layer(torch.zeros(0, 16, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
        x = rand(5, 16, seed=3)
        assert torch.equal(layer(x), products.output(x, weight) + bias)


def check_shards(rank: int, world_size: int, scaling: Any) -> None:
    """A column layer's shards are the dense layer's columns, bit for bit; a row layer's partial sums are as near.

    Each rank's W, dy and y have a largest number of their own; no number here is so small that it matters.
    """
    tp, products = Mesh.build(tp=world_size).tp, Fp8Products(Fp8Recipe(scaling=scaling))

    def own(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.chunk(world_size, dim)[rank].contiguous()

    def draw(*shape: int, seed: int) -> torch.Tensor:
        x = rand(*shape, seed=seed, dtype=torch.float32)
        return (x.sign() * (x.abs() + 2.0**-6)).bfloat16()

    x, w, dy = draw(16, 64, seed=1), draw(96, 64, seed=2), draw(16, 96, seed=3)
    w[0] *= 16
    column = ColumnLinear(nn.Parameter(own(w, 0)), None, tp=tp, sequence_parallel=True, products=products)
    shard = own(x, 0).requires_grad_()
    y = column(shard)
    y.backward(own(dy, 1))
    gradient = products.ready(dy)
    assert torch.equal(y, own(products.output(x, w), 1))
    dw = products.weight_gradient(gradient, x, None)
    assert dw is not None and torch.equal(column.weight.grad, own(dw, 0))
    assert_close(shard.grad, own(products.input_gradient(gradient, w), 0), terms=2)
    row = RowLinear(nn.Parameter(own(w, 1)), None, tp=tp, sequence_parallel=True, products=products)
    assert_close(row(own(x, 1)), own(products.output(x, w), 0), terms=2)


@SCALING
def test_shards_have_scales_of_their_own_and_the_numbers_of_the_whole(scaling: Any) -> None:
    run_ranks(check_shards, 2, scaling)
