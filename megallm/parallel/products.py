"""The three products of a linear layer, y = x W^T, dx = dy W and dW = dy^T x: torch's, or with fp8 factors.

A layer is given one of the two classes when it is built, and asks no more.

Letters: T tokens as the product sees them, in/out this rank's features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from megallm.ops.fp8 import E4M3, Fp8Recipe, Quantized, quantize, scaled_product, scaled_product_
from megallm.parallel.grad_sink import GradSink


class OutputGradient(NamedTuple):
    """dy, made ready for the two products of backward."""

    dy: torch.Tensor
    """[T, out]."""
    quantized: Quantized | None = None


class Products:
    """In the dtype of the factors, sums in fp32."""

    def output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b [T, out] of x [T, in], weight [out, in], bias [out]."""
        return F.linear(x, weight, bias)

    def ready(self, dy: torch.Tensor) -> OutputGradient:
        """dy [T, out] for the methods below."""
        return OutputGradient(dy)

    def input_gradient(self, gradient: OutputGradient, weight: torch.Tensor) -> torch.Tensor:
        """dy W [T, in]."""
        return gradient.dy @ weight

    def weight_gradient(self, gradient: OutputGradient, x: torch.Tensor, sink: GradSink | None) -> torch.Tensor | None:
        """dy^T x [out, in], added to the sink in its dtype; returned if there is none."""
        if sink is None:
            return gradient.dy.t() @ x
        sink.add_product(gradient.dy, x)
        return None


@dataclass
class Switch:
    """Whether copies of weights are used."""

    is_on: bool = False


class TransposedProducts(Products):
    """y from a transposed copy [in, out] of one weight, for few rows on CPUs: with 1, 8 and 32 rows the products of a
    model of 5M parameters take 1.2, 2.3 and 5.6 ms where `Products` takes 2.2, 3.4 and 6.5 (fp32, one thread)."""

    def __init__(self, weight: torch.Tensor, switch: Switch) -> None:
        self._copy, self._switch = weight.detach().t().contiguous(), switch

    def output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b [T, out], with the numbers that the weight had when it was copied if the switch is on."""
        if not self._switch.is_on:
            return super().output(x, weight, bias)
        return torch.mm(x, self._copy) if bias is None else torch.addmm(bias, x, self._copy)


class Fp8Products(Products):
    """Factors in fp8 by a recipe; in/out are multiples of 16, T is anything."""

    def __init__(self, recipe: Fp8Recipe) -> None:
        self._emulate, self._gradient_format = recipe.emulate, recipe.gradient_format
        self._rowwise = recipe.scaling == "rowwise"

    def output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b [T, out]; the bias is added to the rounded product."""
        if x.size(0) == 0:
            return super().output(x, weight, bias)
        a, b = quantize(x, E4M3, rowwise=self._rowwise), quantize(weight, E4M3, rowwise=self._rowwise)
        y = scaled_product(a, b, dtype=x.dtype, emulate=self._emulate, fast=True)
        return y if bias is None else y.add_(bias)

    def ready(self, dy: torch.Tensor) -> OutputGradient:
        """dy with its fp8 form, which both products of backward use if there is one scale."""
        if dy.size(0) == 0:
            return OutputGradient(dy)
        return OutputGradient(dy, quantize(dy, self._gradient_format, rowwise=self._rowwise))

    def input_gradient(self, gradient: OutputGradient, weight: torch.Tensor) -> torch.Tensor:
        """dy W [T, in]."""
        if gradient.quantized is None:
            return super().input_gradient(gradient, weight)
        # Rowwise, the scales are of W's columns: W in fp8 is another matrix than in forward where numbers are small.
        b = quantize(weight.t(), E4M3, rowwise=True) if self._rowwise else quantize(weight, E4M3).transposed()
        return scaled_product(gradient.quantized, b, dtype=gradient.dy.dtype, emulate=self._emulate)

    def weight_gradient(self, gradient: OutputGradient, x: torch.Tensor, sink: GradSink | None) -> torch.Tensor | None:
        """dy^T x [out, in]; T is filled up to a multiple of 16 with zeros. Rowwise: the product of `Products`.

        Rowwise, both factors would need scales of their columns; torchao's rowwise_with_gw_hp leaves this product alone
        too, as the most accurate of its recipes, and it alone is summed straight into the sink.
        """
        if gradient.quantized is None or self._rowwise:
            return super().weight_gradient(gradient, x, sink)
        a, b = gradient.quantized.transposed(), quantize(x, E4M3).transposed()
        if sink is None:
            return scaled_product(a, b, dtype=gradient.dy.dtype, emulate=self._emulate)
        sink.add_written(lambda out: scaled_product_(out, a, b, emulate=self._emulate))
        return None


PLAIN = Products()
