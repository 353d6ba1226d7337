"""Many matrix products of different lengths in one call: the experts of a mixture.

    y[r] = x[r] weight[e]^T        for the rows r of expert e, offsets[e] <= r < offsets[e + 1]

Rows are sorted by expert with `megallm_kernels.permute`, whose order also undoes it.

Letters: R rows, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megallm.ops.backends import DEFAULT, Backends


def grouped_linear_reference(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The specification: x [R, in], weight [E, out, in], offsets [E+1] ascending; rows past the last are zero."""
    ends = offsets.tolist()
    y = [F.linear(x[start:stop], w) for w, start, stop in zip(weight, ends, ends[1:], strict=False)]
    return torch.cat([*y, x.new_zeros(x.size(0) - ends[-1], weight.size(1))])


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, *, backends: Backends = DEFAULT
) -> torch.Tensor:
    """y [R, out] of x [R, in], weight [E, out, in], offsets [E+1] int32 on the device.

    Rows past offsets[E] hold zeros or, from torch's kernel, anything: read none of them. No host sync by triton and by
    torch's kernel; the reference, which takes what that one refuses (`torch_refusal`), waits for the offsets.
    """
    if backends.pick("grouped_gemm", x, x.size(-1)) == "triton":
        from megallm_kernels.grouped_gemm import grouped_gemm

        return grouped_gemm(x, weight, offsets)
    if x.is_cuda:
        from megallm_kernels.grouped_gemm import torch_grouped_mm, torch_refusal

        if not torch_refusal(x, weight):
            return torch_grouped_mm(x, weight, offsets)
    return grouped_linear_reference(x, weight, offsets)
