"""Activation kernels against fp64 torch, in the interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DTYPES, far_rows, normal, run_alone, strided
from torch.library import opcheck

from megallm.testing.tolerances import assert_close
from megallm_kernels.activation import KINDS, activation

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
FORMS = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
TERMS = 16
"""Roundings in a row: the exponential or erf (2 ulp), up to ten products and sums, the result."""


def reference(x: torch.Tensor, kind: str, gated: bool) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1) if gated else (x, torch.ones_like(x))
    return (F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh" if "tanh" in kind else "none")) * up


def check(x: torch.Tensor, dy: torch.Tensor, kind: str, gated: bool) -> None:
    own, wide = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    y, expected = activation(own, kind, gated), reference(wide, kind, gated)
    assert y.dtype == x.dtype
    assert_close(y, expected, terms=TERMS, label="output")
    (dx,) = torch.autograd.grad(y, own, dy)
    assert_close(dx, torch.autograd.grad(expected, wide, dy.double())[0], terms=TERMS, label="gradient")


@EACH_DTYPE
@EACH_KIND
@FORMS
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 1031), (0, 4), (4, 0), (2, 3, 5)], ids=str)
def test_activation_matches_fp64(dtype: torch.dtype, kind: str, gated: bool, shape: tuple[int, ...]) -> None:
    x = normal(*shape[:-1], shape[-1] * (2 if gated else 1), dtype=dtype, seed=1)
    check(x, normal(*shape, dtype=dtype, seed=2), kind, gated)


@EACH_KIND
@FORMS
@pytest.mark.parametrize("form", ["strided", "transposed", "expanded"])
def test_activation_takes_any_strides(kind: str, gated: bool, form: str) -> None:
    change = {
        "strided": strided,
        "transposed": lambda t: t.t().contiguous().t(),
        "expanded": lambda t: t[:1].expand(t.shape),
    }[form]
    x, dy = normal(6, 10 if gated else 5, dtype=torch.float32, seed=1), normal(6, 5, dtype=torch.float32, seed=2)
    check(change(x), change(dy), kind, gated)


@EACH_DTYPE
@EACH_KIND
@pytest.mark.parametrize("scale", [3.0, 100.0])
def test_large_numbers_saturate_without_nan(dtype: torch.dtype, kind: str, scale: float) -> None:
    check(normal(5, 24, dtype=dtype, seed=1, scale=scale), normal(5, 12, dtype=dtype, seed=2), kind, True)


def test_bad_arguments_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="'relu' is unknown"):
        activation(torch.zeros(2, 4), "relu", False)
    with pytest.raises(ValueError, match="even number of columns, got 3"):
        activation(torch.zeros(2, 3), "silu", True)


@FORMS
def test_op_passes_opcheck(gated: bool) -> None:
    opcheck(activation, (normal(3, 8, dtype=torch.float32, seed=1).requires_grad_(), "silu", gated))


def test_op_compiles_without_graph_breaks() -> None:
    x = normal(3, 8, dtype=torch.float32, seed=1).requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return activation(x, "gelu", True).square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    assert torch.equal(torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)[0], expected)


def test_rows_2_to_the_30_elements_apart_are_found() -> None:
    run_alone(far_rows(128) + """
from megallm_kernels.activation import activation, activation_backward
x, dy = far(), far((64,))
assert torch.equal(activation(x, "silu", True), activation(x.contiguous(), "silu", True))
dx = activation_backward(dy, x, "silu", True)
assert torch.equal(dx, activation_backward(dy.contiguous(), x.contiguous(), "silu", True))
""")
