"""The attention forward kernel against fp64 torch, in the interpreter."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from kernel_checks import DTYPES, normal, run_alone, strided

from megallm.testing.tolerances import assert_close
from megallm_kernels.attention_forward import forward, plan
from megallm_kernels.attention_tiles import family, readable

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets_q: list[int], offsets_k: list[int], *,
    causal: bool = True, window: int = 0, softcap: float = 0.0, scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out, lse) in fp64: each sequence by itself, the whole matrix of scores."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.size(1) // k.size(1)
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    out, lse = torch.zeros_like(q), q.new_full((q.size(1), q.size(0)), float("-inf"))
    for (q0, q1), (k0, k1) in zip(pairwise(offsets_q), pairwise(offsets_k), strict=True):
        s = torch.einsum("qnd,knd->nqk", q[q0:q1], k[k0:k1]) * (q.size(2) ** -0.5 if scale is None else scale)
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        i = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        j = torch.arange(k1 - k0)[None, :]
        seen = torch.ones_like(i >= j) if not causal else j <= i
        seen = seen & (i - j < window) if window else seen
        s = s.masked_fill(~seen, float("-inf"))
        rows = torch.logsumexp(s, dim=-1)
        lse[:, q0:q1] = rows
        p = torch.where(seen, torch.exp(s - rows.unsqueeze(-1).nan_to_num(neginf=0.0)), 0.0)
        out[q0:q1] = torch.einsum("nqk,knd->qnd", p, v[k0:k1])
    return out, lse


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets_q: list[int], offsets_k: list[int], *,
    packed: bool = True, **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The kernel, with offsets or, where sequences are equally long, without."""
    lengths = [max((b - a for a, b in pairwise(offsets)), default=0) for offsets in (offsets_q, offsets_k)]
    cu = [torch.tensor(offsets, dtype=torch.int32) if packed else None for offsets in (offsets_q, offsets_k)]
    defaults = {"causal": True, "window": 0, "softcap": 0.0, "scale": q.size(2) ** -0.5}
    return forward(
        q, k, v, *cu, batch_size=len(offsets_q) - 1, max_seqlen_q=lengths[0], max_seqlen_k=lengths[1],
        **(defaults | settings),
    )  # fmt: skip


def compare(
    actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor], v: torch.Tensor, keys: int
) -> None:
    """out: p and the result are rounded to the dtype of v, each p relative to itself, and the p sum to 1: two roundings
    of magnitude |v|. fp32: sums over D and over the keys. lse: fp32 sums over D (in scores of its own magnitude)."""
    exact = v.dtype == torch.float32
    magnitude = v.double().abs().max().item()
    assert_close(actual[0], expected[0], magnitude=magnitude, terms=keys + v.size(2) if exact else 2, label="out")
    finite = expected[1].isfinite()
    assert torch.equal(actual[1].isfinite(), finite), "lse is -inf exactly where no key is seen"
    assert torch.all(actual[1][~finite] == float("-inf")) and not actual[0].isnan().any()
    largest = max(expected[1][finite].abs().max().item() if finite.any() else 0.0, 1.0)
    assert_close(actual[1][finite], expected[1][finite], magnitude=largest, terms=keys + v.size(2), label="lse")


