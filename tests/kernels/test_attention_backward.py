"""The backward kernels of attention against autograd of a dense fp64 reference, in the interpreter."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace

import pytest
import torch
from kernel_checks import DTYPES, normal, run_alone

from megallm.testing.tolerances import assert_close
from megallm_kernels import attention_backward as kernel

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BOTH = pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "adding"])


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention; lengths of the sequences' queries and keys."""

    lengths: tuple[tuple[int, int], ...] = ((70, 70),)
    packed: bool = True
    rest: int = 0
    """Tokens past the last document, of queries and of keys."""
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 16
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    magnitude: float = 1.0
    """Of q and k."""
    dtype: torch.dtype = torch.float32
    seed: int = 1


def dense_attention(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [Tq, N, D], lse [N, Tq]); the tokens past the last document see nothing."""
    group = case.num_heads // case.num_kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    seen = torch.zeros(q.size(0), k.size(0), dtype=torch.bool)
    q_start = k_start = 0
    for sq, sk in case.lengths:
        distance = torch.arange(sq)[:, None] + (sk - sq) - torch.arange(sk)
        visible = distance >= 0 if case.causal else torch.ones(sq, sk, dtype=torch.bool)
        if case.window:
            visible &= distance < case.window
        seen[q_start : q_start + sq, k_start : k_start + sk] = visible
        q_start, k_start = q_start + sq, k_start + sk
    scores = torch.einsum("qnd,knd->nqk", q, k) * case.head_dim**-0.5
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    dead = ~seen.any(1)
    scores = scores.masked_fill(~seen, float("-inf")).masked_fill(dead[:, None], 0.0)
    lse = scores.logsumexp(-1)
    p = (scores - lse[..., None]).exp().masked_fill(dead[:, None], 0.0)
    return torch.einsum("nqk,knd->qnd", p, v), lse.masked_fill(dead, float("-inf"))


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v, slices of one packed buffer where queries and keys are equally many."""
    num_queries, num_keys = (sum(pair[i] for pair in case.lengths) + case.rest for i in (0, 1))
    n, kv, d = case.num_heads, case.num_kv_heads, case.head_dim
    if num_queries == num_keys:
        packed = normal(num_queries, n + 2 * kv, d, dtype=case.dtype, seed=case.seed)
        packed[:, : n + kv] *= case.magnitude
        q, k, v = packed.split([n, kv, kv], 1)
        return q, k, v
    q = normal(num_queries, n, d, dtype=case.dtype, seed=case.seed, scale=case.magnitude)
    k = normal(num_keys, kv, d, dtype=case.dtype, seed=case.seed + 1, scale=case.magnitude)
    return q, k, normal(num_keys, kv, d, dtype=case.dtype, seed=case.seed + 2)


