"""What launch settings depend on: the GPU's architecture and size, asked once per device."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cache

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


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """While it is entered, kernels are launched on the tensor's GPU, whichever is current (Triton takes that one)."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


@cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(arch=properties.major * 10 + properties.minor, num_sms=properties.multi_processor_count)