def inputs(
    queries: int, keys: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = normal(queries, heads, head_dim, dtype=dtype, seed=1, scale=scale)
    return (q, *(normal(keys, kv_heads, head_dim, dtype=dtype, seed=s, scale=scale) for s in (2, 3)))


@EACH_DTYPE
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("heads", [(4, 2, 64), (3, 1, 80), (2, 2, 96), (1, 1, 128), (1, 1, 256), (2, 1, 5)], ids=str)
def test_forward_matches_fp64(dtype: torch.dtype, causal: bool, heads: tuple[int, int, int]) -> None:
    """Grouped, one and as many kv heads; every head dim of the table and an odd one."""
    q, k, v = inputs(2 * 71, 2 * 71, *heads, dtype)
    offsets = [0, 71, 142]
    actual = run(q, k, v, offsets, offsets, packed=False, causal=causal)
    compare(actual, reference(q, k, v, offsets, offsets, causal=causal), v, 71)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 70), (70, 1), (33, 97), (97, 33), (64, 32), (31, 64)], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_the_causal_mask_is_aligned_to_the_last_key(lengths: tuple[int, int], causal: bool) -> None:
    """More queries than keys: the first see none, their output is 0 and their lse -inf."""
    q, k, v = inputs(2 * lengths[0], 2 * lengths[1], 2, 1, 16, torch.float32)
    offsets = [[0, n, 2 * n] for n in lengths]
    for packed in (False, True):
        actual = run(q, k, v, *offsets, packed=packed, causal=causal)
        compare(actual, reference(q, k, v, *offsets, causal=causal), v, lengths[1])


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 64, 100, 1000])
@pytest.mark.parametrize("lengths", [(130, 130), (40, 130), (100, 70)], ids=str)
def test_a_sliding_window_sees_the_last_keys_only(window: int, lengths: tuple[int, int]) -> None:
    q, k, v = inputs(*lengths, 1, 1, 16, torch.float32)
    offsets = [[0, n] for n in lengths]
    actual = run(q, k, v, *offsets, packed=False, window=window)
    compare(actual, reference(q, k, v, *offsets, window=window), v, lengths[1])


@EACH_DTYPE
@pytest.mark.parametrize("offsets", [
    ([0, 97], [0, 97]), ([0, 0, 1, 40, 40, 97], [0, 0, 1, 40, 40, 97]), ([0, 50, 50, 97], [0, 3, 60, 97]),
    ([0, 33, 97], [0, 33, 33]), ([0, 20, 30], [0, 20, 30]), ([0], [0]), ([0, 0], [0, 0]),
    (list(range(0, 97, 3)), list(range(0, 97, 3))),
], ids=["one", "empty and of one token", "uneven", "no keys", "unused", "none", "one empty", "many"])  # fmt: skip
def test_packed_documents_do_not_see_each_other(dtype: torch.dtype, offsets: tuple[list[int], list[int]]) -> None:
    """Also: tokens past the last document give 0 and -inf, whatever stood in memory."""
    q, k, v = inputs(97, 97, 2, 1, 32, dtype)
    for settings in ({}, {"causal": False}, {"window": 7}):
        compare(run(q, k, v, *offsets, **settings), reference(q, k, v, *offsets, **settings), v, 97)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap_limits_the_scores(dtype: torch.dtype, softcap: float) -> None:
    q, k, v = inputs(70, 70, 2, 1, 16, dtype, 3.0)
    actual = run(q, k, v, [0, 70], [0, 70], packed=False, softcap=softcap, window=40)
    compare(actual, reference(q, k, v, [0, 70], [0, 70], softcap=softcap, window=40), v, 70)


@EACH_DTYPE
def test_large_scores_neither_overflow_nor_underflow(dtype: torch.dtype) -> None:
    """Scores of thousands: the largest takes the whole row."""
    q, k, v = inputs(70, 70, 1, 1, 64, dtype, 30.0)
    expected = reference(q, k, v, [0, 70], [0, 70])
    out, lse = run(q, k, v, [0, 70], [0, 70])
    assert expected[1].abs().max() > 1000 and out.isfinite().all()
    # scores are sums of 64 fp32 products; an error of theirs is one of p, relative
    scores = expected[1].abs().max().item()
    assert_close(lse, expected[1], terms=64)
    exact = dtype == torch.float32
    magnitude = v.double().abs().max().item()
    assert_close(out, expected[0], magnitude=magnitude * (scores if exact else 1.0), terms=64 if exact else 2)


