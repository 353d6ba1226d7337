"""Cross-entropy kernels against plain torch in fp64, whole and cut over simulated ranks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from megallm.testing.tolerances import assert_close
from megallm_kernels import cross_entropy as ce
from megallm_kernels import cross_entropy_kernels as kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IGNORED = ce.IGNORE_INDEX


def example(num_tokens: int, vocab_size: int, dtype: torch.dtype = torch.float32, scale: float = 3.0, seed: int = 0):
    """(logits [T, V], labels [T] with every fifth one ignored)."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(num_tokens, vocab_size, generator=generator) * scale).to(dtype)
    labels = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    labels[2::5] = IGNORED
    return logits, labels


def reference(logits: torch.Tensor, labels: torch.Tensor, *, smoothing: float = 0.0, z_loss: float = 0.0):
    """(loss, lse, entropy) [T] in fp64, differentiable; 0 for ignored tokens."""
    x, kept = logits.double(), labels != IGNORED
    lse = x.logsumexp(-1)
    at_label = x.gather(1, labels.masked_fill(~kept, 0)[:, None])[:, 0]
    loss = (1 - smoothing) * (lse - at_label) + z_loss * lse**2
    if smoothing:
        loss = loss + smoothing * (lse - x.mean(-1))
    log_p = x - lse[:, None]
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0)).sum(-1)
    return tuple(each.masked_fill(~kept, 0) for each in (loss, lse, entropy))


def incoming(num_tokens: int, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(num_tokens, generator=generator) for _ in range(count)]


def check(logits: torch.Tensor, labels: torch.Tensor, *, smoothing: float = 0.0, z_loss: float = 0.0) -> None:
    """All three results and the gradient through all of them."""
    size = logits.size(-1)
    x = logits.detach().requires_grad_()
    wide = logits.detach().double().requires_grad_()
    found = ce.token_losses(x, labels, size, IGNORED, smoothing, z_loss, True)
    expected = reference(wide, labels, smoothing=smoothing, z_loss=z_loss)
    top = max(logits.abs().max().item(), 1.0)
    # lse is off by eps (|x| + sqrt(V)), V roundings in the sum of exp; the z-loss multiplies that by 2 z lse
    for value, right in zip(found, expected, strict=True):
        assert_close(value, right.float().double(), terms=size, magnitude=top * (1 + 2 * z_loss * top))
    grads = incoming(len(labels))
    sum((f * g).sum() for f, g in zip(found, grads, strict=True)).backward()
    sum((e * g).sum() for e, g in zip(expected, grads, strict=True)).backward()
    assert x.grad is not None and wide.grad is not None
    if logits.dtype == torch.float32:  # p is off by eps |x - lse| p; the entropy's term is p log p of that
        assert_close(x.grad, wide.grad, terms=8, magnitude=top * (1 + 2 * z_loss * top) * 3)
    else:  # one rounding to the logits' dtype
        assert_close(x.grad, wide.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37, 1009), (1, 5), (19, 256), (5, 1)], ids=str)
def test_losses_entropy_and_gradient_match_fp64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, labels = example(*shape, dtype)
    check(logits, labels)
    check(logits, labels, smoothing=0.1, z_loss=1e-2)


def test_logits_times_100_stay_exact() -> None:
    check(*example(23, 517, scale=100.0), smoothing=0.1)


