"""Entropies beside log-probabilities, and temperatures: equal to dense softmax on any tp, in chunks and in one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megallm.ops.backends import Backends
from megallm.parallel import plain_losses
from megallm.parallel.grad_sink import GradSink
from megallm.parallel.layout import shard_range
from megallm.parallel.linear import ColumnLinear
from megallm.parallel.logprobs import VocabLogits
from megallm.parallel.mesh import Axis, Mesh
from megallm.testing.pool import run_ranks

T, H = 24, 6
LABELLED = {"all": range(T), "some": (1, 2, 7, 8, 9, 20), "none": ()}
WORLDS = pytest.mark.parametrize("tp", [1, 2, 4])
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels_of(kind: str, vocab_size: int) -> torch.Tensor:
    every = torch.randint(0, vocab_size, (T,), generator=torch.Generator().manual_seed(2))
    labels = torch.full((T,), -100)
    labels[list(LABELLED[kind])] = every[list(LABELLED[kind])]
    return labels


def dense(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies [T] of logits [T, V]."""
    logprobs, ignored = torch.log_softmax(logits, -1), labels == -100
    found = logprobs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return found.masked_fill(ignored, 0), -(logprobs.exp() * logprobs).sum(-1).masked_fill(ignored, 0)


def weights_of(vocab_size: int, tp: Axis) -> tuple[torch.Tensor, int, int]:
    """(this rank's rows of the lm head, with anything in the padding; where they begin; how many are none)."""
    size, start, length = shard_range(vocab_size, tp)
    local = torch.full((size, H), 3.0, dtype=torch.float64)
    local[:length] = rand(vocab_size, H, seed=4)[start : start + length]
    return local, start, length


