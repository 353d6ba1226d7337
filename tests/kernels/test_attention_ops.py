"""The attention operators: gradients against fp64 autograd, torch.compile, and the packed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DTYPES, normal, strided
from test_attention_forward import inputs, reference
from torch.library import opcheck

from megallm.ops.attention import attention as attention_of_model
from megallm.ops.attention import rotary_attention
from megallm.ops.backends import Backends
from megallm.testing.tolerances import assert_close
from megallm_kernels import attention_backward as backward_pass
from megallm_kernels.attention import attention, packed_attention

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
OFFSETS = [0, 20, 20, 21, 45]


def settings(offsets: list[int] | None, length: int, *, window: int = 0, softcap: float = 0.0) -> tuple[Any, ...]:
    """From cu_seqlens_q on."""
    cu = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    sequences = 1 if offsets is None else len(offsets) - 1
    return cu, cu, sequences, length, length, True, window, softcap, 0.25, True


def expected_gradients(
    tensors: tuple[torch.Tensor, ...], dout: torch.Tensor, dlse: torch.Tensor | None, offsets: list[int], **more: Any
) -> tuple[torch.Tensor, ...]:
    """Of q, k, v by fp64 autograd."""
    wide = [x.detach().double().requires_grad_() for x in tensors]
    out, lse = reference(*wide, offsets, offsets, scale=0.25, **more)
    total = (out * dout.double()).sum()
    if dlse is not None:
        total = total + torch.where(lse.isfinite(), lse * dlse.double(), 0.0).sum()
    return torch.autograd.grad(total, wide)


def compare(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], keys: int) -> None:
    """p, dp and ds are rounded to the dtype in front of each product, out once before: five roundings, and fp32 sums.

    A gradient's summands may cancel: the roundings are relative to their size, which sqrt(keys) bounds.
    """
    for name, a, e in zip(("dq", "dk", "dv"), actual, expected, strict=True):
        terms = 5 * keys if a.dtype == torch.float32 else 5 * 4
        assert_close(a, e, terms=terms, magnitude=max(e.abs().max().item(), 1.0), label=name)


@EACH_DTYPE
@pytest.mark.parametrize("offsets", [None, OFFSETS], ids=["one sequence", "documents"])
@pytest.mark.parametrize("more", [{}, {"window": 9}, {"softcap": 2.0}], ids=str)
def test_gradients_match_fp64(dtype: torch.dtype, offsets: list[int] | None, more: dict[str, Any]) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(45, 45, 4, 2, 16, dtype))
    out, lse = attention(q, k, v, *settings(offsets, 45, **more))
    dout, dlse = normal(45, 4, 16, dtype=dtype, seed=7), normal(4, 45, dtype=torch.float32, seed=8)
    actual = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    compare(actual, expected_gradients((q, k, v), dout, dlse, offsets or [0, 45], **more), 45)


@EACH_DTYPE
@pytest.mark.parametrize("offsets", [None, OFFSETS], ids=["one sequence", "documents"])
def test_the_packed_form_equals_the_form_of_three_tensors(dtype: torch.dtype, offsets: list[int] | None) -> None:
    """Bit for bit, also with tokens past the last document, whose gradient is 0."""
    length = 45 if offsets is None else 50
    qkv = normal(length, 4 + 2 + 2, 16, dtype=dtype, seed=3).requires_grad_()
    q, k, v = (x.detach().requires_grad_() for x in qkv.split([4, 2, 2], dim=1))
    packed = packed_attention(qkv, 4, *settings(offsets, length))
    apart = attention(q, k, v, *settings(offsets, length))
    assert torch.equal(packed[0], apart[0]) and torch.equal(packed[1], apart[1])
    dout = normal(length, 4, 16, dtype=dtype, seed=7)
    (dqkv,) = torch.autograd.grad(packed[0], qkv, dout)
    assert torch.equal(dqkv, torch.cat(torch.autograd.grad(apart[0], (q, k, v), dout), dim=1))
    assert torch.equal(dqkv[45:], torch.zeros_like(dqkv[45:]))


@pytest.mark.parametrize("form", ["sum", "strided", "transposed"])
def test_gradients_of_the_output_may_have_any_strides(form: str) -> None:
    """`sum().backward()` gives one element, expanded."""
    q, k, v = (x.requires_grad_() for x in inputs(20, 20, 2, 1, 16, torch.float32))
    out, _ = attention(q, k, v, *settings(None, 20))
    dense = normal(20, 2, 16, dtype=torch.float32, seed=7)
    change: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "sum": lambda x: x.new_ones(()).expand(x.shape),
        "strided": strided,
        "transposed": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    }
    dout = change[form](dense)
    actual = torch.autograd.grad(out, (q, k, v), dout)
    compare(actual, expected_gradients((q, k, v), dout, None, [0, 20]), 20)


@pytest.mark.parametrize("which", ["out", "lse"])
def test_either_result_alone_can_be_differentiated(which: str) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(20, 20, 2, 1, 16, torch.float32))
    out, lse = attention(q, k, v, *settings(None, 20))
    dout, dlse = normal(20, 2, 16, dtype=torch.float32, seed=7), normal(2, 20, dtype=torch.float32, seed=8)
    if which == "out":
        actual = torch.autograd.grad(out, (q, k, v), dout)
        expected = expected_gradients((q, k, v), dout, None, [0, 20])
    else:
        actual = torch.autograd.grad(lse, (q, k, v), dlse)
        expected = expected_gradients((q, k, v), torch.zeros_like(dout), dlse, [0, 20])
    compare(actual, expected, 20)


@pytest.mark.parametrize("asked", [False, True])
def test_deterministic_algorithms_give_the_pass_without_atomics(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    backward = backward_pass.backward

    def spy(*args: Any, deterministic: bool, **kwargs: Any) -> None:
        seen.append(deterministic)
        backward(*args, deterministic=deterministic, **kwargs)

    monkeypatch.setattr(backward_pass, "backward", spy)
    backends = Backends({"attention": "triton"})
    qkv = normal(12, 4, 16, dtype=torch.float32, seed=3).requires_grad_()
    q, k, v = (x.unsqueeze(0) for x in qkv.split([2, 1, 1], dim=1))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(asked)
    try:
        packed = rotary_attention(qkv, None, num_heads=2, batch_size=1, backends=backends)
        (packed.sum() + attention_of_model(q, k, v, backends=backends).sum()).backward()
    finally:
        torch.use_deterministic_algorithms(before)
    assert seen == [asked, asked]


def test_operators_pass_opcheck() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(12, 12, 2, 1, 16, torch.float32))
    for offsets in (None, [0, 5, 12]):
        opcheck(attention, (q, k, v, *settings(offsets, 12)))
    qkv = normal(12, 4, 16, dtype=torch.float32, seed=3).requires_grad_()
    opcheck(packed_attention, (qkv, 2, *settings([0, 5, 12], 12)))


def test_operators_compile_without_a_graph_break() -> None:
    qkv = normal(12, 4, 16, dtype=torch.float32, seed=3).requires_grad_()
    arguments = settings(None, 12)

    def step(qkv: torch.Tensor) -> torch.Tensor:
        out, lse = packed_attention(qkv, 2, *arguments)
        apart, _ = attention(*qkv.split([2, 1, 1], dim=1), *arguments)
        return (out * apart).sum() + lse.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(qkv), step(qkv))
    (actual,), (expected,) = (torch.autograd.grad(f(qkv), qkv) for f in (compiled, step))
    assert_close(actual, expected.double(), terms=4)


def test_a_packed_buffer_that_does_not_split_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="5 packed heads are not 2 of queries"):
        packed_attention(torch.zeros(3, 5, 16), 2, *settings(None, 3))