def test_minus_infinity_logits_have_no_probability_and_no_gradient() -> None:
    logits, labels = example(11, 301)
    hidden = torch.rand(logits.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    hidden[torch.arange(11), labels.clamp(min=0)] = False
    hidden[:, :256] |= (torch.arange(11) % 2 == 0)[:, None] & (labels >= 256)[:, None]  # whole tiles of them too
    x = logits.masked_fill(hidden, float("-inf")).requires_grad_()
    logprobs, entropy = ce.token_logprobs(x, labels, with_entropy=True)
    loss, _, wanted = reference(x.detach(), labels)
    assert entropy is not None
    assert_close(logprobs, -loss, terms=301, magnitude=10.0)
    assert_close(entropy, wanted, terms=301, magnitude=10.0)
    (logprobs.sum() + entropy.sum()).backward()
    assert x.grad is not None and x.grad.isfinite().all() and (x.grad[hidden] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.filterwarnings("ignore:overflow encountered")  # in the sum of the logits, which no loss here reads
def test_ids_masked_by_the_lowest_number_of_a_dtype_leave_the_entropy_of_the_others(
    dtype: torch.dtype, num_ranks: int
) -> None:
    logits, labels = example(11, 600, dtype)
    logits[:, :300] = torch.finfo(dtype).min  # whole tiles, and all of the first of two ranks
    labels = labels % 300 + 300
    expected = reference(logits[:, 300:], labels - 300)
    parts = []
    for rank, shard in enumerate(logits.chunk(num_ranks, dim=1)):
        parts.append(ce.statistics(shard, labels, first_column=rank * 300, with_entropy=True))
    top = torch.stack([row_max for row_max, _ in parts]).amax(0)
    sums = torch.stack([ce.rescale_(own, row_max, top) for row_max, own in parts]).sum(0)
    for value, right in zip(ce.losses(top, sums, labels, vocab_size=600), expected, strict=True):
        assert_close(value, right, terms=600, magnitude=logits[:, 300:].abs().max().item())


def test_gradient_of_a_confident_label_is_not_rounded_to_zero() -> None:
    logits = torch.zeros(1, 64, dtype=torch.bfloat16)
    logits[0, 3] = 13.0
    x, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    labels = torch.tensor([3])
    ce.cross_entropy(x, labels)[0].backward()
    reference(wide, labels)[0].sum().backward()
    assert x.grad is not None and wide.grad is not None
    # p - 1 with p in fp32: absolute error of a few eps(fp32) (lse = 13), then one bf16 rounding of the small result
    right = wide.grad[0, 3].item()
    assert abs(x.grad[0, 3].item() - right) < abs(right) * 2**-8 + 13 * 2**-22


# -- the vocabulary over ranks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_uneven_shards_with_padding_equal_one_piece(dtype: torch.dtype) -> None:
    vocab_size, columns = 401, 400 // 3 + 48  # 181 columns a rank: 181, 181, 39 valid
    logits, labels = example(29, vocab_size, dtype)
    shards = [torch.full((29, columns), float("nan"), dtype=dtype) for _ in range(3)]
    places = []
    for rank, shard in enumerate(shards):
        first = rank * columns
        valid = min(vocab_size - first, columns)
        shard[:, :valid] = logits[:, first : first + valid]
        places.append({"first_column": first, "valid_columns": valid})
    parts = [ce.statistics(x, labels, **at, with_entropy=True) for x, at in zip(shards, places, strict=True)]
    top = torch.stack([row_max for row_max, _ in parts]).amax(0)
    sums = torch.stack([ce.rescale_(own, row_max, top) for row_max, own in parts]).sum(0)
    loss, lse, entropy = ce.losses(top, sums, labels, vocab_size=vocab_size, label_smoothing=0.1, z_loss=1e-2)

    wide = logits.double().requires_grad_()
    expected = reference(wide, labels, smoothing=0.1, z_loss=1e-2)
    for value, right in zip((loss, lse, entropy), expected, strict=True):
        assert_close(value, right.detach(), terms=vocab_size, magnitude=wide.abs().max().item())
    dloss, dlse, dentropy = grads = incoming(29)
    sum((e * g).sum() for e, g in zip(expected, grads, strict=True)).backward()
    assert wide.grad is not None
    for shard, at in zip(shards, places, strict=True):
        ce.gradient_(
            shard, labels, lse, dloss, dlse, entropy, dentropy, vocab_size=vocab_size, **at, label_smoothing=0.1,
            z_loss=1e-2,
        )  # fmt: skip
        first, valid = at["first_column"], at["valid_columns"]
        assert_close(shard[:, :valid], wide.grad[:, first : first + valid], terms=8, magnitude=10.0)
        assert (shard[:, valid:] == 0).all(), "padding columns get exact zeros, NaN or not before"
        assert (shard[labels == IGNORED] == 0).all()


def test_a_rank_without_valid_columns_adds_nothing() -> None:
    logits, labels = example(7, 65)
    padding = torch.full((7, 65), float("nan"))
    row_max, sums = ce.statistics(logits, labels)
    other_max, other = ce.statistics(padding, labels, first_column=65, valid_columns=0)
    top = torch.maximum(row_max, other_max)
    assert torch.equal(top, row_max)
    assert (ce.rescale_(other, other_max, top) == 0).all()
    assert torch.equal(ce.rescale_(sums.clone(), row_max, top), sums)


def test_padding_columns_are_no_label_and_no_probability_on_one_rank() -> None:
    logits, labels = example(9, 97)
    wide = torch.cat([logits, torch.full((9, 31), 60.0)], dim=1).requires_grad_()
    exact = logits.clone().requires_grad_()
    for x, size in ((wide, 97), (exact, None)):
        ce.cross_entropy(x, labels, vocab_size=size, label_smoothing=0.2)[0].backward()
    assert wide.grad is not None and exact.grad is not None
    assert torch.equal(wide.grad[:, :97], exact.grad) and (wide.grad[:, 97:] == 0).all()


# -- ignored tokens, empty inputs, strides ----------------------------------------------------------------------------


def test_sum_and_count_leave_out_ignored_tokens() -> None:
    logits, labels = example(13, 50)
    loss_sum, count = ce.cross_entropy(logits, labels)
    assert count.dtype == torch.int64 and int(count) == int((labels != IGNORED).sum())
    assert_close(loss_sum, reference(logits, labels)[0].sum(), terms=50 * 13, magnitude=10.0)


def test_all_tokens_ignored_give_zero_loss_count_and_gradient_even_over_nan() -> None:
    x = torch.full((6, 33), float("nan"), requires_grad=True)
    loss_sum, count = ce.cross_entropy(x, torch.full((6,), IGNORED), label_smoothing=0.1, z_loss=0.1)
    loss_sum.backward()
    assert loss_sum.item() == 0 and count.item() == 0
    assert x.grad is not None and (x.grad == 0).all()


def test_ignore_index_may_be_an_id_of_the_vocabulary() -> None:
    logits, _ = example(6, 20)
    labels = torch.tensor([0, 3, 0, 5, 0, 19])
    loss_sum, count = ce.cross_entropy(logits, labels, ignore_index=0)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels, ignore_index=0, reduction="sum")
    assert count.item() == 3
    assert_close(loss_sum, expected, terms=60, magnitude=10.0)


def test_no_tokens_give_empty_results() -> None:
    x = torch.empty(0, 12, requires_grad=True)
    logprobs, entropy = ce.token_logprobs(x, torch.empty(0, dtype=torch.int64), with_entropy=True)
    assert entropy is not None and logprobs.shape == entropy.shape == (0,)
    loss_sum, count = ce.cross_entropy(x, torch.empty(0, dtype=torch.int64))
    loss_sum.backward()
    assert loss_sum.item() == 0 and count.item() == 0
    assert x.grad is not None and x.grad.shape == (0, 12)


def test_rows_of_a_wider_buffer_columns_of_a_transpose_and_strided_labels_are_read_in_place() -> None:
    logits, labels = example(17, 150)
    expected = ce.statistics(logits, labels)
    buffer = torch.full((17, 190), float("nan"))
    buffer[:, 20:170] = logits
    every_second = torch.stack([labels, labels + 1], dim=1)[:, 0]
    for x in (buffer[:, 20:170], logits.t().contiguous().t()):
        for value, right in zip(ce.statistics(x, every_second), expected, strict=True):
            assert torch.equal(value, right)
    ce.gradient_(buffer[:, 20:170], every_second, torch.full((17,), 6.0), torch.ones(17), vocab_size=150)
    assert buffer[:, :20].isnan().all() and buffer[:, 170:].isnan().all() and buffer[:, 20:170].isfinite().all()


def test_strided_statistics_are_taken() -> None:
    logits, labels = example(9, 40)
    row_max, sums = ce.statistics(logits, labels, with_entropy=True)
    results = []
    for change in (lambda t: t, lambda t: torch.stack([t, t + 1], dim=-1)[..., 0]):
        loss, lse, entropy = ce.losses(change(row_max), change(sums), labels, vocab_size=40)
        dlogits = logits.clone()
        ones = torch.ones(9)
        ce.gradient_(dlogits, labels, change(lse), ones, None, change(entropy), ones, vocab_size=40)
        results.append((loss, lse, entropy, dlogits))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_int32_labels_are_taken() -> None:
    logits, labels = example(8, 40)
    assert torch.equal(ce.statistics(logits, labels)[1], ce.statistics(logits, labels.int())[1])


def test_expanded_and_strided_incoming_gradients() -> None:
    logits, labels = example(14, 70)
    for outgoing in (torch.tensor(0.5).expand(14), torch.randn(14, 3)[:, 1], torch.randn(14).flip(0)):
        x, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
        ce.token_losses(x, labels, 70, IGNORED, 0.0, 0.0, False)[0].backward(outgoing)
        reference(wide, labels)[0].backward(outgoing.double())
        assert x.grad is not None and wide.grad is not None
        assert_close(x.grad, wide.grad, terms=8, magnitude=10.0)


def test_gradient_through_one_output_alone() -> None:
    logits, labels = example(10, 45)
    for output in range(3):
        x, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
        ce.token_losses(x, labels, 45, IGNORED, 0.0, 0.0, True)[output].sum().backward()
        reference(wide, labels)[output].sum().backward()
        assert x.grad is not None and wide.grad is not None
        assert_close(x.grad, wide.grad, terms=8, magnitude=10.0)


def test_inplace_backward_returns_the_logits_own_memory() -> None:
    logits, labels = example(12, 90, torch.bfloat16)
    plain, owned = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    for x, inplace in ((plain, False), (owned, True)):
        produced = x * 1.0
        loss_sum, _ = ce.cross_entropy(produced, labels, inplace_backward=inplace)
        loss_sum.backward()
        assert torch.equal(produced, logits) is not inplace
    assert plain.grad is not None and owned.grad is not None and torch.equal(plain.grad, owned.grad)


def test_two_runs_agree_to_the_bit() -> None:
    logits, labels = example(20, 700, torch.bfloat16)
    first, second = (ce.token_losses(logits, labels, 700, IGNORED, 0.1, 0.1, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_settings_a_user_gets_wrong_are_named() -> None:
    logits, labels = example(4, 10)
    with pytest.raises(ValueError, match="must be"):
        kernels.statistics(logits, labels[:3])
    with pytest.raises(ValueError, match="float64"):
        kernels.statistics(logits.double(), labels)
    with pytest.raises(ValueError, match="valid_columns"):
        kernels.statistics(logits, labels, valid_columns=11)
    lse = torch.zeros(4)
    with pytest.raises(ValueError, match="must not overlap"):
        kernels.gradient_(logits[:1].expand(4, 10), labels, lse, lse, vocab_size=10)
    for smoothing in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="label_smoothing"):
            kernels.gradient_(logits, labels, lse, lse, vocab_size=10, label_smoothing=smoothing)
        with pytest.raises(ValueError, match="label_smoothing"):
            ce.token_losses(logits, labels, 10, IGNORED, smoothing, 0.0, False)
    with pytest.raises(ValueError, match="compute capability 7.5 is below 8.0"):
        kernels.plan(32000, arch=75, gradient=False)
    with pytest.raises(ValueError, match="without entropy"):
        kernels.gradient_(logits, labels, lse, lse, dentropy=lse, vocab_size=10)


@pytest.mark.parametrize("columns", [1, 17, 256, 1000, 2048, 50257, 131072, 262144])
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("gradient", [False, True])
def test_tiles_stay_below_the_size_that_spills(columns: int, arch: int, gradient: bool) -> None:
    launch = kernels.plan(columns, arch=arch, gradient=gradient)
    assert 16 <= launch.block <= 32768
    assert launch.rows * launch.block <= 32 * 32 * launch.num_warps


# -- compiled and large -----------------------------------------------------------------------------------------------


def test_operations_pass_opcheck() -> None:
    logits, labels = example(6, 30)
    x = logits.requires_grad_()
    opcheck(ce.token_losses, (x, labels, 30, IGNORED, 0.1, 0.1, True))
    plain = logits.detach()
    opcheck(ce.statistics, (plain, labels), {"first_column": 3, "valid_columns": 20, "with_entropy": True})
    row_max, sums = ce.statistics(plain, labels)
    opcheck(ce.losses, (row_max, sums, labels), {"vocab_size": 30})
    lse = ce.losses(row_max, sums, labels, vocab_size=30)[1]
    opcheck(ce.gradient_, (plain.clone(), labels, lse, torch.ones(6)), {"vocab_size": 30})


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_to_one_graph_with_the_same_numbers(inplace: bool) -> None:
    logits, labels = example(9, 60)
    weight = torch.randn(60, 60, generator=torch.Generator().manual_seed(1)) / 8

    def loss(x: torch.Tensor) -> torch.Tensor:
        total, count = ce.cross_entropy(x @ weight, labels, z_loss=0.1, inplace_backward=inplace)
        logprobs, entropy = ce.token_logprobs(x @ weight, labels, with_entropy=True, inplace_backward=inplace)
        assert entropy is not None
        return total / count + (logprobs * entropy).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = logits.clone().requires_grad_()
        value = function(x)
        value.backward()
        results.append((value.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


_FAR_ROWS = """
import torch
from megallm_kernels import cross_entropy_kernels as kernels
far = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 40), (2**30, 1))
near = torch.randn(3, 40).half()
far.copy_(near)
labels = torch.tensor([1, 2, 39])
for x in (near, far):
    row_max, sums = kernels.statistics(x, labels)
    loss, lse, _ = kernels.losses(row_max, sums, labels, vocab_size=40)
    kernels.gradient_(x, labels, lse, torch.ones(3), vocab_size=40)
    print(loss.tolist(), x.double().sum(0).tolist())
"""


def test_rows_that_lie_more_than_2_to_the_31_elements_apart() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FAR_ROWS], capture_output=True, text=True, timeout=1800, check=False
    )  # a wrapped offset would be a segfault
    assert done.returncode == 0, done.stderr[-2000:]
    near, far = done.stdout.splitlines()
    assert near == far
