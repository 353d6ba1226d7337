"""Sorting rows by expert and back against fp64 torch, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, normal, run_alone, strided
from torch.library import opcheck

from megallm.testing.tolerances import assert_close
from megallm_kernels import permute as kernel

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def expert_ids(tokens: int, slots: int, experts: int, *, seed: int = 0, dropped: bool = False) -> torch.Tensor:
    """[T, k] numbers; expert 1 gets none; `dropped`: some are -1."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1 if dropped else 0, experts, (tokens, slots), generator=generator)
    return torch.where(ids == 1, 0, ids)


def gathered(x: torch.Tensor, order: kernel.ExpertOrder) -> torch.Tensor:
    """The rows of x [T, H] by plain indexing."""
    source = order.source.long()
    return torch.where((source >= 0)[:, None], x[source.clamp(min=0) // order.destination.size(1)], 0.0)


def combined(rows: torch.Tensor, order: kernel.ExpertOrder, weights: torch.Tensor | None) -> torch.Tensor:
    """The weighted sum by plain indexing."""
    at = order.destination.long()
    picked = torch.where((at >= 0)[..., None], rows[at.clamp(min=0)], 0.0)  # [T, k, H]
    return (picked if weights is None else picked * weights[..., None]).sum(1)


def check(
    order: kernel.ExpertOrder, x: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor | None,
    dy: torch.Tensor, drows: torch.Tensor,
) -> None:  # fmt: skip
    """Both operations and their gradients equal the reference's in fp64 on the same rounded numbers."""
    slots, hidden = order.destination.size(1), x.size(1)
    own, wide = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    permuted = kernel.permute(own, order.source, order.destination)
    assert torch.equal(permuted.double(), gathered(wide, order))  # a copy
    (dx,) = torch.autograd.grad(permuted, own, drows)
    (wanted,) = torch.autograd.grad(gathered(wide, order), wide, drows.double())
    assert dx.dtype == x.dtype
    # k terms in fp32, one rounding in x's dtype; two roundings of each product with a weight
    terms = 3 if x.dtype != torch.float32 else 3 * slots
    assert_close(dx, wanted, terms=terms, label="dx")
    inputs = [rows] if weights is None else [rows, weights]
    owned = [t.detach().requires_grad_() for t in inputs]
    wider = [t.detach().double().requires_grad_() for t in inputs]
    y = kernel.unpermute(owned[0], order.source, order.destination, None if weights is None else owned[1])
    expected = combined(wider[0], order, None if weights is None else wider[1])
    assert y.dtype == rows.dtype
    assert_close(y, expected, terms=terms, label="y")
    actual, wanted_grads = torch.autograd.grad(y, owned, dy), torch.autograd.grad(expected, wider, dy.double())
    assert_close(actual[0], wanted_grads[0], terms=3, label="drows")
    if weights is not None:  # H products summed in fp32
        assert actual[1].dtype == weights.dtype
        assert_close(actual[1], wanted_grads[1], terms=2 * hidden, label="dweights")


def tensors(order: kernel.ExpertOrder, hidden: int, dtype: torch.dtype, scale: float = 1.0) -> list[torch.Tensor]:
    """x, rows, weights, dy, drows."""
    (tokens, slots), rows = order.destination.shape, order.source.numel()
    shapes = ((tokens, hidden), (rows, hidden), (tokens, slots), (tokens, hidden), (rows, hidden))
    out = [normal(*s, dtype=dtype, seed=i, scale=scale) for i, s in enumerate(shapes)]
    out[2] = normal(tokens, slots, dtype=torch.float32, seed=2)
    return out


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("tokens", "slots", "experts"), [(1, 1, 1), (37, 2, 5), (16, 8, 11), (0, 2, 4), (3, 2, 70)])
def test_the_order_is_that_of_a_loop_over_experts(
    tokens: int, slots: int, experts: int, dropped: bool, multiple: int
) -> None:
    ids = expert_ids(tokens, slots, experts, dropped=dropped)
    order = kernel.sort_by_expert(ids, experts, multiple=multiple)
    flat, row = ids.flatten().tolist(), 0
    source, destination, counts, offsets = [-1] * order.source.numel(), [-1] * len(flat), [], [0]
    for expert in range(experts):
        mine = [i for i, e in enumerate(flat) if e == expert]
        for i, slot in enumerate(mine):
            source[row + i], destination[slot] = slot, row + i
        row += -(-len(mine) // multiple) * multiple
        counts.append(len(mine))
        offsets.append(row)
    assert order.source.tolist() == source
    assert order.destination.flatten().tolist() == destination and order.destination.shape == ids.shape
    assert order.counts.tolist() == counts and order.offsets.tolist() == offsets
    assert all(t.dtype == torch.int32 for t in order)


@pytest.mark.parametrize(("dtype", "experts"), [(torch.int8, 128), (torch.uint8, 300), (torch.int16, 40000)], ids=str)
def test_expert_numbers_may_be_of_a_dtype_that_does_not_hold_the_number_of_experts(
    dtype: torch.dtype, experts: int
) -> None:
    ids = torch.tensor([[0, 1], [3, 120], [7, 100]])
    narrow, wide = (kernel.sort_by_expert(each, experts) for each in (ids.to(dtype), ids))
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_numbers_past_the_last_expert_are_dropped() -> None:
    order = kernel.sort_by_expert(torch.tensor([[0, 7], [3, 2]]), 3)
    assert order.destination.tolist() == [[0, -1], [-1, 1]] and order.source.tolist() == [0, 3, -1, -1]


@EACH_DTYPE
@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted"])
@pytest.mark.parametrize(("tokens", "slots", "hidden"), [(1, 1, 16), (37, 2, 5), (13, 8, 128), (2, 3, 2500)])
def test_permute_and_unpermute_match_fp64(
    dtype: torch.dtype, weighted: bool, tokens: int, slots: int, hidden: int
) -> None:
    order = kernel.sort_by_expert(expert_ids(tokens, slots, 7), 7)
    x, rows, weights, dy, drows = tensors(order, hidden, dtype)
    check(order, x, rows, weights if weighted else None, dy, drows)


@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted"])
@pytest.mark.parametrize("multiple", [1, 16])
def test_dropped_slots_and_padding_contribute_nothing(weighted: bool, multiple: int) -> None:
    order = kernel.sort_by_expert(expert_ids(70, 3, 5, dropped=True), 5, multiple=multiple)
    x, rows, weights, dy, drows = tensors(order, 24, torch.bfloat16)
    rows[order.source < 0] = float("nan")  # never read
    weights[order.destination < 0] = float("nan")
    drows[order.source < 0] = float("nan")
    own_rows, own_weights = rows.requires_grad_(), weights.requires_grad_()
    y = kernel.unpermute(own_rows, order.source, order.destination, own_weights if weighted else None)
    y.backward(dy)
    assert y.isfinite().all() and own_rows.grad is not None
    assert torch.equal(own_rows.grad[order.source < 0], torch.zeros_like(own_rows.grad[order.source < 0]))
    if weighted:
        assert own_weights.grad is not None and (own_weights.grad[order.destination < 0] == 0).all()
    clean = [torch.where(t.detach().isnan(), 0.0, t.detach()) for t in (rows, weights, drows)]
    check(order, x, clean[0], clean[1] if weighted else None, dy, clean[2])


def test_a_token_dropped_by_all_its_experts_gives_zeros() -> None:
    order = kernel.sort_by_expert(torch.tensor([[-1, -1], [0, 1]]), 2)
    rows = torch.ones(4, 8)
    y = kernel.unpermute(rows, order.source, order.destination, torch.ones(2, 2))
    assert torch.equal(y, torch.tensor([[0.0], [2.0]]).expand(2, 8))


@pytest.mark.parametrize("form", ["strided", "transposed", "expanded", "sliced"])
def test_any_strides_of_inputs_and_gradients_are_taken(form: str) -> None:
    order = kernel.sort_by_expert(expert_ids(6, 2, 4), 4)
    x, rows, weights, dy, drows = tensors(order, 10, torch.float32)
    change = {
        "strided": strided,
        "transposed": lambda t: t.t().contiguous().t(),
        "expanded": lambda t: t[:1].expand(t.shape),
        "sliced": lambda t: torch.cat([t, t], 1)[:, : t.size(1)],
    }[form]
    check(order, change(x), change(rows), change(weights), change(dy), change(drows))


def test_a_sum_as_loss_gives_an_expanded_gradient() -> None:
    order = kernel.sort_by_expert(expert_ids(9, 2, 4), 4)
    x, rows, weights, dy, drows = tensors(order, 12, torch.float32)
    ones = torch.ones(())
    check(order, x, rows, weights, ones.expand(dy.shape), ones.expand(drows.shape))


@EACH_DTYPE
@pytest.mark.parametrize("scale", [3.0, 100.0])
def test_large_numbers_are_summed_in_fp32(dtype: torch.dtype, scale: float) -> None:
    order = kernel.sort_by_expert(expert_ids(9, 8, 16), 16)
    x, rows, weights, dy, drows = tensors(order, 64, dtype, scale)
    check(order, x, rows, weights, dy, drows)


def test_rows_longer_than_a_tile_are_walked_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_BACKWARD", ((64, 128, 4),))
    order = kernel.sort_by_expert(expert_ids(5, 2, 3, dropped=True), 3, multiple=4)
    x, rows, weights, dy, drows = tensors(order, 150, torch.float32)
    check(order, x, rows, weights, dy, drows)


def test_weights_of_two_bytes_are_taken() -> None:
    order = kernel.sort_by_expert(expert_ids(5, 2, 3), 3)
    x, rows, weights, dy, drows = tensors(order, 32, torch.bfloat16)
    check(order, x, rows, weights.bfloat16(), dy, drows)


def test_no_tokens_give_no_rows() -> None:
    order = kernel.sort_by_expert(torch.zeros(0, 2, dtype=torch.long), 3, multiple=4)
    x = torch.zeros(0, 8, requires_grad=True)
    rows = kernel.permute(x, order.source, order.destination)
    assert torch.equal(rows, torch.zeros(order.source.numel(), 8))
    y = kernel.unpermute(rows, order.source, order.destination, torch.zeros(0, 2))
    y.sum().backward()
    assert y.shape == (0, 8) and x.grad is not None and x.grad.shape == (0, 8)


def test_both_repeat_bit_for_bit() -> None:
    order = kernel.sort_by_expert(expert_ids(33, 4, 6), 6)
    _, rows, weights, dy, _ = tensors(order, 40, torch.float32)
    arguments = (dy, rows, order.source, order.destination, weights, True)
    runs = [kernel.unpermute_backward(*arguments) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert torch.equal(*(kernel.permute_backward(rows, order.destination) for _ in range(2)))


def test_shapes_that_do_not_fit_are_refused_in_words() -> None:
    order = kernel.sort_by_expert(expert_ids(4, 2, 3), 3)
    with pytest.raises(ValueError, match="x has 5 tokens, destination 4"):
        kernel.permute(torch.zeros(5, 8), order.source, order.destination)
    with pytest.raises(ValueError, match="rows are \\[R, H\\], weights \\[T, k\\]"):
        kernel.unpermute(torch.zeros(7, 8), order.source, order.destination, None)
    with pytest.raises(ValueError, match="must be at least 1"):
        kernel.sort_by_expert(expert_ids(4, 2, 3), 3, multiple=0)


def test_ops_pass_opcheck() -> None:
    order = kernel.sort_by_expert(expert_ids(4, 2, 3, dropped=True), 3)
    x, rows, weights, _, _ = (t.requires_grad_() for t in tensors(order, 8, torch.float32))
    opcheck(kernel.permute, (x, order.source, order.destination))
    opcheck(kernel.unpermute, (rows, order.source, order.destination, weights))
    opcheck(kernel.unpermute, (rows, order.source, order.destination, None))


def test_ops_compile_without_graph_breaks() -> None:
    ids = expert_ids(4, 2, 3)
    x, weights = torch.randn(4, 8, requires_grad=True), torch.rand(4, 2, requires_grad=True)

    def loss(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        order = kernel.sort_by_expert(ids, 3, multiple=4)
        rows = kernel.permute(x, order.source, order.destination)
        return kernel.unpermute(rows * rows, order.source, order.destination, weights).sum()

    eager = torch.autograd.grad(loss(x, weights), (x, weights))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, e in zip(torch.autograd.grad(compiled(x, weights), (x, weights)), eager, strict=True):
        assert torch.equal(a, e)


def test_rows_2_to_the_30_elements_apart_are_found() -> None:
    run_alone("""
import torch
from megallm.testing.triton_interpreter import repair_bf16
repair_bf16()

def far(*shape):  # [3, *shape], rows 2^30 elements apart over untouched memory: 2 * 2^30 is past int32
    buffer = torch.empty(2**31 + 2**12, dtype=torch.float16)
    rows = buffer.as_strided((3, *shape), (2**30, *torch.empty(shape).stride()))
    return rows.normal_(generator=torch.Generator().manual_seed(1))

from megallm_kernels import permute as kernel
order = kernel.sort_by_expert(torch.tensor([[2], [1], [0]]), 3)
x = far(32)
near = x.contiguous()
assert torch.equal(kernel.permute(x, order.source, order.destination), near.flip(0))
weights = torch.tensor([[2.0], [3.0], [4.0]])
expected = kernel.unpermute(near, order.source, order.destination, weights)
assert torch.equal(kernel.unpermute(x, order.source, order.destination, weights), expected)
at = (order.source, order.destination, weights, True)
for a, e in zip(kernel.unpermute_backward(x, x, *at), kernel.unpermute_backward(near, near, *at)):
    assert torch.equal(a, e)
""")
