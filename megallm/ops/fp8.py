"""Matrix products of fp8 factors, each scaled just before its product to the range of its format.

    a b^T  ~  (q_a q_b^T) / (s_a s_b)      q = fp8(x s), s the largest power of 2 with max|x| s <= the format's largest

Sums are in fp32. A scale belongs to a whole tensor (tensorwise) or to a row, the contracted dim being the last of both
factors (rowwise). Scales are powers of 2: multiplying by one is exact, so nothing saturates, and a number is rounded
alike whatever the largest of its tensor is, unless that is over 14,000 times larger (e5m2: 470 million times). Hence
tp, dp and microbatches, each of which sees a largest of its own, change numbers only where they are that small.

    recipe       y = x W^T        dx = dy W        dW = dy^T x
    tensorwise   e4m3, e4m3       e5m2, e4m3       e5m2, e4m3
    rowwise      e4m3, e4m3       e4m3, e4m3       not in fp8

The formats are those of TransformerEngine's current scaling and of torchao's recipes tensorwise and rowwise_with_gw_hp.
torch._scaled_mm wants both factors contiguous along the contracted dim, dims in multiples of 16 (but for a's rows),
fp32 scales of shape [] or [M, 1] and [1, N], and one factor in e4m3. Hardware: compute capability 8.9.

Letters: M, N rows of a and b, K their contracted dim; T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megallm.config.numerics import NumericsConfig

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""What the sides of a weight must be multiples of."""
_SMALLEST = 2.0**-100
"""Taken for the largest of tensors below it: keeps the scale of zeros finite."""
_SIGN_AND_EXPONENT = -(1 << 23)
"""Of the bits of an fp32 number."""


@dataclass(frozen=True, kw_only=True)
class Fp8Recipe:
    """Which products of a model are in fp8, and how."""

    scaling: Literal["tensorwise", "rowwise"] = "tensorwise"
    keep_ends: bool = False
    """Whether the first and the last layer of the model are left out."""
    emulate: bool = False
    """Whether products are `reference_product` on every device: any can then run them, slowly."""

    @property
    def gradient_format(self) -> torch.dtype:
        """Of dy: e5m2's range for one scale a tensor, e4m3's precision where each row has its own."""
        return E5M2 if self.scaling == "tensorwise" else E4M3


def fp8_recipe(numerics: NumericsConfig) -> Fp8Recipe | None:
    """What `numerics` asks for; None unless its precision is fp8."""
    if numerics.precision != "fp8":
        return None
    return Fp8Recipe(scaling=numerics.fp8_recipe, keep_ends=numerics.fp8_keep_ends, emulate=numerics.fp8_emulate)


@dataclass(frozen=True)
class Quantized:
    """A matrix in fp8."""

    values: torch.Tensor
    """[M, K] e4m3 or e5m2, contiguous."""
    inverse: torch.Tensor
    """What values are multiplied with to mean what they stand for: fp32 [], or [M, 1]; a power of 2."""

    def transposed(self) -> Quantized:
        """[K, M'], M' = M in whole multiples of 16, the added columns zero. One scale for the tensor only."""
        assert self.inverse.dim() == 0
        rows, columns = self.values.shape
        if rows % MULTIPLE == 0:
            return Quantized(self.values.t().contiguous(), self.inverse)
        padded = self.values.new_zeros(columns, -(-rows // MULTIPLE) * MULTIPLE)
        padded[:, :rows].copy_(self.values.t())
        return Quantized(padded, self.inverse)


def quantize(x: torch.Tensor, dtype: torch.dtype, *, rowwise: bool = False) -> Quantized:
    """x [M, K] bf16 or fp32 in `dtype`, with one scale, or one a row.

    Every number is rounded to nearest. What shares its scale with an infinity or a NaN becomes NaN (a cast alone would
    hide an infinity: torch 2.13 turns it into e4m3's 448), so that no product hides it.
    """
    smallest, largest = torch.aminmax(x, dim=1, keepdim=True) if rowwise else torch.aminmax(x)
    amax = torch.maximum(-smallest, largest).float()
    scale = torch.finfo(dtype).max / amax.clamp(min=_SMALLEST)
    scale = (scale.view(torch.int32) & _SIGN_AND_EXPONENT).view(torch.float32)
    scale = torch.where(amax.isfinite(), scale, torch.nan)
    return Quantized((x * scale.to(x.dtype)).to(dtype).contiguous(), scale.reciprocal())


def reference_product(a: Quantized, b: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """The specification: a b^T [M, N] of the numbers that a and b stand for, summed in fp32, rounded once."""
    return ((a.values.float() * a.inverse) @ (b.values.float() * b.inverse).t()).to(dtype)


def tensor_core_product(
    a: Quantized, b: Quantized, dtype: torch.dtype, *, fast: bool = False, out: torch.Tensor | None = None
) -> torch.Tensor:
    """a b^T [M, N], written into `out` if there is one."""
    return torch._scaled_mm(
        a.values, b.values.t(), scale_a=a.inverse, scale_b=b.inverse.t(), out_dtype=dtype, use_fast_accum=fast, out=out
    )


def scaled_product(
    a: Quantized, b: Quantized, *, dtype: torch.dtype, emulate: bool = False, fast: bool = False
) -> torch.Tensor:
    """a b^T [M, N] in bf16 or fp32: by tensor cores on a GPU, else and with `emulate` by the specification.

    fast: Hopper's partial sums stay in the tensor core, which keeps about 14 bits (arXiv 2412.19437, section 3.3.2).
    TransformerEngine and torchao take that for y and not for gradients.
    """
    if emulate or not a.values.is_cuda:
        return reference_product(a, b, dtype)
    return tensor_core_product(a, b, dtype, fast=fast)


def scaled_product_(out: torch.Tensor, a: Quantized, b: Quantized, *, emulate: bool = False) -> None:
    """Writes a b^T into out [M, N], contiguous bf16 or fp32; without a temporary where cuBLAS can."""
    is_aligned = out.storage_offset() * out.element_size() % 16 == 0
    if emulate or not a.values.is_cuda or not is_aligned:
        out.copy_(scaled_product(a, b, dtype=out.dtype, emulate=emulate))
        return
    tensor_core_product(a, b, out.dtype, out=out)


def fits(shape: torch.Size | tuple[int, ...]) -> bool:
    """Whether a weight of this shape has fp8 products."""
    return all(size % MULTIPLE == 0 for size in shape)


def hardware_refusal(device: torch.device) -> str | None:
    """Why fp8 products cannot run on `device`; None if they can."""
    needed = "needs a GPU with fp8 tensor cores (compute capability 8.9 or newer: Ada, Hopper, Blackwell), this is"
    if device.type != "cuda":
        return f"{needed} a {device.type}"
    if torch.version.hip is not None:
        return f"{needed} an AMD GPU, whose fp8 formats differ"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"{needed} {torch.cuda.get_device_name(device)} ({major}.{minor})"
    return None
