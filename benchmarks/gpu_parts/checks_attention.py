"""Checks of attention: head dims, masks, packed documents, layouts, dtypes, both backward forms.

Letters: T tokens, S sequence length, N query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from gpu_parts import references
from gpu_parts.checks import CheckUnit
from gpu_parts.compare import TF32X3, UNIT, Finding, compare, identical, poisoned
from gpu_parts.place import Place


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of calling attention."""

    name: str
    dim: int
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    documents: bool = False
    """Packed documents of uneven lengths, one empty, some tokens past the last."""
    aligned: bool = True
    """False: slices that begin 2 bytes past a multiple of 16, which takes the pointer path."""
    deterministic: bool = False
    dtype: torch.dtype | None = None
    scale_up: float = 1.0
    """Factor on q: large scores."""


def units(place: Place) -> list[CheckUnit]:
    """Each head dim with each path; masks and documents at the commonest one and at an odd one."""
    variants = []
    for dim in (64, 128) if place.tiny else (64, 80, 96, 128, 256):
        variants.append(Variant(name=f"D {dim}", dim=dim))
        variants.append(Variant(name=f"D {dim} deterministic", dim=dim, deterministic=True))
        if place.tiny or dim in (64, 128, 256):
            variants.append(Variant(name=f"D {dim} unaligned", dim=dim, aligned=False))
            if not place.tiny:
                one = Variant(name=f"D {dim} unaligned deterministic", dim=dim, aligned=False, deterministic=True)
                variants.append(one)
                for exact in (False, True):
                    name = f"D {dim} fp32{' deterministic' if exact else ''}"
                    variants.append(Variant(name=name, dim=dim, dtype=torch.float32, deterministic=exact))
    for dim in (64,) if place.tiny else (128, 80, 256):
        variants.append(Variant(name=f"D {dim} full", dim=dim, causal=False))
        variants.append(Variant(name=f"D {dim} window", dim=dim, window=place.pick(200, 9)))
        variants.append(Variant(name=f"D {dim} documents", dim=dim, documents=True))
        variants.append(
            Variant(name=f"D {dim} documents window deterministic", dim=dim, documents=True,
                    window=place.pick(100, 7), deterministic=True)
        )  # fmt: skip
        variants.append(Variant(name=f"D {dim} softcap", dim=dim, softcap=20.0))
        variants.append(Variant(name=f"D {dim} large scores", dim=dim, scale_up=4.0))
    units = [
        CheckUnit(op="attention", name=each.name, run=partial(_attention, variant=each)) for each in variants
    ]
    packed = CheckUnit(op="attention", name="packed buffer", run=_packed)
    return [*units, packed]


def _offsets(total: int) -> list[int]:
    """Documents: long, empty, of one token, odd; the last ends before the tokens do."""
    inner = [0, total // 2, total // 2, total // 2 + 1, (3 * total) // 4]
    return [*inner, total - 5]


def _draw(place: Place, generator: torch.Generator, variant: Variant, tokens: int) -> list[torch.Tensor]:
    """q, k, v as slices of one packed buffer [T, N + 2K, D]."""
    heads, kv_heads = place.pick(8, 4), 2
    shift = 0 if variant.aligned else 1
    wide = variant.dim + (0 if variant.aligned else 2)
    buffer = place.normal(tokens, heads + 2 * kv_heads, wide, generator=generator, dtype=variant.dtype)
    buffer = buffer[..., shift : shift + variant.dim]
    buffer[:, :heads] *= variant.scale_up
    return list(buffer.split([heads, kv_heads, kv_heads], dim=1))


def _attention(place: Place, generator: torch.Generator, *, variant: Variant) -> list[Finding]:
    from megallm_kernels.attention import attention

    sequences = 1 if variant.documents else 2
    length = place.pick(777, 37)
    tokens = sequences * length
    q, k, v = _draw(place, generator, variant, tokens)
    offsets = _offsets(tokens) if variant.documents else [i * length for i in range(sequences + 1)]
    cu = torch.tensor(offsets, dtype=torch.int32, device=place.device) if variant.documents else None
    dout = place.normal(tokens, q.size(1), variant.dim, generator=generator, dtype=variant.dtype)
    leaves = references.wide(q, k, v)
    mask = {"causal": variant.causal, "window": variant.window, "softcap": variant.softcap}
    expected = references.packed_attention(*leaves, offsets, **mask)  # type: ignore[arg-type]
    gradients = torch.autograd.grad((expected * dout.double()).sum(), leaves)
    runs = []
    for _ in range(2):
        own = [t.detach().requires_grad_() for t in (q, k, v)]  # the same strided memory
        with poisoned():
            out, _ = attention(
                *own, cu, cu, len(offsets) - 1, length, length, variant.causal, variant.window, variant.softcap,
                1.0 / math.sqrt(variant.dim), variant.deterministic,
            )  # fmt: skip
            runs.append((out, *torch.autograd.grad(out, own, dout)))
    wide = TF32X3 if q.dtype == torch.float32 and place.is_cuda else UNIT[torch.float32]
    findings = []
    for name, result, again, reference in zip(
        ("out", "dq", "dk", "dv"), *runs, (expected, *gradients), strict=True
    ):
        # out: p and out are rounded. Gradients: p, ds, delta (from the rounded out) and the result; ds = p (dp - delta)
        # is a difference, whose rounding counts for more than one.
        roundings = 2 if name == "out" else 12
        terms = length if place.is_cuda or q.dtype != torch.float32 else 16 * length
        findings.append(compare(name, result, reference, roundings=roundings, terms=terms, wide=wide))
        if variant.deterministic or name == "out":
            findings.append(identical(name, result, again))
    return findings


def _packed(place: Place, generator: torch.Generator) -> list[Finding]:
    """The packed form gives what the unpacked one gives, and one gradient buffer."""
    from megallm_kernels.attention import attention, packed_attention

    length, dim, heads, kv_heads = place.pick(700, 33), 64, 4, 2
    qkv = place.normal(2 * length, heads + 2 * kv_heads, dim, generator=generator)
    settings = {
        "cu_seqlens_q": None, "cu_seqlens_k": None, "batch_size": 2, "max_seqlen_q": length, "max_seqlen_k": length,
        "causal": True, "window": 0, "softcap": 0.0, "scale": dim**-0.5, "deterministic": True,
    }  # fmt: skip
    own, other = (qkv.clone().requires_grad_() for _ in range(2))
    with poisoned():
        out, lse = packed_attention(own, heads, **settings)
        dout = torch.randn_like(out)
        (dqkv,) = torch.autograd.grad(out, own, dout)
        reference, reference_lse = attention(*other.split([heads, kv_heads, kv_heads], dim=1), **settings)
        (expected,) = torch.autograd.grad(reference, other, dout)
    pairs = (("out", out, reference), ("lse", lse, reference_lse), ("dqkv", dqkv, expected))
    return [compare(name, a, b) for name, a, b in pairs]
