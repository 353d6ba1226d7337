"""The operations against their specifications, forward and backward, in fp64, fp32 and bf16.

The specification runs in fp64 on the same (rounded) inputs; what an operation may be off by is derived from its dtype,
the size of the numbers and the length of its sums.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.autograd import gradcheck

from megallm.ops.activation import Activation, gated, gated_reference
from megallm.ops.adamw import adamw_, adamw_reference_
from megallm.ops.attention import attention, attention_reference, causal_mask
from megallm.ops.norm import layer_norm, rms_norm, rms_norm_reference
from megallm.ops.rope import rope, rope_reference
from megallm.testing.tolerances import assert_close

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
ROWS = pytest.mark.parametrize("rows", [0, 1, 5, 33])
ACTIVATIONS: list[Activation] = ["silu", "gelu", "gelu_tanh"]


def rand(*shape: int, dtype: torch.dtype, seed: int, strided: bool = False) -> torch.Tensor:
    """Normal numbers; strided: every other column of a wider tensor, so not contiguous."""
    wide = torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    wide = wide.to(dtype)
    return wide[..., ::2] if strided else wide[..., ::2].contiguous()


def compare(
    function: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    inputs: list[torch.Tensor],
    *,
    terms: int,
    grad_terms: list[int] | None = None,
    grad_magnitude: float = 0.0,
    strided: bool = False,
) -> None:
    """Outputs and all gradients of function(*inputs) equal those of reference in fp64. Inputs stay as they are.

    grad_magnitude: of what gradients are differences of, where these may be far smaller (0 = the gradients' own).
    """
    copies = [x.clone() for x in inputs]
    own = [x.detach().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    actual, expected = function(*own), reference(*wide)
    assert actual.dtype == inputs[0].dtype
    dy = rand(*expected.shape, dtype=actual.dtype, seed=99, strided=strided)
    actual.backward(dy)
    expected.backward(dy.double())
    assert_close(actual, expected, terms=terms, label="output")
    for i, (a, e) in enumerate(zip(own, wide, strict=True)):
        assert a.grad is not None and a.grad.dtype == a.dtype
        if e.grad.numel():
            magnitude = max(e.grad.abs().max().item(), grad_magnitude)
            grad_term = (grad_terms or [terms] * len(own))[i]
            assert_close(a.grad, e.grad, terms=grad_term, magnitude=magnitude, label=f"gradient {i}")
        assert torch.equal(inputs[i], copies[i]), "an input was overwritten"


@DTYPES
@ROWS
@pytest.mark.parametrize("width", [1, 7, 64])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_rms_norm_matches_its_reference(dtype: torch.dtype, rows: int, width: int, strided: bool) -> None:
    x = rand(rows, width, dtype=dtype, seed=1, strided=strided)
    weight = rand(width, dtype=dtype, seed=2)
    scale = x.double().pow(2).mean(-1).add(1e-5).rsqrt()  # with width 1 the two terms of dx cancel but for eps
    compare(
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: rms_norm_reference(x, w, 1e-5),
        [x, weight],
        terms=4,  # what is wide inside is rounded once; then the product with the weight
        grad_terms=[8 + 2 * width, 8 * max(rows, 1)],
        grad_magnitude=scale.max().item() * weight.abs().max().item() if rows and width == 1 else 0.0,
        strided=strided,
    )


@DTYPES
def test_rms_norm_of_heads_matches_its_reference(dtype: torch.dtype) -> None:
    """q and k norms: [T, heads, D], a slice of the packed projection."""
    packed = rand(9, 5, 12, dtype=dtype, seed=1)
    compare(
        lambda x, w: rms_norm(x[:, 1:4], w, 1e-6),
        lambda x, w: rms_norm_reference(x[:, 1:4], w, 1e-6),
        [packed, rand(12, dtype=dtype, seed=2)],
        terms=8,
        grad_terms=[96, 8 * 27],
    )


@DTYPES
def test_rms_norm_of_transposed_tokens_matches_its_reference(dtype: torch.dtype) -> None:
    compare(
        lambda x, w: rms_norm(x.transpose(0, 1), w, 1e-6),
        lambda x, w: rms_norm_reference(x.transpose(0, 1), w, 1e-6),
        [rand(4, 3, 12, dtype=dtype, seed=1), rand(12, dtype=dtype, seed=2)],
        terms=8,
        grad_terms=[96, 8 * 12],
    )


@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e4])
def test_rms_norm_statistics_of_bf16_are_fp32(magnitude: float) -> None:
    x = rand(17, 4096, dtype=torch.bfloat16, seed=1) * magnitude
    weight = torch.ones(4096, dtype=torch.bfloat16)
    assert_close(rms_norm(x, weight, 1e-12), rms_norm_reference(x.double(), weight.double(), 1e-12))


def test_norms_pass_gradcheck() -> None:
    x, w, b = (rand(*s, dtype=torch.float64, seed=i).requires_grad_() for i, s in enumerate([(3, 7), (7,), (7,)]))
    assert gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, w))
    assert gradcheck(lambda x, w, b: layer_norm(x, w, b, 1e-5), (x, w, b))


@DTYPES
@ROWS
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_rope_matches_its_reference(dtype: torch.dtype, rows: int, strided: bool) -> None:
    angle = rand(rows, 3, dtype=torch.float64, seed=3)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    compare(
        lambda x: rope(x, cos, sin),
        lambda x: rope_reference(x, cos.double(), sin.double()),
        [rand(rows, 5, 6, dtype=dtype, seed=1, strided=strided)],
        terms=3,
        strided=strided,
    )


def test_rope_keeps_lengths_and_its_backward_is_the_opposite_rotation() -> None:
    angle = rand(5, 4, dtype=torch.float64, seed=1)
    x = rand(5, 3, 8, dtype=torch.float64, seed=2)
    y = rope(x, angle.cos(), angle.sin())
    assert_close(y.norm(dim=-1), x.norm(dim=-1), terms=16)
    assert_close(rope(y, angle.cos(), -angle.sin()), x, terms=6)
    assert gradcheck(lambda x: rope(x, angle.cos(), angle.sin()), (x.requires_grad_(),))


@DTYPES
@ROWS
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_gated_activation_matches_its_reference(dtype: torch.dtype, rows: int, kind: Activation, strided: bool) -> None:
    compare(
        lambda x: gated(x, kind),
        lambda x: gated_reference(x, kind),
        [rand(rows, 14, dtype=dtype, seed=1, strided=strided)],
        terms=6,
        strided=strided,
    )


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gated_activation_passes_gradcheck(kind: Activation) -> None:
    assert gradcheck(lambda x: gated(x, kind), (rand(3, 10, dtype=torch.float64, seed=1).requires_grad_(),))


def dense_attention(window: int | None, mask: torch.Tensor | None, keep: torch.Tensor | None) -> Callable:
    """The definition by loops over heads and queries, on [B, S, N, D]."""

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, length, heads, dim = q.shape
        rows = []
        for b in range(batch):
            for i in range(length):
                for n in range(heads):
                    group = n // (heads // k.size(2))
                    if mask is not None:
                        seen = mask.expand(batch, 1, length, -1)[b, 0, i].nonzero().flatten()
                    else:
                        seen = torch.arange(max(0, i - window + 1) if window else 0, i + 1)
                    weights = torch.softmax(k[b, seen, group] @ q[b, i, n] / dim**0.5, 0)
                    if keep is not None:
                        weights = weights * keep[b, n, i, seen].double()
                    rows.append(weights @ v[b, seen, group])
        return torch.stack(rows).view(batch, length, heads * dim)

    return reference


@DTYPES
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("variant", ["causal", "window 1", "window 3", "window 99", "mask", "keep", "keep, window 3"])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_attention_matches_its_definition(dtype: torch.dtype, kv_heads: int, variant: str, strided: bool) -> None:
    length, dim = 7, 6
    window = int(variant.split()[-1]) if "window" in variant else None
    generator = torch.Generator().manual_seed(5)
    mask = keep = None
    if variant == "mask":  # each row of the batch sees its own places, at least one
        mask = torch.rand(2, 1, length, length, generator=generator) < 0.5
        mask[..., 0] = True
    if "keep" in variant:
        keep = (torch.rand(2, 4, length, length, generator=generator) < 0.7).to(dtype) * 1.25
    q = rand(2, length, 4, dim, dtype=dtype, seed=1, strided=strided)
    k, v = (rand(2, length, kv_heads, dim, dtype=dtype, seed=s, strided=strided) for s in (2, 3))
    inner = 8 if dtype == torch.bfloat16 else 4 * (dim + length)  # sums are in fp32: few roundings to bf16
    compare(
        lambda q, k, v: attention(q, k, v, sliding_window=window, mask=mask, keep=keep),
        dense_attention(window, mask, keep),
        [q, k, v],
        terms=inner,  # scores, their softmax, and the sum over values
        grad_terms=[2 * inner] + [2 * inner * 4 // kv_heads] * 2,
        grad_magnitude=1.0,  # one visible key has probability 1: its score's gradient is the difference of equals
        strided=strided,
    )


@DTYPES
def test_attention_of_one_new_token_to_a_cache_matches_its_definition(dtype: torch.dtype) -> None:
    q = rand(3, 1, 4, 6, dtype=dtype, seed=1)
    k, v = (rand(3, 9, 2, 6, dtype=dtype, seed=s) for s in (2, 3))
    mask = (torch.arange(9) <= torch.tensor([[8], [3], [0]])).view(3, 1, 1, 9)
    reference = dense_attention(None, mask, None)
    compare(lambda q, k, v: attention(q, k, v, mask=mask), reference, [q, k, v], terms=60, grad_terms=[120] * 3)


def test_attention_reference_is_the_definition() -> None:
    q, k, v = (rand(2, 5, n, 6, dtype=torch.float64, seed=n) for n in (4, 2, 2))
    mask = causal_mask(5, 5, 3, torch.device("cpu"))
    actual = attention_reference(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask=mask)
    assert_close(actual.transpose(1, 2).reshape(2, 5, 24), dense_attention(3, None, None)(q, k, v), terms=40)


def test_causal_mask_is_aligned_to_the_last_key() -> None:
    expected = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(causal_mask(2, 5, 3, torch.device("cpu")), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("divisor", [1.0, 3.7])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_matches_its_reference_over_steps(dtype: torch.dtype, divisor: float, weight_decay: float) -> None:
    options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": weight_decay}
    sizes = (1, 17, 1000)
    params = [rand(n, dtype=dtype, seed=n) for n in sizes]
    state = [[torch.zeros(n, dtype=dtype) for n in sizes] for _ in range(2)]
    steps = [torch.zeros(()) for _ in sizes]
    wide = [[t.double() for t in tensors] for tensors in (params, *state)]
    for step in range(1, 6):
        grads = [rand(n, dtype=dtype, seed=100 * step + n) for n in sizes]
        for p, g, m, v in zip(wide[0], grads, wide[1], wide[2], strict=True):
            adamw_reference_(p, g.double() / divisor, m, v, step=step, **options)
        scale = torch.tensor(divisor, dtype=torch.float64)
        adamw_(params, grads, *state, steps=steps, grad_divisor=scale, is_bad=torch.zeros(()), **options)
    assert [s.item() for s in steps] == [5.0] * 3
    for actual, expected in zip([params, *state], wide, strict=True):
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, terms=5 * 6)  # five steps of some six roundings


def test_adamw_reference_is_torch_adamw() -> None:
    p, own = rand(50, dtype=torch.float64, seed=1).requires_grad_(), rand(50, dtype=torch.float64, seed=1)
    m, v = torch.zeros_like(own), torch.zeros_like(own)
    optimizer = torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 5):
        p.grad = rand(50, dtype=torch.float64, seed=10 + step)
        optimizer.step()
        adamw_reference_(own, p.grad, m, v, step=step, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
        assert_close(own, p.detach(), terms=6 * step)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_adamw_changes_nothing_when_the_step_is_bad(dtype: torch.dtype) -> None:
    tensors = [rand(9, dtype=dtype, seed=s).abs() for s in range(4)]
    before = [t.clone() for t in tensors]
    steps = [torch.full((), 3.0)]
    nan = torch.tensor(torch.nan, dtype=torch.float64)
    adamw_(
        [tensors[0]], [tensors[1]], [tensors[2]], [tensors[3]], steps=steps, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8,
        weight_decay=0.1, grad_divisor=nan, is_bad=torch.ones(()),
    )  # fmt: skip
    for i in (0, 2, 3):
        assert torch.equal(tensors[i], before[i])
    assert steps[0].item() == 3.0


def test_adamw_of_nothing_does_nothing() -> None:
    one, zero = torch.ones(()), torch.zeros(())
    adamw_(
        [], [], [], [], steps=[], lr=1.0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_divisor=one,
        is_bad=zero,
    )  # fmt: skip
