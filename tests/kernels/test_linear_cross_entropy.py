"""The lm head fused with its loss against plain torch in fp64: one rank, simulated ranks, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from megallm.testing.tolerances import assert_close
from megallm_kernels import linear_cross_entropy as lce
from megallm_kernels import linear_cross_entropy_chunks as chunks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IGNORED = lce.IGNORE_INDEX
H = 24


def example(num_tokens: int, vocab_size: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    """(hidden [T, H], weight [V, H], labels [T] with every fifth ignored); logits of about unit size times 2."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, H, generator=generator).to(dtype)
    weight = (torch.randn(vocab_size, H, generator=generator) * (2 / H**0.5)).to(dtype)
    labels = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    labels[2::5] = IGNORED
    return hidden, weight, labels


def reference(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, smoothing=0.0, z_loss=0.0):
    """(loss, lse, entropy) [T] in fp64."""
    x, kept = hidden.double() @ weight.double().t(), labels != IGNORED
    log_p = x.log_softmax(-1)
    lse = x.logsumexp(-1)
    at_label = log_p.gather(1, labels.masked_fill(~kept, 0)[:, None])[:, 0]
    loss = -(1 - smoothing) * at_label - smoothing * log_p.mean(-1) + z_loss * lse**2
    entropy = -(log_p.exp() * log_p).sum(-1)
    return tuple(each.masked_fill(~kept, 0) for each in (loss, lse, entropy))


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [each.detach().clone().requires_grad_() for each in tensors]


def assert_gradients_close(found: list[torch.Tensor], exact: list[torch.Tensor], *, dlogits: float) -> None:
    """hidden's, then weight's. Logits and dlogits, of at most that size, are rounded to the dtype before they are
    summed: dhidden over V columns with weights below 2, dweight over T tokens with hidden below 4."""
    (hidden, weight), (wide_hidden, wide_weight) = found, exact
    for own, right, terms, size in ((hidden, wide_hidden, len(weight), 2.0), (weight, wide_weight, len(hidden), 4.0)):
        assert own.grad is not None and right.grad is not None
        largest = max(right.grad.abs().max().item(), dlogits * size) if own.numel() else 0.0
        # below fp32: two roundings, of which the largest dlogit's stands for all; in fp32 the sums' own errors count
        assert_close(own.grad, right.grad, terms=terms + H if own.dtype == torch.float32 else 2, magnitude=largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37, 307), (1, 5), (16, 64)], ids=str)
