"""The compiled part, csrc/: loading it, and RMSNorm, RoPE and AdamW of it on tensors, as functions and as operators.

It is there only after `MEGALLM_BUILD_CUDA=1 pip install .`; `load()` says why it is not. The Triton kernels do the same
without it. The module takes addresses, sizes, strides in elements, a dtype code and a stream, and no torch types: one
build serves every torch. CPU tensors go through the same arguments to plain loops over the same arithmetic, for tests.

Letters: R rows, H hidden, T tokens, h heads, D head dim.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from megallm_kernels.device import target_of
from megallm_kernels.rows import as_rows

MODULE = "megallm_kernels._compiled"
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""As in csrc/arguments.h."""
NO_DTYPE = -1
"""There is no such tensor."""


@dataclass(frozen=True, kw_only=True)
class CompiledPart:
    """The module, or why there is none."""

    module: Any
    """megallm_kernels._compiled, or None."""
    reason: str
    """Empty where there is a module."""


@cache
def load() -> CompiledPart:
    """The compiled part, looked for once."""
    try:
        return CompiledPart(module=importlib.import_module(MODULE), reason="")
    except ModuleNotFoundError as error:
        if error.name != MODULE:
            raise
        how = "install with MEGALLM_BUILD_CUDA=1 where nvcc is"
        return CompiledPart(module=None, reason=f"{MODULE} was not built: {how}")
    except ImportError as error:
        return CompiledPart(module=None, reason=f"{MODULE} was built and does not load: {error}")


def why_not_on(device: torch.device) -> str | None:
    """Why the compiled kernels cannot run on this GPU; None if they can. CPU tensors take plain loops."""
    part = load()
    if part.module is None:
        return part.reason
    return _why_not_on_gpu(part.module, _index_of(device)) if device.type == "cuda" else None


