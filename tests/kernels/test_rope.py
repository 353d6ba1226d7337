"""The rotary embedding kernel against fp64 torch, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, far_rows, normal, run_alone, strided
from torch.library import opcheck

from megallm.testing.tolerances import assert_close
from megallm_kernels.rope import rope, rope_

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TERMS = 3
"""Two products and a sum."""


def tables(rows: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = normal(rows, half, dtype=torch.float64, seed=5) * 3
    return angle.cos().float(), angle.sin().float()


def reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, h, D], cos and sin [T, R/2], fp64."""
    half = cos.size(1)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s, rest], dim=-1)


@EACH_DTYPE
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 16), (7, 11, 80), (0, 2, 8), (3, 0, 8)], ids=str)
@pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
def test_rope_and_its_gradient_match_fp64(dtype: torch.dtype, shape: tuple[int, int, int], partial: bool) -> None:
    half = max(shape[2] // (4 if partial else 2), 1)
    cos, sin = tables(shape[0] + 2, half)
    x = normal(*shape, dtype=dtype, seed=1).requires_grad_()
    dy = normal(*shape, dtype=dtype, seed=2)
    y = rope(x, cos, sin)
    assert_close(y, reference(x.detach().double(), cos[: shape[0]], sin[: shape[0]]), terms=TERMS)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_close(dx, reference(dy.double(), cos[: shape[0]], -sin[: shape[0]]), terms=TERMS)


@EACH_DTYPE
def test_rope_in_place_in_the_packed_buffer_leaves_the_values_alone(dtype: torch.dtype) -> None:
    packed = normal(9, 5 + 2 + 2, 12, dtype=dtype, seed=1)
    cos, sin = tables(9, 6)
    before = packed.clone()
    rope_(packed[:, :7], cos, sin)
    assert_close(packed[:, :7], reference(before[:, :7].double(), cos, sin), terms=TERMS)
    assert torch.equal(packed[:, 7:], before[:, 7:])
    rope_(packed[:, :7], cos, sin, conjugate=True)
    assert_close(packed[:, :7], before[:, :7].double(), terms=2 * TERMS)


@pytest.mark.parametrize("offsets", [[0, 9], [0, 0, 4, 4, 4, 9], [0, 1, 2, 9], [0, 3, 6]], ids=str)
def test_positions_restart_with_each_document(offsets: list[int]) -> None:
    """Empty documents and documents of one token; tokens past the last offset count on."""
    cos, sin = tables(9, 4)
    x = normal(9, 2, 8, dtype=torch.float32, seed=1)
    starts = [max(o for o in offsets[:-1] if o <= t) for t in range(9)]
    positions = torch.tensor([t - s for t, s in zip(range(9), starts, strict=True)])
    expected = reference(x.double(), cos[positions], sin[positions])
    assert_close(rope(x, cos, sin, cu_seqlens=torch.tensor(offsets, dtype=torch.int32)), expected, terms=TERMS)
    assert_close(rope(x, cos, sin, positions=positions), expected, terms=TERMS)


@pytest.mark.parametrize("form", ["strided", "transposed", "expanded"])
def test_rope_takes_any_strides_of_inputs_and_gradients(form: str) -> None:
    x, dy = (normal(4, 3, 8, dtype=torch.float32, seed=s) for s in (1, 2))
    change = {
        "strided": strided,
        "transposed": lambda t: t.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "expanded": lambda t: t[:, :1].expand(4, 3, 8),
    }[form]
    x, dy = change(x).requires_grad_(), change(dy)
    cos, sin = tables(4, 4)
    y = rope(x, cos, sin)
    assert_close(y, reference(x.detach().double(), cos, sin), terms=TERMS)
    assert_close(torch.autograd.grad(y, x, dy)[0], reference(dy.double(), cos, -sin), terms=TERMS)


def test_bad_shapes_are_refused_in_words() -> None:
    x, (cos, sin) = torch.zeros(4, 2, 8), tables(4, 4)
    with pytest.raises(ValueError, match="equal tables"):
        rope(x, cos, sin[:, :2])
    with pytest.raises(ValueError, match="3 rows for 4 tokens"):
        rope(x, cos[:3], sin[:3])
    with pytest.raises(ValueError, match="not both"):
        rope(x, cos, sin, torch.arange(4), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="unit stride"):
        rope_(strided(x), cos, sin)
    with pytest.raises(ValueError, match="overlap"):
        rope_(x[:, :1].expand(4, 2, 8), cos, sin)
    with pytest.raises(ValueError, match="x is torch.float64"):
        rope(x.double(), cos, sin)
    with pytest.raises(ValueError, match="positions are torch.float32"):
        rope(x, cos, sin, torch.arange(4).float())


def test_positions_of_any_stride_are_read() -> None:
    cos, sin = tables(9, 4)
    x, wide = normal(4, 2, 8, dtype=torch.float32, seed=1), torch.tensor([[5, 0], [1, 0], [8, 0], [3, 0]])
    assert torch.equal(rope(x, cos, sin, wide[:, 0]), rope(x, cos, sin, wide[:, 0].contiguous()))


def test_a_position_without_a_row_gives_nan_and_reads_nothing_else() -> None:
    cos, sin = tables(3, 4)
    x = normal(4, 2, 8, dtype=torch.float32, seed=1)
    y = rope(x, cos, sin, torch.tensor([0, 3, -1, 2]))
    assert y[1:3].isnan().all() and not y[::3].isnan().any()


def test_ops_pass_opcheck() -> None:
    x, (cos, sin) = normal(4, 2, 8, dtype=torch.float32, seed=1), tables(4, 4)
    opcheck(rope, (x.requires_grad_(), cos, sin))
    opcheck(rope_, (x.detach(), cos, sin, torch.tensor([3, 2, 1, 0])))


def test_both_forms_compile_without_graph_breaks() -> None:
    x, (cos, sin) = normal(4, 2, 8, dtype=torch.float32, seed=1), tables(4, 4)

    def twice(x: torch.Tensor) -> torch.Tensor:
        y = rope(x, cos, sin)
        rope_(y, cos, sin, None, None, True)
        return y

    assert torch.equal(torch.compile(twice, fullgraph=True, backend="aot_eager")(x), twice(x))


def test_tokens_2_to_the_30_elements_apart_are_found() -> None:
    run_alone(far_rows(3, 16) + """
from megallm_kernels.rope import rope, rope_
x, cos, sin = far(), torch.randn(3, 8), torch.randn(3, 8)
expected = rope(x.contiguous(), cos, sin)
assert torch.equal(rope(x, cos, sin), expected)
rope_(x, cos, sin)
assert torch.equal(x, expected)
""")
