"""The sharded layers, log-probabilities and autograd pairs against dense torch in fp64, forward and backward.

Letters: T tokens, t tp size. The functions at the top run on every rank and assert there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megallm.parallel import collectives
from megallm.parallel.embedding import VocabEmbedding
from megallm.parallel.grad_sink import GradSink
from megallm.parallel.layout import shard_range
from megallm.parallel.linear import ColumnLinear, RowLinear
from megallm.parallel.logprobs import VocabLogits
from megallm.parallel.mesh import Axis, Mesh
from megallm.testing.pool import run_ranks
from megallm.testing.tolerances import assert_close, tolerance

T, IN, OUT = 12, 20, 28
WORLDS = pytest.mark.parametrize("tp", [1, 2, 4])
SP = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["no-sp", "sp"])


def axis_of(world_size: int) -> Axis:
    return Mesh.build(tp=world_size).tp


def rand(*shape: int, seed: int) -> torch.Tensor:
    """fp64, the same on all ranks."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def part(x: torch.Tensor, tp: Axis, dim: int = 0) -> torch.Tensor:
    return x.chunk(tp.size, dim)[tp.rank].clone()


def attach(layer: nn.Module, has_sinks: bool, uses: int) -> list[str]:
    """Gives the layer's parameters sinks that await `uses` contributions; returns the list of those complete."""
    ready: list[str] = []
    if has_sinks:
        for name, parameter in layer.named_parameters():
            sink = GradSink(torch.full_like(parameter.data, torch.nan), lambda name=name: ready.append(name))
            sink.expect(uses)
            layer.grad_sinks[name] = sink
    return ready


def grad_of(layer: nn.Module, name: str) -> torch.Tensor:
    if name in layer.grad_sinks:
        assert getattr(layer, name).grad is None
        return layer.grad_sinks[name].buffer
    return getattr(layer, name).grad


def check_column(rank: int, world_size: int, sequence_parallel: bool, has_bias: bool, has_sinks: bool) -> None:
    tp = axis_of(world_size)
    weight, bias = rand(OUT, IN, seed=1).requires_grad_(), rand(OUT, seed=2).requires_grad_()
    own_bias = nn.Parameter(part(bias.detach(), tp)) if has_bias else None
    layer = ColumnLinear(nn.Parameter(part(weight.detach(), tp)), own_bias, tp=tp, sequence_parallel=sequence_parallel)
    ready = attach(layer, has_sinks, uses=2)
    for microbatch in range(2):
        x = rand(T, IN, seed=10 + microbatch).requires_grad_()
        dy = rand(T, OUT, seed=20 + microbatch)
        expected = F.linear(x, weight, bias if has_bias else None)
        expected.backward(dy)
        own_x = (part(x.detach(), tp) if sequence_parallel else x.detach().clone()).requires_grad_()
        assert ready == []
        actual = layer(own_x)
        actual.backward(part(dy, tp, dim=1))
        assert_close(actual, part(expected.detach(), tp, dim=1), terms=IN, label="y")
        assert_close(own_x.grad, part(x.grad, tp) if sequence_parallel else x.grad, terms=OUT, label="dx")
    assert_close(grad_of(layer, "weight"), part(weight.grad, tp), terms=2 * T, label="dw")
    if has_bias:
        assert_close(grad_of(layer, "bias"), part(bias.grad, tp), terms=2 * T, label="db")
    assert sorted(ready) == (sorted(["weight"] + ["bias"] * has_bias) if has_sinks else [])


def check_row(rank: int, world_size: int, sequence_parallel: bool, has_bias: bool, has_sinks: bool) -> None:
    tp = axis_of(world_size)
    weight, bias = rand(OUT, IN, seed=1).requires_grad_(), rand(OUT, seed=2).requires_grad_()
    own_bias = nn.Parameter(bias.detach().clone()) if has_bias else None
    layer = RowLinear(
        nn.Parameter(part(weight.detach(), tp, dim=1)), own_bias, tp=tp, sequence_parallel=sequence_parallel
    )
    ready = attach(layer, has_sinks, uses=2)
    for microbatch in range(2):
        y = rand(T, IN, seed=10 + microbatch).requires_grad_()
        dz = rand(T, OUT, seed=20 + microbatch)
        expected = F.linear(y, weight, bias if has_bias else None)
        expected.backward(dz)
        own_y = part(y.detach(), tp, dim=1).requires_grad_()
        assert ready == []
        actual = layer(own_y)
        actual.backward(part(dz, tp) if sequence_parallel else dz)
        assert_close(actual, part(expected.detach(), tp) if sequence_parallel else expected, terms=IN, label="z")
        assert_close(own_y.grad, part(y.grad, tp, dim=1), terms=OUT, label="dy")
    assert_close(grad_of(layer, "weight"), part(weight.grad, tp, dim=1), terms=2 * T, label="dw")
    if has_bias:
        total = grad_of(layer, "bias").clone()
        if sequence_parallel and world_size > 1:  # each rank's is of its own tokens
            dist.all_reduce(total)
        assert_close(total, bias.grad, terms=2 * T, label="db")
    assert sorted(ready) == (sorted(["weight"] + ["bias"] * has_bias) if has_sinks else [])


