"""What is timed of attention, beside whom. All contenders get the same slices of one packed [T, N + 2K, D] buffer.

FLOPs: 4 D for each visible pair of query and key in forward, 2.5 times that in backward (its five products).

Letters: T = B S tokens, B sequences of S, N query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from gpu_parts.calls import (
    OURS,
    Buffers,
    Case,
    Contender,
    Directions,
    autograd_directions,
    backend_absent,
    forced,
    needs,
    needs_cuda,
)
from gpu_parts.place import Place


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One attention call."""

    tokens: int
    seq: int
    """Longest sequence."""
    heads: int
    kv_heads: int
    dim: int
    window: int = 0
    offsets: tuple[int, ...] = ()
    """Of packed documents; empty: equal sequences of `seq`."""

    @property
    def batch(self) -> int:
        """Sequences."""
        return max(len(self.offsets) - 1, 0) or self.tokens // self.seq

    @property
    def scale(self) -> float:
        """1 / sqrt(D)."""
        return 1.0 / math.sqrt(self.dim)

    @property
    def flops(self) -> float:
        """Of forward: 4 D N for each visible pair, causal."""
        lengths = [b - a for a, b in pairwise(self.offsets)] or [self.seq] * self.batch

        def pairs(n: int) -> float:
            hidden = max(n - self.window, 0) if self.window else 0
            return (n * (n + 1) - hidden * (hidden + 1)) / 2

        return 4.0 * self.dim * self.heads * sum(map(pairs, lengths))


def attention_cases(place: Place, *, section: str, dims: Sequence[int], variants: bool) -> list[Case]:
    """B S = 16384 tokens, 32/8 heads; the demanded shape first. `variants`: packed documents, a sliding window."""
    tokens = place.pick(16384, 64)
    lengths = (32,) if place.tiny else (8192, 4096, 2048, 16384, 1024, 512)
    make = partial(Shape, tokens=tokens, heads=place.pick(32, 4), kv_heads=place.pick(8, 2))
    shapes = [
        (f"D {dim} S {seq}", make(seq=seq, dim=16 if place.tiny else dim)) for dim in dims for seq in lengths
    ]
    if variants:
        dim, window = place.pick(128, 16), place.pick(4096, 20)
        cuts = (0, 5, 21, 64) if place.tiny else (0, 700, 1900, 2100, 5100, 5900, 12000, 12400, 16384)
        longest = max(b - a for a, b in pairwise(cuts))
        shapes.append((f"D {dim} documents", make(seq=longest, dim=dim, offsets=cuts)))
        shapes.append((f"D {dim} S {tokens} window {window}", make(seq=tokens, dim=dim, window=window)))
    return [_case(place, section, name, shape) for name, shape in shapes]


def _case(place: Place, section: str, name: str, shape: Shape) -> Case:
    flops = shape.flops
    is_plain = not shape.offsets and not shape.window
    elements = shape.tokens * (shape.heads + 2 * shape.kv_heads) * shape.dim
    return Case(
        section=section, op="attention", name=name,
        size=shape.dim if is_plain and shape.seq == place.pick(4096, 32) else -1,
        make=partial(_buffers, shape=shape), contenders=_contenders(place, shape, is_plain),
        flops={"fwd": flops, "bwd": 2.5 * flops, "both": 3.5 * flops},
        set_bytes=float(elements * place.dtype.itemsize),
    )  # fmt: skip


def _contenders(place: Place, shape: Shape, is_plain: bool) -> tuple[Contender, ...]:
    from torch.nn.attention import SDPBackend

    ours = Contender(name=OURS, build=partial(_rows_build, partial(_ours, shape)))
    packages = (
        Contender(name="flash-attn", build=partial(_flash_build, shape),
                  why_absent=backend_absent("attention", "flash-attn", place, shape.dim)),
        Contender(name="flash-attn-2", build=partial(_batched_build, shape, partial(_flash2, shape), False),
                  why_absent=partial(_no_second_flash, place)),
    )  # fmt: skip
    if shape.offsets:
        build = partial(_rows_build, partial(_varlen, shape))
        return ours, Contender(name="torch varlen", build=build, why_absent=_no_varlen)
    flex = Contender(
        name="FlexAttention", build=partial(_flex_build, shape), why_absent=needs_cuda, compiles=True,
        note="torch.compile, default mode",
    )  # fmt: skip
    if not is_plain:
        return ours, flex, *packages
    fused = [
        Contender(name=name, build=partial(_sdpa_build, shape, backend), why_absent=needs_cuda)
        for name, backend in (
            ("SDPA flash", SDPBackend.FLASH_ATTENTION), ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION)
        )
    ]  # fmt: skip
    plain = Contender(name="torch", build=partial(_sdpa_build, shape, None))
    result: tuple[Contender, ...] = (ours, *fused, plain, *packages)
    # compiling FlexAttention takes seconds a shape: at two of them it stands for the others
    return (*result, flex) if shape.dim == 128 and shape.seq in (2048, 8192) else result


