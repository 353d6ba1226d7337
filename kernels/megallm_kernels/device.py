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

OLDEST_ARCH = 80
"""Ampere: older GPUs have no bf16 and no asynchronous copies, which every kernel uses."""

_SHARED_BYTES = {80: 166_912, 87: 166_912, 90: 232_448, 100: 232_448, 103: 232_448, 110: 232_448}
"""Shared memory that one program may take (CUDA C++ Programming Guide, compute capabilities); all others: the least."""
_LEAST_SHARED_BYTES = 101_376


def check_arch(arch: int) -> None:
    """ValueError for a GPU older than these kernels; 0, the interpreter, is none."""
    if arch != 0 and arch < OLDEST_ARCH:
        found, oldest = (f"{a // 10}.{a % 10}" for a in (arch, OLDEST_ARCH))
        raise ValueError(f"compute capability {found} is below {oldest}, the oldest these kernels run on: use torch's")


def shared_limit_bytes(arch: int) -> int:
    """Shared memory that one program may take; the interpreter's has no limit. ValueError below OLDEST_ARCH."""
    check_arch(arch)
    return _SHARED_BYTES.get(arch, _LEAST_SHARED_BYTES) if arch else 1 << 31


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtypes(**tensors: torch.Tensor | None) -> None:
    """ValueError unless each has a dtype that fp32 arithmetic serves: float32, bfloat16 or float16."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}: the kernel takes float32, bfloat16 and float16, cast it")


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
