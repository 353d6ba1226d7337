"""RMSNorm and LayerNorm kernels against fp64 torch, in the interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DTYPES, far_rows, normal, run_alone, strided
from torch.library import opcheck

from megallm.testing.tolerances import assert_close
from megallm_kernels import norm as kernel

EPS = 1e-5
KINDS = pytest.mark.parametrize("centered", [False, True], ids=["rms_norm", "layer_norm"])
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is None:
        return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def check(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    *,
    centered: bool,
    dy: torch.Tensor,
    dnew: torch.Tensor | None = None,
) -> None:
    """Outputs and every gradient equal the reference's in fp64 on the same rounded numbers."""
    width, dtype = x.size(-1), x.dtype
    weight = normal(width, dtype=dtype, seed=11)
    bias = normal(width, dtype=dtype, seed=12) if centered else None
    inputs = [x] + ([] if residual is None else [residual]) + [weight] + ([] if bias is None else [bias])
    own = [t.detach().requires_grad_() for t in inputs]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    own_bias, wide_bias = (own[-1], wide[-1]) if centered else (None, None)
    own_weight, wide_weight = (own[-2], wide[-2]) if centered else (own[-1], wide[-1])
    if residual is None:
        y, _, _ = kernel.norm(own[0], own_weight, own_bias, EPS)
        outputs, expected = [y], [reference(wide[0], wide_weight, wide_bias)]
        grads = [dy]
    else:
        y, new_residual, _, _ = kernel.add_norm(own[0], own[1], own_weight, own_bias, EPS)
        total = wide[0] + wide[1]
        total = total + (new_residual.double() - total).detach()  # both normalise the sum as it was rounded
        outputs, expected = [y, new_residual], [reference(total, wide_weight, wide_bias), total]
        grads = [dy, dy.new_ones(()).expand_as(dy) if dnew is None else dnew]
    # y: the statistic is a sum of `width` terms in fp32, then two products and a rounding: 4 roundings in x's dtype
    terms = 4 if dtype != torch.float32 else 4 + width
    for a, e in zip(outputs, expected, strict=True):
        assert a.dtype == dtype
        assert_close(a, e, terms=terms, label="output")
    actual = torch.autograd.grad(outputs, own, grads)
    wanted = torch.autograd.grad(expected, wide, [g.double() for g in grads])
    # gradients: sums of `width` terms (dx) or of the rows (dw) in fp32, a few products, one rounding in x's dtype
    terms = 8 if dtype != torch.float32 else 8 + 2 * width + x.numel() // width
    for i, (a, e) in enumerate(zip(actual, wanted, strict=True)):
        assert a.shape == e.shape and a.dtype == dtype
        assert_close(a, e, terms=terms, label=f"gradient {i}")


@EACH_DTYPE
@KINDS
@pytest.mark.parametrize("shape", [(1, 64), (5, 7), (33, 128), (3, 2050), (0, 16), (2, 3, 48)], ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "add"])
def test_norm_matches_fp64(dtype: torch.dtype, centered: bool, shape: tuple[int, ...], with_residual: bool) -> None:
    x = normal(*shape, dtype=dtype, seed=1)
    residual = normal(*shape, dtype=dtype, seed=2) if with_residual else None
    dy, dnew = (normal(*shape, dtype=dtype, seed=seed) for seed in (3, 4))
    check(x, residual, centered=centered, dy=dy, dnew=dnew)


@KINDS
@pytest.mark.parametrize("form", ["strided", "transposed", "expanded"])
def test_norm_takes_any_strides_of_inputs_and_gradients(centered: bool, form: str) -> None:
    shape = (6, 10)
    x, r, dy, dn = (normal(*shape, dtype=torch.float32, seed=s) for s in range(4))
    change = {
        "strided": strided,
        "transposed": lambda t: t.t().contiguous().t(),
        "expanded": lambda t: t[:1].expand(shape),
    }[form]
    check(change(x), change(r), centered=centered, dy=change(dy), dnew=change(dn))


@KINDS
def test_a_sum_as_loss_gives_an_expanded_gradient(centered: bool) -> None:
    x = normal(5, 12, dtype=torch.float32, seed=1)
    check(x, None, centered=centered, dy=torch.ones(()).expand(5, 12))


@EACH_DTYPE
def test_norm_reads_heads_in_place_from_a_packed_buffer(dtype: torch.dtype) -> None:
    packed = normal(9, 8, 16, dtype=dtype, seed=1)
    check(packed[:, 2:5], None, centered=False, dy=normal(9, 8, 16, dtype=dtype, seed=2)[:, 4:7])


@EACH_DTYPE
@pytest.mark.parametrize("scale", [3.0, 100.0])
def test_norm_of_large_numbers_has_fp32_statistics(dtype: torch.dtype, scale: float) -> None:
    check(
        normal(7, 256, dtype=dtype, seed=1, scale=scale), normal(7, 256, dtype=dtype, seed=2, scale=scale),
        centered=False, dy=normal(7, 256, dtype=dtype, seed=3), dnew=normal(7, 256, dtype=dtype, seed=4),
    )  # fmt: skip