def test_loss_and_gradients_made_in_forward_match_fp64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    hidden, weight, labels = example(*shape, dtype)
    token_weight = torch.rand(shape[0], generator=torch.Generator().manual_seed(5))
    own, exact = leaves(hidden, weight), leaves(hidden.double(), weight.double())
    loss_sum, count = lce.linear_cross_entropy(
        *own, labels, token_weight=token_weight, label_smoothing=0.1, z_loss=1e-2, chunk_rows=16
    )
    right = (reference(*exact, labels, 0.1, 1e-2)[0] * token_weight).sum()
    assert int(count) == int((labels != IGNORED).sum())
    # logits (below 16) are rounded to the dtype: the loss of each token is off by that, the sum by sqrt(T) times it
    assert_close(loss_sum.to(dtype).double(), right.detach().to(dtype), terms=2 * shape[0] + H, magnitude=16.0)
    (loss_sum * 3.0).backward()
    (right * 3.0).backward()
    assert_gradients_close(own, exact, dlogits=3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_logprobs_entropy_and_their_gradients_match_fp64(dtype: torch.dtype) -> None:
    hidden, weight, labels = example(41, 211, dtype)
    own, exact = leaves(hidden, weight), leaves(hidden.double(), weight.double())
    logprobs, entropy = lce.linear_token_logprobs(*own, labels, with_entropy=True, chunk_rows=16)
    loss, _, right = reference(*exact, labels)
    assert entropy is not None
    assert_close(logprobs.to(dtype), -loss.detach(), terms=H, magnitude=16.0)
    assert_close(entropy.to(dtype), right.detach(), terms=H, magnitude=16.0)
    generator = torch.Generator().manual_seed(9)
    outgoing = [torch.randn(41, generator=generator) for _ in range(2)]
    (logprobs * outgoing[0] + entropy * outgoing[1]).sum().backward()
    (-loss * outgoing[0] + right * outgoing[1]).sum().backward()
    assert_gradients_close(own, exact, dlogits=4.0)


def test_chunks_of_any_length_give_the_same_numbers() -> None:
    hidden, weight, labels = example(37, 101)
    results = []
    for chunk_rows in (0, 1, 7, 36, 37, 64):
        own = leaves(hidden, weight)
        loss_sum, _ = lce.linear_cross_entropy(*own, labels, z_loss=0.1, chunk_rows=chunk_rows)
        loss_sum.backward()
        results.append((loss_sum.detach(), own[0].grad, own[1].grad))
    for result in results[1:]:
        for value, first in zip(result, results[0], strict=True):
            assert_close(value, first, terms=101)


def test_only_the_gradients_that_are_needed_are_made() -> None:
    hidden, weight, labels = example(9, 33)
    for position in range(2):
        own = leaves(hidden, weight)
        own[1 - position].requires_grad_(False)
        made = lce.weighted_loss(*own, labels, None, 33, IGNORED, 0.0, 0.0, 4, position == 0, position == 1)
        assert made[2 - position].numel() == 0 and made[1 + position].numel() > 0
        lce.linear_cross_entropy(*own, labels)[0].backward()
        lce.linear_token_logprobs(*own, labels)[0].sum().backward()  # d log p = - d loss: they cancel
        grad = own[position].grad
        assert own[1 - position].grad is None and grad is not None
        assert_close(grad, torch.zeros_like(grad), terms=33, magnitude=4.0)
    with torch.no_grad():
        loss_sum, _ = lce.linear_cross_entropy(*leaves(hidden, weight), labels)
    assert_close(loss_sum, reference(hidden, weight, labels)[0].sum(), terms=33, magnitude=30.0)


def test_an_incoming_gradient_of_one_leaves_the_stored_gradients_untouched() -> None:
    x = torch.arange(10.0)
    chunks.scale_(x, torch.tensor(1.0))
    assert torch.equal(x, torch.arange(10.0))
    chunks.scale_(x, torch.tensor(0.5))
    assert torch.equal(x, torch.arange(10.0) / 2)
    with pytest.raises(ValueError, match="not contiguous"):
        chunks.scale_(torch.ones(4, 4).t()[:2], torch.tensor(2.0))


def test_a_second_backward_is_refused_rather_than_scaled_twice() -> None:
    own = leaves(*example(5, 11)[:2])
    loss_sum, _ = lce.linear_cross_entropy(*own, torch.arange(5))
    loss_sum.backward(torch.tensor(2.0), retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss_sum.backward()


# -- the vocabulary over ranks ----------------------------------------------------------------------------------------


class _Ranks:
    """Reductions of simulated ranks that run one after another: each call answers from a table of all ranks' parts."""

    def __init__(self, parts: list[torch.Tensor], found: list[torch.Tensor]) -> None:
        self.parts, self.found = parts, found

    def __call__(self, own: torch.Tensor) -> torch.Tensor:
        self.found.append(own.clone())
        return own.copy_(self.parts.pop(0)) if self.parts else own


def _sharded(run: Any, heads: list[dict[str, Any]]) -> list[Any]:
    """run(head, rank) of every rank, with reductions over all of them: maxima first, then sums, then the results."""
    maxima: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    for step in range(3):
        results, seen_max, seen_sums = [], [], []
        for rank, settings in enumerate(heads):
            found_max: list[torch.Tensor] = []
            found_sum: list[torch.Tensor] = []
            head = lce.Head(
                **settings, reduce_max=_Ranks(list(maxima), found_max), reduce_sum=_Ranks(list(sums), found_sum)
            )
            results.append(run(head, rank))
            seen_max.append(found_max)
            seen_sums.append(found_sum)
        if step == 0:
            maxima = [torch.stack(each).amax(0) for each in zip(*seen_max, strict=True)]
        if step == 1:
            sums = [torch.stack(each).sum(0) for each in zip(*seen_sums, strict=True)]
    return results


def test_three_uneven_shards_with_padding_equal_one_piece() -> None:
    vocab_size, columns = 131, 50  # 50, 50 and 31 valid of 50
    hidden, weight, labels = example(23, vocab_size)
    padded = torch.cat([weight, torch.full((19, H), 9.0)])
    shards = padded.split(columns)
    common = {"vocab_size": vocab_size, "label_smoothing": 0.1, "z_loss": 1e-2, "chunk_rows": 8}
    valid = (50, 50, 31)
    heads = [{**common, "first_column": r * columns, "valid_columns": valid[r]} for r in range(3)]
    exact = leaves(hidden.double(), weight.double())
    loss, lse, entropy = reference(*exact, labels, 0.1, 1e-2)
    dloss = torch.rand(23, generator=torch.Generator().manual_seed(2))
    (loss * dloss).sum().backward(retain_graph=True)

    def both(head: lce.Head, rank: int) -> Any:
        dweight = torch.full((columns, H), float("nan"))
        return *lce.losses_and_gradients(hidden, shards[rank], labels, dloss, head, dweight=dweight), dweight

    results = _sharded(both, heads)
    for own_loss, own_lse, _, _ in results:
        assert_close(own_loss, loss.detach(), terms=vocab_size, magnitude=16.0)
        assert_close(own_lse, lse.detach(), terms=vocab_size, magnitude=16.0)
    dhidden, dweight = sum(each[2] for each in results), torch.cat([each[3] for each in results])
    assert exact[0].grad is not None and exact[1].grad is not None
    assert_close(dhidden, exact[0].grad, terms=vocab_size, magnitude=4.0)
    assert_close(dweight[:vocab_size], exact[1].grad, terms=23 + H, magnitude=4.0)
    assert (dweight[vocab_size:] == 0).all()

    # the form whose backward makes the logits again, with all three incoming gradients
    apart = _sharded(lambda head, r: lce.token_losses(hidden, shards[r], labels, head, with_entropy=True), heads)
    for value, right in zip(apart[1], (loss, lse, entropy), strict=True):
        assert_close(value, right.detach(), terms=vocab_size, magnitude=16.0)
    (0.3 * lse.sum() + 0.7 * entropy.sum()).backward()
    parts = []
    for settings, shard in zip(heads, shards, strict=True):
        buffer = torch.ones(columns, H)
        part = lce.gradients(
            hidden, shard, labels, apart[0][1], dloss, lce.Head(**settings), dlse=torch.tensor(0.3).expand(23),
            entropy=apart[0][2], dentropy=torch.full((23,), 0.7), dweight=buffer, accumulate=True,
        )  # fmt: skip
        parts.append((part, buffer - 1.0))
    dhidden, dweight = sum(each[0] for each in parts), torch.cat([each[1] for each in parts])
    assert_close(dhidden, exact[0].grad, terms=vocab_size, magnitude=8.0)
    assert_close(dweight[:vocab_size], exact[1].grad, terms=23 + H, magnitude=8.0)


# -- ignored tokens, empty inputs, strides ----------------------------------------------------------------------------


def test_all_tokens_ignored_give_zero_loss_and_gradients() -> None:
    own = leaves(*example(6, 13)[:2])
    labels = torch.full((6,), IGNORED)
    loss_sum, count = lce.linear_cross_entropy(*own, labels, z_loss=0.1)
    (loss_sum + lce.linear_token_logprobs(*own, labels)[0].sum()).backward()
    assert loss_sum.item() == 0 and count.item() == 0
    assert all(each.grad is not None and (each.grad == 0).all() for each in own)


def test_no_tokens_give_zero_loss_and_gradients() -> None:
    own = leaves(torch.empty(0, H), example(1, 13)[1])
    labels = torch.empty(0, dtype=torch.int64)
    loss_sum, count = lce.linear_cross_entropy(*own, labels)
    logprobs, _ = lce.linear_token_logprobs(*own, labels)
    (loss_sum + logprobs.sum()).backward()
    assert loss_sum.item() == 0 and count.item() == 0 and logprobs.shape == (0,)
    assert own[0].grad is not None and own[0].grad.shape == (0, H)
    assert own[1].grad is not None and (own[1].grad == 0).all()


def test_transposed_and_strided_inputs_and_padded_vocabulary() -> None:
    hidden, weight, labels = example(19, 40)
    padded = torch.cat([weight, torch.full((8, H), 30.0)])
    wide = torch.cat([hidden, hidden], dim=1)[:, :H]
    expected = lce.linear_token_logprobs(hidden, weight, labels)[0]
    found = lce.linear_token_logprobs(wide, padded.t().contiguous().t(), labels, vocab_size=40, chunk_rows=8)[0]
    assert_close(found, expected, terms=H, magnitude=16.0)


def test_settings_a_user_gets_wrong_are_named() -> None:
    hidden, weight, labels = example(4, 10)
    with pytest.raises(ValueError, match="do not fit"):
        lce.linear_cross_entropy(hidden[:, 1:], weight, labels)
    with pytest.raises(ValueError, match="do not fit"):
        lce.linear_cross_entropy(hidden, weight, labels[:2])
    with pytest.raises(ValueError, match="cast one"):
        lce.linear_cross_entropy(hidden.half(), weight, labels)
    with pytest.raises(ValueError, match="give both"):
        lce.Head(vocab_size=10, reduce_max=torch.clone)


# -- chunks and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [0, 1, 1000, 4097, 8192, 10_000, 1_000_000])
@pytest.mark.parametrize("columns", [101, 16_032, 128_256, 256_000, 1_000_000])
def test_chunks_feed_the_gemm_and_fit_the_memory(num_tokens: int, columns: int) -> None:
    rows = lce.rows_per_chunk(num_tokens, columns, 2)
    assert rows * columns * 2 <= max(chunks.CHUNK_BYTES, 1024 * columns * 2)
    assert rows <= 4096
    if num_tokens > 4096:
        assert rows >= 1024 * 0.75, "an even share of a chunk of at least 1024"
        assert -num_tokens % rows < 128 * -(-num_tokens // rows), "no short last chunk"


class _Allocations(TorchDispatchMode):
    """Sizes in bytes of the storages that operations made."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self._kept = {each.untyped_storage().data_ptr(): each for each in known}  # kept, so that no address is reused
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self._kept:
            self._kept[out.untyped_storage().data_ptr()] = out
            self.bytes.append(out.untyped_storage().nbytes())
        return out


def test_logits_of_one_chunk_are_the_only_large_buffer() -> None:
    hidden, weight, labels = example(64, 512)
    head = lce.Head(vocab_size=512, chunk_rows=8)
    dweight, dloss = torch.empty(512, H), torch.ones(64)
    with _Allocations(hidden, weight, labels, dweight, dloss) as made:
        _, lse, _ = lce.losses_and_gradients(hidden, weight, labels, dloss, head, dweight=dweight)
        lce.gradients(hidden, weight, labels, lse, dloss, head, dweight=dweight)
    chunk = 8 * 512 * 4
    assert sorted(made.bytes)[-2:] == [chunk, chunk], "one buffer a pass, shared by all chunks"
    assert sorted(made.bytes)[-3] == 64 * H * 4, "then dhidden, and nothing between"


def test_bf16_gradient_of_the_weight_does_not_drift_with_the_number_of_chunks() -> None:
    hidden, weight, labels = example(512, 16, torch.bfloat16)
    grads = []
    for chunk_rows in (8, 512):
        own = leaves(hidden, weight)
        lce.linear_cross_entropy(*own, labels, chunk_rows=chunk_rows)[0].backward()
        assert own[1].grad is not None
        grads.append(own[1].grad)
    first, second = (each.double() for each in grads)
    # sums in fp32, of numbers below 512 * 4, then one rounding each: neighbouring bf16 numbers at most
    assert ((first - second).abs() <= 2**-7 * second.abs() + 2**-23 * 512 * 4).all()


# -- compiled ---------------------------------------------------------------------------------------------------------


def test_operations_pass_opcheck() -> None:
    hidden, weight, labels = example(6, 20)
    own = leaves(hidden, weight)
    opcheck(lce.weighted_loss, (hidden, weight, labels, torch.rand(6), 20, IGNORED, 0.1, 0.1, 4, True, True))
    opcheck(lce.linear_token_losses, (*own, labels, True, 20, IGNORED, 0.1, 0.1, 4))
    opcheck(chunks.scale_, (torch.rand(7), torch.tensor(2.0)))


def test_compiles_to_one_graph_with_the_same_numbers() -> None:
    hidden, weight, labels = example(9, 30)

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        total, count = lce.linear_cross_entropy(hidden * 1.5, weight, labels, z_loss=0.1, chunk_rows=4)
        logprobs, entropy = lce.linear_token_logprobs(hidden * 0.5, weight, labels, with_entropy=True, chunk_rows=4)
        assert entropy is not None
        return total / count + (logprobs * entropy).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        own = leaves(hidden, weight)
        value = function(*own)
        value.backward()
        results.append((value.detach(), own[0].grad, own[1].grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