@pytest.mark.parametrize("form", ["packed", "strided", "transposed", "expanded"])
def test_inputs_may_have_any_strides(form: str) -> None:
    q, k, v = inputs(50, 50, 4, 2, 16, torch.float32)
    expected = reference(q, k, v, [0, 50], [0, 50])
    if form == "packed":
        q, k, v = torch.cat([q, k, v], dim=1).split([4, 2, 2], dim=1)
    elif form == "strided":
        q, k, v = (strided(x) for x in (q, k, v))
    elif form == "transposed":
        q, k, v = (x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in (q, k, v))
    else:
        k, v = (x[:, :1].expand(50, 2, 16) for x in (k, v))
        expected = reference(q, k, v, [0, 50], [0, 50])
    compare(run(q, k, v, [0, 50], [0, 50]), expected, v, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("specialize", [False, True], ids=["three loops", "one loop"])
@pytest.mark.parametrize("window", [0, 20])
def test_descriptors_read_the_same_as_pointers(dtype: torch.dtype, specialize: bool, window: int) -> None:
    """The path of sm_90, with its one masked loop; D = 80 and a last tile past the end read zeros."""
    q, k, v = inputs(101, 101, 4, 2, 80, dtype)
    q, k, v = torch.cat([q, k, v], dim=1).split([4, 2, 2], dim=1)
    launch = dataclasses.replace(
        plan(0, 80, element_bytes=4), tma=True, warp_specialize=specialize, block_n=64
    )
    for offsets in ([0, 101], [0, 40, 40, 90]):
        for causal in (True, False) if not window else (True,):
            settings = {"causal": causal, "window": window}
            actual = run(q, k, v, offsets, offsets, launch=launch, **settings)
            compare(actual, reference(q, k, v, offsets, offsets, **settings), v, 101)


@pytest.mark.parametrize("shape", [(0, 5, 2), (5, 0, 2), (5, 5, 0), (0, 0, 2)], ids=str)
def test_empty_inputs_launch_nothing(shape: tuple[int, int, int]) -> None:
    queries, keys, heads = shape
    q, k, v = inputs(queries, keys, heads, 1, 16, torch.float32)
    out, lse = run(q, k, v, [0, queries], [0, keys])
    assert torch.equal(out, torch.zeros_like(q)) and torch.equal(lse, torch.full((heads, queries), float("-inf")))


def test_two_runs_are_bit_equal() -> None:
    q, k, v = inputs(97, 97, 2, 1, 32, torch.bfloat16)
    first, second = (run(q, k, v, [0, 30, 97], [0, 30, 97]) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_sections_of_heads_cover_every_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that fill the cache: each kv head is a section of its own, the last one short."""
    monkeypatch.setattr("megallm_kernels.attention_forward.CACHE_BYTES", 2 * 33 * 16 * 4 * 2)
    q, k, v = inputs(33 * 3, 33 * 3, 3, 3, 16, torch.float32)
    offsets = [0, 33, 66, 99]
    for packed in (False, True):
        compare(run(q, k, v, offsets, offsets, packed=packed), reference(q, k, v, offsets, offsets), v, 33)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_offsets_past_2_to_the_31_are_right(tma: bool) -> None:
    run_alone(f"""
import torch, dataclasses
from megallm_kernels.attention_forward import forward, plan
buffer = torch.empty(2**31 + 2**20, dtype=torch.float16)
q, k, v = (buffer[2**18 * i :].as_strided((3, 1, 16), (2**30, 16, 1)) for i in range(3))
for x in (q, k, v):
    x.normal_(generator=torch.Generator().manual_seed(1))
launch = dataclasses.replace(plan(0, 16, element_bytes=2), tma={tma})
settings = dict(batch_size=1, max_seqlen_q=3, max_seqlen_k=3, causal=True, window=0, softcap=0.0, scale=0.25)
far = forward(q, k, v, None, None, launch=launch, **settings)
near = forward(q.contiguous(), k.contiguous(), v.contiguous(), None, None, **settings)
assert torch.equal(far[0], near[0]) and torch.equal(far[1], near[1])
""")


@pytest.mark.parametrize(("change", "message"), [
    ({"window": -1}, "window"), ({"window": 4, "causal": False}, "needs causal"), ({"softcap": -1.0}, "softcap"),
    ({"scale": 0.0}, "scale"), ({"batch_size": 2}, "2 sequences"),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_settings_that_do_not_fit_are_refused_in_words(change: dict[str, Any], message: str) -> None:
    q, k, v = inputs(5, 5, 2, 1, 16, torch.float32)
    settings = {"batch_size": 1, "causal": True, "window": 0, "softcap": 0.0, "scale": 0.25} | change
    with pytest.raises(ValueError, match=message):
        forward(q, k, v, None, None, max_seqlen_q=5, max_seqlen_k=5, **settings)


def test_shapes_that_do_not_fit_are_refused_in_words() -> None:
    q, k, v = inputs(5, 5, 3, 2, 16, torch.float32)
    settings = {"batch_size": 1, "causal": True, "window": 0, "softcap": 0.0, "scale": 0.25}
    settings |= {"max_seqlen_q": 5, "max_seqlen_k": 5}
    with pytest.raises(ValueError, match="3 query heads do not divide among 2 kv heads"):
        forward(q, k, v, None, None, **settings)
    with pytest.raises(ValueError, match="one dtype"):
        forward(q, k[:, :1].half(), v[:, :1], None, None, **settings)
    with pytest.raises(ValueError, match="int32"):
        forward(q, k[:, :1], v[:, :1], *[torch.tensor([0, 5])] * 2, **settings)
    offsets = [torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 5], [0, 5], [])]
    for pair in (offsets[:2], [offsets[2]] * 2):  # offsets read past their end, otherwise
        with pytest.raises(ValueError, match="give both B [+] 1 offsets"):
            forward(q, k[:, :1], v[:, :1], *pair, **settings)
    with pytest.raises(ValueError, match="head dim 257"):
        forward(*inputs(5, 5, 1, 1, 257, torch.float32), None, None, **settings)


def test_scale_is_used_as_given() -> None:
    q, k, v = inputs(40, 40, 1, 1, 16, torch.float32)
    expected = reference(q, k, v, [0, 40], [0, 40], scale=1 / math.pi)
    compare(run(q, k, v, [0, 40], [0, 40], scale=1 / math.pi), expected, v, 40)


def test_a_family_holds_the_gpus_with_as_much_shared_memory() -> None:
    found = {arch: family(arch) for arch in (0, 80, 86, 87, 89, 90, 100, 120)}
    assert found == {0: 0, 80: 80, 86: 86, 87: 80, 89: 86, 90: 90, 100: 80, 120: 86}
    with pytest.raises(ValueError, match="compute capability 7.5 is below 8.0"):
        plan(75, 64, element_bytes=2)


@pytest.mark.parametrize("arch", [86, 89, 120])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tiles_of_small_gpus_fit_their_shared_memory(arch: int, head_dim: int) -> None:
    """The tile of queries, and that of keys and of values for each stage."""
    launch = plan(arch, head_dim, element_bytes=2)
    assert 2 * head_dim * (launch.block_m + 2 * launch.num_stages * launch.block_n) <= 101_376


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_tensors_are_copied_only_where_their_strides_are_read_badly(tma: bool) -> None:
    wide = torch.arange(3 * 2 * 24, dtype=torch.bfloat16).view(3, 2, 24)
    assert readable(wide[..., :16], tma=tma).data_ptr() == wide.data_ptr() or not tma  # 24 elements are 3 x 16 bytes
    for x in (wide[..., :5], wide[..., 3:8], wide[..., ::2], wide[:, :, :7].transpose(0, 1)):
        copy = readable(x, tma=tma)
        assert torch.equal(copy, x) and copy.stride(2) == 1
        assert copy.stride(0) % 8 == 0 and copy.stride(1) % 8 == 0 and copy.data_ptr() % 16 == 0
    expanded = wide[:, :1, :16].expand(3, 2, 16)
    assert torch.equal(readable(expanded, tma=tma), expanded) and (readable(expanded, tma=True).stride(1) > 0)


def test_a_dtype_that_fp32_arithmetic_does_not_serve_is_refused() -> None:
    q, k, v = inputs(5, 5, 2, 1, 16, torch.float64)
    with pytest.raises(ValueError, match="q is torch.float64"):
        run(q, k, v, [0, 5], [0, 5])