def check_embedding(rank: int, world_size: int, sequence_parallel: bool, vocab_size: int, has_sinks: bool) -> None:
    tp = axis_of(world_size)
    weight = rand(vocab_size, IN, seed=1).requires_grad_()
    size, start, length = shard_range(vocab_size, tp)
    own = torch.full((size, IN), 1e6, dtype=torch.float64)  # padding that must never be seen
    own[:length] = weight.detach()[start : start + length]
    layer = VocabEmbedding(nn.Parameter(own), tp=tp, sequence_parallel=sequence_parallel)
    ready = attach(layer, has_sinks, uses=2)
    for microbatch in range(2):
        ids = torch.randint(0, vocab_size, (T,), generator=torch.Generator().manual_seed(microbatch))
        dy = rand(T, IN, seed=20 + microbatch)
        expected = F.embedding(ids, weight)
        expected.backward(dy)
        actual = layer(ids)
        actual.backward(part(dy, tp) if sequence_parallel else dy)
        assert torch.equal(actual, part(expected.detach(), tp) if sequence_parallel else expected)
    grad = grad_of(layer, "weight")
    assert_close(grad[:length], weight.grad[start : start + length], terms=2 * T, label="dw")
    assert not grad[length:].any()
    assert ready == (["weight"] if has_sinks else [])