def check_hidden(tp: Axis, vocab_size: int, kind: str, rows: int, sequence_parallel: bool, temperature: object) -> None:
    labels, grads = labels_of(kind, vocab_size), (rand(T, seed=5), rand(T, seed=6))
    x, weight = rand(T, H, seed=3).requires_grad_(), rand(vocab_size, H, seed=4).requires_grad_()
    divisor = temperature.unsqueeze(1) if isinstance(temperature, torch.Tensor) else temperature
    expected = dense(x @ weight.t() / divisor, labels)
    torch.autograd.backward(expected, grads)

    local, start, length = weights_of(vocab_size, tp)
    head = ColumnLinear(nn.Parameter(local), None, tp=tp, sequence_parallel=sequence_parallel)
    sink = GradSink(torch.full_like(local, torch.nan), lambda: None)
    sink.expect(1)
    if rows == 4:  # both ways a weight's gradient goes
        head.grad_sinks["weight"] = sink
    own = slice(T // tp.size * tp.rank, T // tp.size * (tp.rank + 1)) if sequence_parallel else slice(None)
    hidden = rand(T, H, seed=3)[own].clone().requires_grad_()

    def logits() -> VocabLogits:
        return VocabLogits(
            None, vocab_size=vocab_size, tp=tp, hidden=hidden * 1, head=head, chunk_bytes=rows * len(local) * 8
        ).tempered(temperature)  # fmt: skip  # type: ignore[arg-type]

    with torch.no_grad():
        unneeded = logits().logprobs_and_entropy(labels)
        alone = logits().token_logprobs(labels)
    actual = logits().logprobs_and_entropy(labels.view(2, T // 2))
    torch.autograd.backward(actual, [grad.view(2, T // 2) for grad in grads])
    weight_grad = sink.buffer if rows == 4 else head.weight.grad
    assert hidden.grad is not None and weight_grad is not None and x.grad is not None and weight.grad is not None
    for found, wanted, without in zip(actual, expected, unneeded, strict=True):
        assert found.shape == (2, T // 2) and torch.equal(found.view(-1), without)
        torch.testing.assert_close(found.view(-1), wanted, **CLOSE)
        assert not found.view(-1)[labels == -100].any()
    torch.testing.assert_close(alone, expected[0], **CLOSE)
    torch.testing.assert_close(hidden.grad, x.grad[own], **CLOSE)
    torch.testing.assert_close(weight_grad[:length], weight.grad[start : start + length], **CLOSE)
    assert not weight_grad[length:].any()


def check_all_hidden(rank: int, world_size: int, sequence_parallel: bool) -> None:
    tp = Mesh.build(tp=world_size).tp
    for vocab_size in (5, 33):  # with tp 4 a rank has nothing but padding of the 5
        for kind in LABELLED:
            for rows in (1, 4, 1000):
                check_hidden(tp, vocab_size, kind, rows, sequence_parallel, 1.0)
        check_hidden(tp, vocab_size, "some", 4, sequence_parallel, 0.7)
        check_hidden(tp, vocab_size, "some", 4, sequence_parallel, 0.5 + rand(T, seed=7).abs())


@WORLDS
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["no-sp", "sp"])
def test_entropies_of_hidden_states_match_dense(tp: int, sequence_parallel: bool) -> None:
    run_ranks(check_all_hidden, tp, sequence_parallel)


def check_logits(rank: int, world_size: int, vocab_size: int, scale: float) -> None:
    """Logits that are there; with a large scale nearly all probabilities are 0 and the entropy is one of few tokens."""
    tp = Mesh.build(tp=world_size).tp
    logits, labels = (rand(T, vocab_size, seed=1) * scale).requires_grad_(), labels_of("some", vocab_size)
    with torch.no_grad():
        logits[1], logits[7, 2:] = -scale, -1e6  # all equal; nearly nothing but two
    grads = rand(T, seed=5), rand(T, seed=6)
    expected = dense(logits, labels)
    torch.autograd.backward(expected, grads)
    size, start, length = shard_range(vocab_size, tp)
    local = torch.full((T, size), 7.0 * scale, dtype=torch.float64)
    local[:, :length] = logits.detach()[:, start : start + length]
    local.requires_grad_()
    actual = VocabLogits(local * 1, vocab_size=vocab_size, tp=tp).logprobs_and_entropy(labels)
    torch.autograd.backward(actual, grads)
    assert logits.grad is not None and local.grad is not None
    error = 1e-12 + 1e-15 * scale  # a logit's own rounding
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=error)
    torch.testing.assert_close(
        local.grad[:, :length], logits.grad[:, start : start + length], rtol=1e-12, atol=10 * error
    )
    assert not local.grad[:, length:].any()


@WORLDS
@pytest.mark.parametrize("vocab_size", [5, 33])
@pytest.mark.parametrize("scale", [1.0, 50.0, 1e4])
def test_entropies_of_logits_match_dense(tp: int, vocab_size: int, scale: float) -> None:
    run_ranks(check_logits, tp, vocab_size, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tokens_that_cannot_come_add_nothing(dtype: torch.dtype) -> None:
    """-inf, and logits as far apart as the dtype allows: entropy and gradients stay finite and right."""
    logits = torch.zeros(3, 5, dtype=dtype)
    logits[0, 2:], logits[1, 0] = -torch.inf, torch.finfo(dtype).max / 4
    logits[2, 1:] = torch.finfo(dtype).min
    local = logits.clone().requires_grad_()
    labels = torch.tensor([0, 0, 0])
    logprobs, entropy = VocabLogits(local * 1, vocab_size=5, tp=Mesh.build().tp).logprobs_and_entropy(labels)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert entropy.tolist() == pytest.approx([0.6931472, 0.0, 0.0], abs=1e-6)
    assert logprobs.tolist() == pytest.approx([-0.6931472, 0.0, 0.0], abs=1e-6)
    torch.autograd.backward((logprobs, entropy), [torch.ones(3), torch.full((3,), -100.0)])
    assert local.grad is not None and local.grad.isfinite().all()
    assert local.grad[0].tolist() == pytest.approx([0.5, -0.5, 0.0, 0.0, 0.0], abs=1e-4)


def test_logits_that_overflow_add_nothing_in_chunks_either() -> None:
    """Backward makes them once more: -1e40 is -inf in fp32."""
    weight = nn.Parameter(torch.tensor([[0.0], [0.0], [-1e20]]))
    head = ColumnLinear(weight, None, tp=Mesh.build().tp, sequence_parallel=False)
    hidden = torch.full((2, 1), 1e20, requires_grad=True)
    logits = VocabLogits(None, vocab_size=3, tp=Mesh.build().tp, hidden=hidden, head=head, chunk_bytes=1)
    found = logits.logprobs_and_entropy(torch.tensor([0, 1]))
    torch.autograd.backward(found, [torch.ones(2), torch.ones(2)])
    assert found[1].tolist() == pytest.approx([0.6931472] * 2) and hidden.grad is not None
    assert hidden.grad.tolist() == [[0.0], [0.0]] and weight.grad is not None and weight.grad.isfinite().all()


def count_gathers(rank: int, world_size: int) -> list[tuple[int, ...]]:
    """Shapes of what is gathered for log-probabilities alone, and for both."""
    tp, shapes = Mesh.build(tp=world_size).tp, []
    plain = plain_losses.all_gather

    def recorded(x: torch.Tensor, axis: Axis) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return plain(x, axis)

    plain_losses.all_gather = recorded
    try:
        local = weights_of(33, tp)[0]
        for entropy in (False, True):
            head = ColumnLinear(nn.Parameter(local.clone()), None, tp=tp, sequence_parallel=False)
            x = rand(T, H, seed=3).requires_grad_()
            logits = VocabLogits(None, vocab_size=33, tp=tp, hidden=x, head=head, chunk_bytes=5 * 8 * len(local))
            labels = labels_of("some", 33)
            found = logits.logprobs_and_entropy(labels)[1] if entropy else logits.token_logprobs(labels)
            found.sum().backward()
    finally:
        plain_losses.all_gather = plain
    return shapes


def test_one_number_more_is_gathered_for_each_labelled_token() -> None:
    for shapes in run_ranks(count_gathers, 2):
        assert shapes == [(2, len(LABELLED["some"])), (3, len(LABELLED["some"]))]


def test_a_temperature_of_one_changes_nothing_and_zero_is_refused() -> None:
    logits = VocabLogits(rand(3, 5, seed=1), vocab_size=5, tp=Mesh.build().tp, backends=Backends({}))
    assert logits.tempered(1.0) is logits
    assert torch.equal(logits.tempered(0.25).gathered(), (rand(3, 5, seed=1) / 0.25).float())
    for temperature in (0.0, -1.0):
        with pytest.raises(ValueError, match="not above 0"):
            logits.tempered(temperature)
