"""What launch settings depend on: the GPU's architecture and size, asked once per device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ParamSpec, TypeVar

import torch


@dataclass(frozen=True, kw_only=True)
class Target:
    """The machine that a kernel is launched on."""

    arch: int
    """Compute capability times ten: 80 for A100, 90 for H100 and H200; 0 for the CPU (Triton's interpreter)."""
    num_sms: int
    """Multiprocessors: persistent kernels start a small multiple of so many programs."""


INTERPRETER = Target(arch=0, num_sms=2)
"""CPU tensors: two programs are enough to test a persistent grid."""


def target_of(tensor: torch.Tensor) -> Target:
    """The target on which kernels over `tensor` run."""
    return _cuda_target(tensor.device.index or 0) if tensor.is_cuda else INTERPRETER


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def on_its_device(launcher: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """`launcher`, whose kernels run on the GPU of its first argument, a tensor, whichever GPU is current.

    Triton launches on the current one, which need not be where the tensors are.
    """

    @functools.wraps(launcher)
    def launch(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        first = args[0]
        if isinstance(first, torch.Tensor) and first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return launcher(*args, **kwargs)
        return launcher(*args, **kwargs)

    return launch


@cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(arch=properties.major * 10 + properties.minor, num_sms=properties.multi_processor_count)