def gradients(
    case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None,
    *, deterministic: bool, settings: kernel.Plan | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """(the kernels' dq, dk, dv, the reference's in fp64); the kernels get slices of a packed buffer full of NaN."""
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out, lse = dense_attention(case, *wide)
    terms = [(out * dout.double()).sum()]
    if dlse is not None:
        terms.append((lse * dlse.double())[lse != float("-inf")].sum())
    expected = list(torch.autograd.grad(torch.stack(terms).sum(), wide))
    offsets = [
        torch.tensor([0, *(pair[i] for pair in case.lengths)]).cumsum(0).to(torch.int32) if case.packed else None
        for i in (0, 1)
    ]
    n, kv, d = case.num_heads, case.num_kv_heads, case.head_dim
    rows = max(q.size(0), k.size(0))
    dq, dk, dv = torch.full((rows, n + 2 * kv, d), float("nan"), dtype=q.dtype).split([n, kv, kv], 1)
    dq, dk, dv = dq[: q.size(0)], dk[: k.size(0)], dv[: k.size(0)]
    kernel.backward(
        dout, q, k, v, out.detach().to(q.dtype).contiguous(), lse.detach().float(), dlse, offsets[0], offsets[1],
        batch_size=len(case.lengths), max_seqlen_q=max(s for s, _ in case.lengths),
        max_seqlen_k=max(s for _, s in case.lengths), causal=case.causal, window=case.window, softcap=case.softcap,
        scale=d**-0.5, deterministic=deterministic, dq=dq, dk=dk, dv=dv, settings=settings,
    )  # fmt: skip
    return [dq, dk, dv], expected


def check(case: Case, *, deterministic: bool, with_dlse: bool = False, settings: kernel.Plan | None = None) -> None:
    """dq, dk and dv equal the reference's on the same rounded numbers."""
    q, k, v = inputs(case)
    dout = normal(*q.shape, dtype=case.dtype, seed=case.seed + 3)
    dlse = normal(case.num_heads, q.size(0), dtype=torch.float32, seed=case.seed + 4) if with_dlse else None
    actual, expected = gradients(case, q, k, v, dout, dlse, deterministic=deterministic, settings=settings)
    for name, a, e in zip(("dq", "dk", "dv"), actual, expected, strict=True):
        assert_close(a, e, terms=terms_of(case), magnitude=magnitude_of(case, e), label=name)


def terms_of(case: Case) -> int:
    """fp32: a score is a sum of D, p's exponent has its error, and the sums run over keys, or a group's queries.

    Two bytes: p, ds, out (in delta) and the result are rounded to the dtype, each error spread over the sum's terms.
    """
    if case.dtype != torch.float32:
        return 4
    longest = max(max(pair) for pair in case.lengths)
    return case.head_dim + longest * (case.num_heads // case.num_kv_heads)


def magnitude_of(case: Case, expected: torch.Tensor) -> float:
    """dq and dk are sums of ds k or ds q with ds = p (dp - delta), |dp| up to about 3 sqrt(D), times 1 / sqrt(D).

    Two bytes: delta inherits eps |out dout| from the rounded output. Large scores: fp32's error in s is eps |s|.
    """
    return max(expected.abs().max().item() if expected.numel() else 0.0, 3.0 * case.magnitude)


@EACH_DTYPE
@BOTH
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "batch"])
def test_gradients_match_fp64(dtype: torch.dtype, deterministic: bool, causal: bool, packed: bool) -> None:
    lengths = ((37, 37), (70, 70)) if packed else ((50, 50),) * 2
    check(Case(lengths=lengths, packed=packed, causal=causal, dtype=dtype), deterministic=deterministic)