def _buffers(place: Place, generator: torch.Generator, count: int, *, shape: Shape) -> list[Buffers]:
    """inputs: q [T, N, D], k, v [T, K, D]; grads: of out [T, N, D]."""
    widths = [shape.heads, shape.kv_heads, shape.kv_heads]
    result = []
    for _ in range(count):
        packed = place.normal(shape.tokens, sum(widths), shape.dim, generator=generator)
        inputs = tuple(part.detach().requires_grad_() for part in packed.split(widths, dim=1))
        grad = place.normal(shape.tokens, shape.heads, shape.dim, generator=generator)
        offsets = torch.tensor(shape.offsets, dtype=torch.int32, device=place.device) if shape.offsets else None
        result.append(Buffers(inputs=inputs, grads=(grad,), constants={"cu_seqlens": offsets}))
    return result


def _rows_build(function: Callable[..., Any], sets: Sequence[Buffers]) -> Directions:
    return autograd_directions(function, sets)


def _batched_build(
    shape: Shape, function: Callable[..., Any], heads_first: bool, sets: Sequence[Buffers]
) -> Directions:
    """[B, S, heads, D] views of the same memory, or [B, heads, S, D] with `heads_first`."""

    def batched(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().unflatten(0, (shape.batch, shape.seq))
        return x.transpose(1, 2) if heads_first else x

    own = [
        Buffers(inputs=tuple(batched(x).requires_grad_() for x in each.inputs), grads=(batched(each.grads[0]),))
        for each in sets
    ]
    return autograd_directions(function, own)


def _sdpa_build(shape: Shape, backend: Any, sets: Sequence[Buffers]) -> Directions:
    """With as many key heads as the model has; where the back end refuses that, with keys and values repeated."""
    function = partial(_sdpa, shape, backend)
    directions = _batched_build(shape, function, True, sets)
    try:
        directions["both"].call(0)
        return directions
    except RuntimeError:
        group, repeated = shape.heads // shape.kv_heads, []
        for each in sets:
            q, *rest = (x.detach() for x in each.inputs)
            repeated.append(replace(each, inputs=(q, *(x.repeat_interleave(group, dim=1) for x in rest))))
    directions = _batched_build(shape, function, True, repeated)
    note = "keys and values repeated for each query head"
    return {name: replace(each, note=note) for name, each in directions.items()}


def _ours(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cu_seqlens: torch.Tensor | None) -> Any:
    from megallm_kernels.attention import attention

    settings = (shape.batch, shape.seq, shape.seq, True, shape.window, 0.0, shape.scale, False)
    return attention(q, k, v, cu_seqlens, cu_seqlens, *settings)[0]


def _sdpa(shape: Shape, backend: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One fused form, or torch's own choice (None)."""
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    from torch.nn.attention import sdpa_kernel

    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _flash_build(shape: Shape, sets: Sequence[Buffers]) -> Directions:
    """The library's own call of its back end flash-attn, which takes version 4 or 2: the note says whose it was."""
    from megallm.ops.attention import attention
    from megallm.ops.backends import flash_attention_module

    backends = forced("attention", "flash-attn")

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attention(q, k, v, sliding_window=shape.window or None, backends=backends)
        return out.unflatten(2, (shape.heads, shape.dim))

    module, _ = flash_attention_module(sets[0].inputs[0].device)
    directions = _batched_build(shape, function, False, sets)
    return {name: replace(each, note=f"{module}.flash_attn_func") for name, each in directions.items()}


def _flash2(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from flash_attn import flash_attn_func

    window = (shape.window - 1, 0) if shape.window else (-1, -1)
    return flash_attn_func(q, k, v, causal=True, window_size=window)


def _no_second_flash(place: Place) -> str | None:
    """Why version 2 is not timed beside the library's choice."""
    from megallm.ops.backends import FLASH_ATTENTION_2, flash_attention_module

    why = needs("flash_attn.flash_attn_interface")()
    if why is None and flash_attention_module(place.device)[0] == FLASH_ATTENTION_2:
        return "flash-attn is version 2 here"
    return why


def _flex_build(shape: Shape, sets: Sequence[Buffers]) -> Directions:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window = shape.window or shape.seq

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i >= j) & (i - j < window)

    def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
        return i >= j

    import torch._functorch.config as functorch_config

    functorch_config.donated_buffer = False  # or a backward could not be repeated on one forward
    device = sets[0].inputs[0].device
    mask = create_block_mask(visible if shape.window else causal, None, None, shape.seq, shape.seq, device=device)
    torch._dynamo.reset()
    function = torch.compile(flex_attention, dynamic=False)
    return _batched_build(shape, partial(function, block_mask=mask, enable_gqa=True), True, sets)


def _varlen(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cu_seqlens: torch.Tensor) -> Any:
    """torch's packed form, whose causal switch has had two names."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    settings: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        settings["enable_gqa"] = True
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, shape.seq, shape.seq, **settings)


def _no_varlen() -> str | None:
    return needs("torch.nn.attention.varlen")()