def check_logprobs(rank: int, world_size: int, vocab_size: int, scale: float, dtype: torch.dtype) -> None:
    tp = axis_of(world_size)
    logits = (rand(T, vocab_size, seed=1) * scale).to(dtype).double().requires_grad_()
    labels = torch.randint(0, vocab_size, (T,), generator=torch.Generator().manual_seed(2))
    labels[0], labels[1] = 0, vocab_size - 1
    labels[[3, 4, T - 1]] = -100
    grad = rand(T, seed=3)  # of either sign
    expected = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = expected.masked_fill(labels == -100, 0)
    expected.backward(grad)
    size, start, length = shard_range(vocab_size, tp)
    local = torch.full((T, size), 7.0 * scale, dtype=dtype)  # padding columns hold anything
    local[:, :length] = logits.detach()[:, start : start + length].to(dtype)
    local.requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    actual = VocabLogits(local * 1, vocab_size=vocab_size, tp=tp).token_logprobs(labels.view(3, T // 3))
    assert actual.dtype == wide and actual.shape == (3, T // 3)
    actual.backward(grad.to(wide).view(3, T // 3))
    # A logarithm of a sum of V terms plus numbers of the logits' size; its error is the relative error of exp.
    error = tolerance(wide, magnitude=2 * logits.detach().abs().max().item() + 1.0, terms=vocab_size)
    assert (actual.view(-1).double() - expected).abs().max() <= error
    assert not actual.view(-1)[labels == -100].any()
    allowed = grad.abs().max().item() * (error + 2 * torch.finfo(dtype).eps)
    assert ((local.grad[:, :length].double() - logits.grad[:, start : start + length]).abs() <= allowed).all()
    assert not local.grad[:, length:].any()
    assert not local.grad[labels == -100].any()


def check_gathered(rank: int, world_size: int, vocab_size: int) -> None:
    tp = axis_of(world_size)
    logits = rand(T, vocab_size, seed=1)
    size, start, length = shard_range(vocab_size, tp)
    local = torch.full((T, size), torch.nan, dtype=torch.float64)
    local[:, :length] = logits[:, start : start + length]
    assert torch.equal(VocabLogits(local, vocab_size=vocab_size, tp=tp).gathered(), logits.float())


Pair = Callable[[torch.Tensor, Axis], torch.Tensor]
PAIRS: dict[str, tuple[Pair, bool, bool]] = {  # the pair, is its input equal on all ranks, is its output
    "copy_to": (collectives.copy_to, True, False),
    "reduce_from": (collectives.reduce_from, False, True),
    "gather_sequence": (collectives.gather_sequence, False, False),
    "scatter_sequence_sum": (collectives.scatter_sequence_sum, False, False),
    "split_sequence": (collectives.split_sequence, True, False),
    "join_sequence": (collectives.join_sequence, False, True),
}


def check_adjoint(rank: int, world_size: int, name: str) -> None:
    """<A x, y> = <x, A^T y>; what is equal on all ranks is one vector and counts once."""
    tp = axis_of(world_size)
    pair, is_input_equal, is_output_equal = PAIRS[name]
    x = rand(8, 3, seed=1 if is_input_equal else 10 + rank).requires_grad_()
    before = x.detach().clone()
    out = pair(x, tp)
    y = rand(*out.shape, seed=2 if is_output_equal else 20 + rank)
    y_before = y.clone()
    out.backward(y)
    assert torch.equal(x.detach(), before) and torch.equal(y, y_before), "an input was overwritten"
    left, right = inner(out.detach(), y, tp, is_output_equal), inner(x.detach(), x.grad, tp, is_input_equal)
    assert_close(left, right, magnitude=30.0, terms=8 * 3 * world_size * world_size)


def inner(a: torch.Tensor, b: torch.Tensor, tp: Axis, is_equal: bool) -> torch.Tensor:
    total = (a * b).sum()
    if tp.size > 1:
        dist.all_reduce(total)
    return total / tp.size if is_equal else total


def check_pairs_compose(rank: int, world_size: int) -> None:
    """Sharding and joining again is the identity, both ways; a replicated value sums to size times itself."""
    tp = axis_of(world_size)
    x = rand(8, 3, seed=1)
    assert torch.equal(collectives.join_sequence(collectives.split_sequence(x, tp), tp), x)
    assert torch.equal(collectives.gather_sequence(collectives.split_sequence(x, tp), tp), x)
    assert_close(collectives.scatter_sequence_sum(x, tp), part(x, tp) * tp.size, terms=tp.size)
    assert_close(collectives.reduce_from(x, tp), x * tp.size, terms=tp.size)
    strided = rand(3, 8, seed=2).t()
    assert_close(collectives.reduce_from(strided, tp), strided * tp.size, terms=tp.size)
    assert torch.equal(collectives.gather_sequence(part(strided, tp), tp), strided)


def check_all(rank: int, world_size: int, check: str, options: list[tuple[object, ...]]) -> None:
    """One call of the pool for all options: it costs more than a check does."""
    for each in options:
        try:
            globals()[check](rank, world_size, *each)
        except AssertionError as error:
            raise AssertionError(f"{check}{each}: {error}") from error


def run(check: Callable[..., None], tp: int, *options: Sequence[object]) -> None:
    """Calls check(rank, tp, ...) on every rank with the product of all options."""
    combinations = list(itertools.product(*options))
    if tp == 1:
        check_all(0, 1, check.__name__, combinations)
    else:
        run_ranks(check_all, tp, check.__name__, combinations)


BOTH = (False, True)


@WORLDS
@SP
def test_column_parallel_matches_dense(tp: int, sequence_parallel: bool) -> None:
    """With and without bias, through autograd and into sinks."""
    run(check_column, tp, [sequence_parallel], BOTH, BOTH)


@WORLDS
@SP
def test_row_parallel_matches_dense(tp: int, sequence_parallel: bool) -> None:
    """With and without bias, through autograd and into sinks."""
    run(check_row, tp, [sequence_parallel], BOTH, BOTH)


@WORLDS
@SP
def test_vocab_embedding_matches_dense(tp: int, sequence_parallel: bool) -> None:
    """Five rows on four ranks: the last holds padding only. Through autograd and into sinks."""
    run(check_embedding, tp, [sequence_parallel], [5, 101], BOTH)


@WORLDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_token_logprobs_match_log_softmax(tp: int, scale: float, dtype: torch.dtype) -> None:
    run(check_logprobs, tp, [5, 101], [scale], [dtype])


@WORLDS
def test_gathered_logits_are_the_columns_without_padding(tp: int) -> None:
    run(check_gathered, tp, [5, 101])


@WORLDS
def test_backward_of_every_pair_is_the_adjoint_of_its_forward(tp: int) -> None:
    run(check_adjoint, tp, list(PAIRS))


@WORLDS
def test_sharding_and_joining_undo_each_other(tp: int) -> None:
    run(check_pairs_compose, tp)


def test_a_sink_of_a_bf16_weight_accumulates_in_fp32() -> None:
    """Products of bf16 numbers are exact in fp32; only their sum of T terms is rounded."""
    weight = nn.Parameter(rand(OUT, IN, seed=1).bfloat16())
    layer = ColumnLinear(weight, None, tp=axis_of(1), sequence_parallel=False)
    sink = GradSink(torch.empty(OUT, IN), lambda: None)
    sink.expect(3)
    layer.grad_sinks["weight"] = sink
    expected = torch.zeros(OUT, IN, dtype=torch.float64)
    for microbatch in range(3):
        x, dy = rand(T, IN, seed=microbatch).bfloat16(), rand(T, OUT, seed=9 + microbatch).bfloat16()
        layer(x).backward(dy)
        expected += dy.double().t() @ x.double()
    assert_close(sink.buffer, expected, terms=3 * T)