@BOTH
@pytest.mark.parametrize("lengths", [((5, 40),), ((40, 5),), ((33, 97), (97, 33)), ((1, 1),)], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_queries_and_keys_may_differ_in_number(
    lengths: tuple[tuple[int, int], ...], causal: bool, deterministic: bool
) -> None:
    check(Case(lengths=lengths, causal=causal), deterministic=deterministic, with_dlse=True)


@BOTH
@pytest.mark.parametrize("window", [1, 7, 32, 50, 1000])
@pytest.mark.parametrize("lengths", [((97, 97),), ((20, 100),), ((100, 20),)], ids=str)
def test_a_window_limits_the_keys(window: int, lengths: tuple[tuple[int, int], ...], deterministic: bool) -> None:
    check(Case(lengths=lengths, window=window, num_heads=2), deterministic=deterministic)


@BOTH
def test_empty_and_single_token_documents_and_the_rest_of_the_buffer(deterministic: bool) -> None:
    lengths = ((0, 0), (1, 1), (0, 5), (33, 33), (6, 0), (0, 0), (64, 64), (0, 0))
    check(Case(lengths=lengths, rest=40), deterministic=deterministic, with_dlse=True)
    check(Case(lengths=lengths, rest=40, causal=False), deterministic=deterministic, with_dlse=True)


@EACH_DTYPE
@BOTH
def test_softcap_has_its_derivative(dtype: torch.dtype, deterministic: bool) -> None:
    check(Case(softcap=2.0, dtype=dtype, magnitude=2.0), deterministic=deterministic)


@BOTH
@pytest.mark.parametrize("num_heads, num_kv_heads", [(1, 1), (3, 3), (6, 1), (6, 2)])
def test_query_heads_share_kv_heads(num_heads: int, num_kv_heads: int, deterministic: bool) -> None:
    check(Case(lengths=((40, 40),), num_heads=num_heads, num_kv_heads=num_kv_heads), deterministic=deterministic)


@BOTH
@pytest.mark.parametrize("head_dim", [1, 24, 80, 128, 256])
def test_any_head_dim_is_padded(head_dim: int, deterministic: bool) -> None:
    case = Case(lengths=((40, 40),), head_dim=head_dim, num_heads=2, num_kv_heads=1)
    check(case, deterministic=deterministic)
    check(replace(case, dtype=torch.bfloat16, packed=False), deterministic=deterministic)


@EACH_DTYPE
@BOTH
@pytest.mark.parametrize("magnitude", [3.0, 100.0])
def test_large_scores_give_finite_gradients(dtype: torch.dtype, deterministic: bool, magnitude: float) -> None:
    case = Case(magnitude=magnitude, dtype=dtype)
    q, k, v = inputs(case)
    dout = normal(*q.shape, dtype=dtype, seed=9)
    actual, expected = gradients(case, q, k, v, dout, None, deterministic=deterministic)
    scores = (q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max() * case.head_dim**-0.5).item()
    for name, a, e in zip(("dq", "dk", "dv"), actual, expected, strict=True):
        # the score's own rounding, eps32 times its size, is an error of p relative to p
        eps = torch.finfo(torch.float32).eps
        relative = 1.0 if dtype != torch.float32 else max(1.0, scores)
        assert torch.isfinite(a).all() and eps * scores < 1e-1
        assert_close(a, e, terms=terms_of(case), magnitude=magnitude_of(case, e) * relative, label=name)


@BOTH
@pytest.mark.parametrize("form", ["expanded", "expanded heads", "strided", "transposed"])
def test_the_gradient_of_the_output_may_have_any_strides(form: str, deterministic: bool) -> None:
    case = Case()
    q, k, v = inputs(case)
    full = normal(*q.shape, dtype=case.dtype, seed=9)
    dout = {
        "expanded": torch.ones(()).expand(q.shape),
        "expanded heads": full[:, :1].expand(q.shape),
        "strided": torch.stack([full, full.new_full(full.shape, float("nan"))], -1)[..., 0],
        "transposed": full.transpose(0, 1).contiguous().transpose(0, 1),
    }[form]
    actual, expected = gradients(case, q, k, v, dout, None, deterministic=deterministic)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, terms=terms_of(case), magnitude=magnitude_of(case, e))


def test_a_dead_row_gives_zero_gradients_whatever_its_gradient_of_lse() -> None:
    case = Case(lengths=((40, 5),), num_heads=2)
    q, k, v = inputs(case)
    dout = normal(*q.shape, dtype=case.dtype, seed=9)
    dlse = torch.zeros(2, 40)
    dlse[:, :35] = float("nan")  # what -inf minus -inf gives where results of two passes are merged
    actual, expected = gradients(case, q, k, v, dout, dlse, deterministic=True)
    assert (actual[0][:35] == 0).all()
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, terms=terms_of(case), magnitude=magnitude_of(case, e))


def test_nothing_to_see_gives_zeros() -> None:
    for lengths in (((0, 7),), ((7, 0),), ((0, 0),)):
        case = Case(lengths=lengths)
        q, k, v = inputs(case)
        actual, _ = gradients(case, q, k, v, torch.ones_like(q), None, deterministic=True)
        assert all((a == 0).all() for a in actual)