def covers(code: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability can run `code`, such as "sm_80:sm_90a:compute_90".

    Machine code runs on later minor versions of its major version, with `a` on its very version; PTX (compute_) runs on
    every later version.
    """

    def runs(name: str) -> bool:
        kind, number = name.split("_")
        built = divmod(int(number.rstrip("af")), 10)
        if number.endswith("a"):
            return built == capability
        return built <= capability and (kind == "compute" or built[0] == capability[0])

    return any(runs(name) for name in code.split(":"))


def rms_norm_forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(y, new residual = x + residual, rstd [R] fp32) of x [..., H]; y is the norm of that sum, if there is one."""
    hidden = x.size(-1)
    _check_norm(x, weight, residual=residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new_residual = None if residual is None else torch.empty_like(y)
    num_rows = y.numel() // max(hidden, 1)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if y.numel() == 0:
        return y, new_residual, rstd
    rows, added, weight = as_rows(x), None if residual is None else as_rows(residual), weight.contiguous()
    run(
        "rms_norm_forward", x.device, x=_address(rows), residual=_address(added), weight=_address(weight),
        y=_address(y), new_residual=_address(new_residual), rstd=_address(rstd), rows=num_rows, hidden=hidden,
        x_rows=_strides(rows), residual_rows=_strides(added), eps=eps, dtype=DTYPE_CODES[x.dtype],
        weight_dtype=DTYPE_CODES[weight.dtype],
    )  # fmt: skip
    return y, new_residual, rstd


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, *,
    dnew_residual: torch.Tensor | None, needs_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dx [..., H], dweight [H], or [0] where it is not needed) for the x that was normalised."""
    _check_norm(x, weight, dy=dy, dnew_residual=dnew_residual)
    hidden, num_rows = x.size(-1), rstd.numel()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = weight.new_empty(hidden if needs_dweight else 0)
    if dx.numel() == 0:
        return dx, dweight.zero_()
    code = DTYPE_CODES[x.dtype]
    with torch.cuda.device_of(x):
        num_partials = _module().rms_norm_partials(
            rows=num_rows, hidden=hidden, dtype=code, weight_dtype=DTYPE_CODES[weight.dtype],
            num_multiprocessors=target_of(x).num_sms, device=_index_of(x.device) if x.is_cuda else -1,
        )  # fmt: skip
    partial = torch.empty((num_partials, hidden), dtype=torch.float32, device=x.device) if needs_dweight else None
    rows, drows = as_rows(x), as_rows(dy)
    dres = None if dnew_residual is None else as_rows(dnew_residual)
    weight, rstd = weight.contiguous(), rstd.contiguous()
    run(
        "rms_norm_backward", x.device, dy=_address(drows), x=_address(rows), weight=_address(weight),
        rstd=_address(rstd), dnew_residual=_address(dres), dx=_address(dx), partial=_address(partial),
        dweight=_address(dweight if needs_dweight else None), rows=num_rows, hidden=hidden, x_rows=_strides(rows),
        dy_rows=_strides(drows), dnew_residual_rows=_strides(dres), num_partials=num_partials, dtype=code,
        weight_dtype=DTYPE_CODES[weight.dtype],
    )  # fmt: skip
    return dx, dweight


def rotate(
    x: torch.Tensor, out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None, *, conjugate: bool = False,
) -> None:  # fmt: skip
    """Writes the first R = 2 cos.size(1) elements of every head of x [T, h, D], rotated, into out (which may be x).

    Both with unit stride along D. See megallm_kernels.rope.
    """
    _check_rope(x, cos, sin, positions, cu_seqlens)
    num_tokens, num_heads, _ = x.shape
    if x.numel() == 0 or cos.size(1) == 0:
        return
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    where = None if positions is None else positions.long().contiguous()
    documents = None if cu_seqlens is None else cu_seqlens.int().contiguous()
    run(
        "rope", x.device, x=_address(x), out=_address(out), cos=_address(cos), sin=_address(sin),
        positions=_address(where), cu_seqlens=_address(documents), tokens=num_tokens, heads=num_heads,
        half=cos.size(1), rows=cos.size(0), documents=0 if documents is None else documents.numel() - 1,
        strides=x.stride()[:2], out_strides=out.stride()[:2], dtype=DTYPE_CODES[x.dtype], conjugate=conjugate,
    )  # fmt: skip


def _index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _why_not_on_gpu(module: Any, index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if not covers(module.CODE, (major, minor)):
        how = f"build again with MEGALLM_CUDA_ARCHS={major}{minor}"
        built = module.CODE.replace(":", ", ")
        return f"{MODULE} was built for {built}, GPU {index} has compute capability {major}.{minor}: {how}"
    try:
        with torch.cuda.device(index):
            module.check_runs(index)
    except RuntimeError as error:
        return f"{MODULE} was built and does not run here: {error}"
    return None


def _module() -> Any:
    part = load()
    if part.module is None:
        raise RuntimeError(f"the compiled kernels were asked for, but {part.reason}")
    return part.module


def run(name: str, device: torch.device, **arguments: Any) -> None:
    """Calls the module's function on the stream that torch uses now. The arguments' tensors must still be alive.

    They may die, copies made for this call (`contiguous()`, `float()`) among them, as soon as it returns, which is
    before the kernel ran: torch's allocator gives their memory to later work of the same stream only.
    """
    function = getattr(_module(), name)
    if device.type == "cpu":
        function(**arguments, device=-1, stream=0)
        return
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        function(**arguments, device=index, stream=torch.cuda.current_stream().cuda_stream)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _strides(rows: torch.Tensor | None) -> tuple[int, int, int]:
    return (1, 0, 0) if rows is None else (rows.size(1), rows.stride(0), rows.stride(1))


def _check_norm(x: torch.Tensor, weight: torch.Tensor, **others: torch.Tensor | None) -> None:
    if x.dtype not in DTYPE_CODES or weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"RMSNorm takes fp32, fp16 or bf16, the weight also fp32; got {x.dtype} and {weight.dtype}")
    if weight.shape != x.shape[-1:] or weight.device != x.device:
        got = f"{tuple(weight.shape)} on {weight.device}"
        raise ValueError(f"weight {got} does not fit x {tuple(x.shape)} on {x.device}")
    for name, other in others.items():
        if other is not None and (other.shape != x.shape or other.dtype != x.dtype or other.device != x.device):
            got = f"{tuple(other.shape)} {other.dtype} on {other.device}"
            raise ValueError(f"{name} {got} must be like x, {tuple(x.shape)} {x.dtype} on {x.device}")


def _check_rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:  # fmt: skip
    if x.dim() != 3 or cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.size(1) > x.size(2):
        shapes = f"x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        raise ValueError(f"rope takes x [tokens, heads, head_dim] and tables [rows, rotary_dim / 2], got {shapes}")
    if x.dtype not in DTYPE_CODES:
        raise ValueError(f"rope takes fp32, fp16 or bf16, got {x.dtype}")
    if x.stride(-1) != 1 and x.size(-1) > 1:
        raise ValueError(f"rope_ needs unit stride along head_dim, got strides {tuple(x.stride())}: use rope")
    if positions is not None and cu_seqlens is not None:
        raise ValueError("rope takes positions or cu_seqlens, not both")
    if positions is None and cu_seqlens is None and cos.size(0) < x.size(0):
        raise ValueError(f"rope's tables have {cos.size(0)} rows for {x.size(0)} tokens: give positions or more rows")
    if positions is not None and positions.shape != x.shape[:1]:
        raise ValueError(f"positions {tuple(positions.shape)} do not match {x.size(0)} tokens")
    tensors = [t for t in (cos, sin, positions, cu_seqlens) if t is not None]
    if any(t.device != x.device for t in tensors):
        raise ValueError(f"rope's tensors are on {x.device} and {', '.join(str(t.device) for t in tensors)}")