def test_only_the_residual_may_be_used() -> None:
    x, r = (normal(3, 8, dtype=torch.float32, seed=s).requires_grad_() for s in (1, 2))
    _, new_residual, _, _ = kernel.add_norm(x, r, torch.ones(8), None, EPS)
    new_residual.sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8)) and torch.equal(r.grad, torch.ones(3, 8))


def test_the_weight_gradient_is_not_computed_when_it_is_frozen() -> None:
    x = normal(3, 8, dtype=torch.float32, seed=1)
    y, mean, rstd = kernel.norm(x, torch.ones(8), None, EPS)
    _, dweight, _ = kernel.norm_backward(torch.ones_like(y), x, torch.ones(8), mean, rstd, False, None, False)
    assert dweight.numel() == 0


def test_backward_repeats_bit_for_bit() -> None:
    x, dy = normal(37, 24, dtype=torch.float32, seed=1), normal(37, 24, dtype=torch.float32, seed=2)
    weight = normal(24, dtype=torch.float32, seed=3)
    _, mean, rstd = kernel.norm(x, weight, None, EPS)
    runs = [kernel.norm_backward(dy, x, weight, mean, rstd, False, None, True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_row_too_long_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="hidden size 16385 is over 16384"):
        kernel.norm(torch.zeros(1, 16385), torch.ones(16385), None, EPS)


def test_a_strided_weight_is_read_as_it_is() -> None:
    x, wide = normal(3, 8, dtype=torch.float32, seed=1), normal(16, dtype=torch.float32, seed=2)
    assert torch.equal(kernel.norm(x, wide[::2], None, EPS)[0], kernel.norm(x, wide[::2].contiguous(), None, EPS)[0])


def test_shapes_that_do_not_fit_are_refused_in_words() -> None:
    x, weight = torch.zeros(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"residual is \(1, 8\) on cpu, for x \(3, 8\) it must be \(3, 8\)"):
        kernel.add_norm(x, torch.zeros(1, 8), weight, None, EPS)
    with pytest.raises(ValueError, match="weight is"):
        kernel.norm(x, torch.ones(4), None, EPS)


def test_ops_pass_opcheck() -> None:
    x, r = (normal(3, 8, dtype=torch.float32, seed=s).requires_grad_() for s in (1, 2))
    weight, bias = (normal(8, dtype=torch.float32, seed=s).requires_grad_() for s in (3, 4))
    opcheck(kernel.norm, (x, weight, None, EPS))
    opcheck(kernel.norm, (x, weight, bias, EPS))
    opcheck(kernel.add_norm, (x, r, weight, None, EPS))


def test_ops_compile_without_graph_breaks() -> None:
    shapes = [(3, 8), (3, 8), (8,)]
    x, r, weight = (normal(*shape, dtype=torch.float32, seed=i).requires_grad_() for i, shape in enumerate(shapes))

    def loss(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y, new_residual, _, _ = kernel.add_norm(x, r, weight, None, EPS)
        return (y * new_residual).sum()

    eager = torch.autograd.grad(loss(x, r, weight), (x, r, weight))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, e in zip(torch.autograd.grad(compiled(x, r, weight), (x, r, weight)), eager, strict=True):
        assert torch.equal(a, e)


def test_rows_2_to_the_30_elements_apart_are_found() -> None:
    run_alone(far_rows(128) + """
from megallm_kernels import norm
x, dy, weight = far(), far(), torch.ones(128, dtype=torch.float16)
y, mean, rstd = norm.norm(x, weight, None, 1e-5)
near = norm.norm(x.contiguous(), weight, None, 1e-5)[0]
assert torch.equal(y, near)
dx = norm.norm_backward(dy, x, weight, mean, rstd, False, dy, True)[0]
assert torch.equal(dx, norm.norm_backward(dy.contiguous(), x.contiguous(), weight, mean, rstd, False, dy, True)[0])
""")


@EACH_DTYPE
@pytest.mark.parametrize("width", [8200, 16384])
def test_the_longest_rows_have_their_sums_apart(dtype: torch.dtype, width: int) -> None:
    x, dy = (normal(35, width, dtype=dtype, seed=s) for s in (1, 2))
    assert kernel.plan(width, backward=True, element_bytes=x.element_size(), centered=True).sums_apart
    check(x, None, centered=True, dy=dy)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 120])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_the_stages_of_a_long_row_fit_the_shared_memory(arch: int, element_bytes: int) -> None:
    limit = {80: 166_912, 90: 232_448}.get(arch, 101_376)
    for hidden in (1024, 4096, 8192):
        launch = kernel.plan(hidden, backward=True, arch=arch, element_bytes=element_bytes)
        assert launch.stages >= 1
        assert launch.stages == 1 or launch.stages * 2 * launch.rows * launch.block * element_bytes < limit
    with pytest.raises(ValueError, match="compute capability 7.5 is below 8.0"):
        kernel.plan(64, backward=False, arch=75)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_other_dtypes_are_refused_in_words(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"x is {dtype}: the kernel takes float32, bfloat16 and float16"):
        kernel.norm(torch.ones(3, 8, dtype=dtype), torch.ones(8), None, EPS)
    with pytest.raises(ValueError, match="weight is"):
        kernel.norm(torch.ones(3, 8), torch.ones(8, dtype=dtype), None, EPS)