def test_the_deterministic_pass_repeats_bit_for_bit() -> None:
    case = Case(dtype=torch.bfloat16, lengths=((50, 50), (33, 33)))
    q, k, v = inputs(case)
    dout = normal(*q.shape, dtype=case.dtype, seed=9)
    first, second = (gradients(case, q, k, v, dout, None, deterministic=True)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("block_m, block_n", [(16, 64), (64, 16)])
@BOTH
def test_tiles_of_unequal_sides_cut_the_mask_right(block_m: int, block_n: int, deterministic: bool) -> None:
    launch = kernel.Launch(
        block_m=block_m, block_n=block_n, num_warps=4, num_stages=1, tma=False, warp_specialize=False
    )  # fmt: skip
    settings = kernel.Plan(block_d=16, keys=launch, queries=launch if deterministic else None)
    for window in (0, 40):
        case = Case(lengths=((150, 150), (33, 97), (97, 33)), window=window, num_heads=2, num_kv_heads=2)
        check(case, deterministic=deterministic, settings=settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_descriptors_read_the_same_tiles(dtype: torch.dtype) -> None:
    launch = kernel.Launch(block_m=32, block_n=32, num_warps=4, num_stages=1, tma=True, warp_specialize=False)
    settings = kernel.Plan(block_d=32, keys=launch, queries=launch)
    for window in (0, 20):
        case = Case(lengths=((50, 50), (0, 0), (40, 65), (9, 9)), head_dim=24, window=window, dtype=dtype, rest=5)
        check(case, deterministic=True, with_dlse=True, settings=settings)


def test_a_head_too_wide_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="head dim 257 is not within 1 to 256"):
        kernel.plan(90, 257, element_bytes=2, deterministic=True)


def test_a_gpu_too_old_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="compute capability 7.5 is below 8.0"):
        kernel.plan(75, 64, element_bytes=2, deterministic=True)


@pytest.mark.parametrize("arch", [86, 89, 120])
def test_tiles_of_small_gpus_fit_their_shared_memory(arch: int) -> None:
    """Both tiles that stay, two that pass by for each stage, and ds."""
    for head_dim in (64, 128, 256):
        launch = kernel.plan(arch, head_dim, element_bytes=2, deterministic=True).queries
        assert launch is not None
        tiles = launch.block_m * 2 + 2 * launch.num_stages * launch.block_n
        assert 2 * head_dim * tiles <= 101_376 + 2 * head_dim * launch.block_m  # q or dout may stay in registers


def test_addresses_past_2_to_the_31_elements_are_right() -> None:
    source = """
        import torch
        from megallm_kernels import attention_backward as kernel

        def far(seed):  # [2, 1, 16], 2^30 elements between tokens: an int32 product of 2 tokens fits, of 3 does not
            buffer = torch.empty(2**31 + 2**30 + 16, dtype=torch.float16)
            x = buffer.as_strided((4, 1, 16), (2**30, 16, 1))
            return x.normal_(generator=torch.Generator().manual_seed(seed))

        def gradients(tensors, results, deterministic):
            q, k, v, dout, out, lse = tensors
            kernel.backward(dout, q, k, v, out, lse, None, None, None, batch_size=1, max_seqlen_q=4, max_seqlen_k=4,
                            causal=True, window=0, softcap=0.0, scale=0.25, deterministic=deterministic,
                            dq=results[0], dk=results[1], dv=results[2])

        q, k, v, dout = (far(seed) for seed in range(4))
        near = [x.contiguous() for x in (q, k, v, dout)]
        scores = torch.einsum("qnd,knd->nqk", near[0].float(), near[1].float()) * 0.25
        scores = scores.masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf"))
        out = torch.einsum("nqk,knd->qnd", scores.softmax(-1), near[2].float()).half()
        rest = [out, scores.logsumexp(-1)]
        for deterministic in (True, False):
            results, expected = [far(9) for _ in range(3)], [torch.empty(4, 1, 16).half() for _ in range(3)]
            gradients([q, k, v, dout, *rest], results, deterministic)
            gradients([*near, *rest], expected, deterministic)
            assert all(torch.equal(a, b) for a, b in zip(results, expected))
    """
    run_alone(textwrap.dedent(source))
