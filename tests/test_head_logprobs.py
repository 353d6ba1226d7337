"""Log-probabilities from the lm head's input equal those from whole logits, on any tp, in chunks and in one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from megallm.parallel.grad_sink import GradSink
from megallm.parallel.layout import shard_range
from megallm.parallel.linear import ColumnLinear
from megallm.parallel.logprobs import VocabLogits
from megallm.parallel.mesh import Axis, Mesh
from megallm.testing.pool import run_ranks
from megallm.testing.tolerances import assert_close

T, H = 24, 6
LABELLED = {"all": range(T), "some": (1, 2, 7, 8, 9, 20), "none": ()}
WORLDS = pytest.mark.parametrize("tp", [1, 2, 4])
SP = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["no-sp", "sp"])


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels_of(kind: str, vocab_size: int) -> torch.Tensor:
    every = torch.randint(0, vocab_size, (T,), generator=torch.Generator().manual_seed(2))
    labels = torch.full((T,), -100)
    labels[list(LABELLED[kind])] = every[list(LABELLED[kind])]
    return labels


def dense(vocab_size: int, labels: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Log-probabilities and the gradients of hidden states and weight."""
    hidden, weight = rand(T, H, seed=3).requires_grad_(), rand(vocab_size, H, seed=4).requires_grad_()
    found = torch.log_softmax(hidden @ weight.t(), -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    found = found.masked_fill(labels == -100, 0)
    found.backward(grad)
    assert hidden.grad is not None and weight.grad is not None
    return [found.detach(), hidden.grad, weight.grad]


def check(tp: Axis, vocab_size: int, sequence_parallel: bool, kind: str, rows: int, sinks: bool) -> None:
    labels, grad = labels_of(kind, vocab_size), rand(T, seed=5)
    expected = dense(vocab_size, labels, grad)
    size, start, length = shard_range(vocab_size, tp)
    local = torch.full((size, H), 3.0, dtype=torch.float64)  # rows of padding hold anything
    local[:length] = rand(vocab_size, H, seed=4)[start : start + length]
    head = ColumnLinear(nn.Parameter(local), None, tp=tp, sequence_parallel=sequence_parallel)
    complete: list[str] = []
    if sinks:
        sink = GradSink(torch.full((size, H), torch.nan, dtype=torch.float64), lambda: complete.append("weight"))
        sink.expect(1)
        head.grad_sinks["weight"] = sink
    own = slice(T // tp.size * tp.rank, T // tp.size * (tp.rank + 1)) if sequence_parallel else slice(None)
    hidden = rand(T, H, seed=3)[own].clone().requires_grad_()
    logits = VocabLogits(
        None, vocab_size=vocab_size, tp=tp, hidden=hidden * 1, head=head, chunk_bytes=rows * size * 8
    )  # fmt: skip
    actual = logits.token_logprobs(labels.view(2, T // 2))
    actual.backward(grad.view(2, T // 2))
    weight_grad = sink.buffer if sinks else head.weight.grad
    assert hidden.grad is not None and weight_grad is not None and complete == ["weight"] * sinks
    assert_close(actual.view(-1), expected[0], magnitude=expected[0].abs().max().item() + 1.0, terms=vocab_size)
    assert_close(hidden.grad, expected[1][own], magnitude=20.0, terms=vocab_size)
    assert_close(weight_grad[:length], expected[2][start : start + length], magnitude=20.0, terms=T)
    assert not weight_grad[length:].any()


def check_all(rank: int, world_size: int, sequence_parallel: bool) -> None:
    tp = Mesh.build(tp=world_size).tp
    for vocab_size in (5, 33):
        for kind in LABELLED:
            for rows in (1, 4, 1000):
                for sinks in (False, True):
                    check(tp, vocab_size, sequence_parallel, kind, rows, sinks)


@WORLDS
@SP
def test_log_probabilities_of_hidden_states_match_dense(tp: int, sequence_parallel: bool) -> None:
    run_ranks(check_all, tp, sequence_parallel)


PEAK = """
import sys, torch
from torch import nn
from megallm.monitor.throughput import memory_gib
from megallm.parallel.linear import ColumnLinear
from megallm.parallel.logprobs import VocabLogits
from megallm.parallel.mesh import Mesh
torch.set_num_threads(1)
tokens, hidden, vocabulary = 2048, 16, 128_000
tp = Mesh.build().tp
head = ColumnLinear(nn.Parameter(torch.randn(vocabulary, hidden)), None, tp=tp, sequence_parallel=False)
x, labels = torch.randn(tokens, hidden, requires_grad=True), torch.randint(0, vocabulary, (tokens,))
before = memory_gib()
if sys.argv[1] == "naive":
    torch.log_softmax(head(x), -1).gather(-1, labels.unsqueeze(-1)).sum().backward()
else:
    VocabLogits(None, vocab_size=vocabulary, tp=tp, hidden=x, head=head).token_logprobs(labels).sum().backward()
print(memory_gib() - before)
"""


def test_a_large_vocabulary_is_never_held_for_all_tokens() -> None:
    """Logits and log-softmax of 128 MiB each instead of 1 GiB, and no gradients of the same size."""
    peaks = {}
    for form in ("naive", "chunks"):
        done = subprocess.run([sys.executable, "-c", PEAK, form], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        peaks[form] = float(done.stdout)
    assert peaks["chunks"] < 0.25 * peaks["naive"], peaks
