"""Memory of the host that a GPU copies from and to at full speed, and that a CPU reads at full speed.

Huge pages: a stream through ordinary pages of 4 KiB waits for their translation (21 GB/s against 30 GB/s of one core,
AMD EPYC 9R14). Pinned where there is a GPU: copies are then asynchronous. torch's own pinned allocator is not used: it
rounds every size up to a power of two, which for a few large buffers can double them.
"""

from __future__ import annotations

import weakref

import torch

from megallm_kernels.cpu_adamw import load


def host_zeros(numel: int, dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    """Zeros [numel] in host memory, in huge pages where the system gives them; it lives until it is freed.

    RuntimeError if it cannot be pinned.
    """
    made = torch.empty(numel, dtype=dtype)
    module = load().module
    if module is not None and numel:
        module.advise_huge_pages(address=made.data_ptr(), num_bytes=made.nbytes)
    made.zero_()
    if pinned and numel:
        _pin(made)
    return made


def _pin(tensor: torch.Tensor) -> None:
    address, cudart = tensor.data_ptr(), torch.cuda.cudart()
    error = cudart.cudaHostRegister(address, tensor.nbytes, 0)
    if int(error) != 0:
        raise RuntimeError(
            f"{tensor.nbytes / 2**30:.2f} GiB of host memory could not be pinned (cudaHostRegister: {error}): raise "
            "the limit on locked memory (ulimit -l), or keep less on the host"
        )
    weakref.finalize(tensor.untyped_storage(), cudart.cudaHostUnregister, address)
