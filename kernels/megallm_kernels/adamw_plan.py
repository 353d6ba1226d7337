"""What one AdamW launch over many tensors needs: tables of addresses and chunks on the device, made once.

The kernels of adamw.py and of csrc/adamw.cu take the same tables. A row of the table of addresses is one tensor, a row
of the table of chunks is the work of one program: (tensor, number of the chunk in it).

Addresses are counted back to an aligned one where all tensors of a row lie equally far past it, so element numbers run
from `first` (0 to 3) to `end`: slices of flat buffers that begin anywhere still have aligned inner blocks.

Letters: n tensors, c chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megallm_kernels.device import target_of

COLUMNS = 8
"""Of the table of addresses: param, grad, exp_avg, exp_avg_sq, copy (0 = none), first element, end, flags."""
_DECAYED, _ALIGNED = 1, 2
_GRADIENT_SHIFT, _COPY_SHIFT = 2, 4
"""Flags hold the numbers (in GRADIENT_DTYPES) of the gradient's and the copy's dtype from these bits on."""
GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COPY_DTYPES = (torch.bfloat16, torch.float16)
_VECTOR = 4
"""Elements a thread and access in aligned blocks, of every dtype: 16 bytes of fp32, 8 of bf16."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Settings of one launch."""

    block: int
    """Elements updated at a time (BLOCK), a power of two."""
    chunk: int
    """Elements of a program (CHUNK), a multiple of `block`."""
    num_warps: int


# Per architecture: BLOCK, the CHUNKs to choose from, warps. A thread has 8 elements: two 16-byte accesses of fp32.
_SETTINGS = {
    0: (256, (512,), 4),
    80: (1024, (16384, 8192, 4096, 2048, 1024), 4),
    90: (1024, (16384, 8192, 4096, 2048, 1024), 4),
}
_PROGRAMS_PER_SM = 16
"""Chunks get smaller until so many programs are there; one multiprocessor runs about eight at a time."""


def plan(num_elements: int, *, arch: int, num_sms: int) -> Launch:
    """Launch settings for tensors of `num_elements` elements together."""
    block, chunks, num_warps = _SETTINGS.get(arch, _SETTINGS[90 if arch > 90 else 80])
    fits = [chunk for chunk in chunks if num_elements >= chunk * num_sms * _PROGRAMS_PER_SM]
    return Launch(block=block, chunk=fits[0] if fits else chunks[-1], num_warps=num_warps)


Lists = tuple[
    Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor],
    Sequence[torch.Tensor],
]  # fmt: skip
"""params, grads, exp_avgs, exp_avg_sqs, copies."""


@dataclass(frozen=True, kw_only=True)
class AdamWPlan:
    """The tables of one set of tensors: made once, valid until a tensor's memory moves."""

    table: torch.Tensor  # [n, COLUMNS] int64, on the tensors' device
    chunks: torch.Tensor  # [c, 2] int32, on the tensors' device: tensor, number of the chunk in it
    ticket: torch.Tensor  # [1] int32, on the tensors' device: programs that are done, 0 between launches
    host_table: torch.Tensor  # [n, COLUMNS] int64, on the CPU: what `table` was copied from
    host_chunks: torch.Tensor  # [c, 2] int32, on the CPU: kept until the copy, which nobody waits for, is done
    launch: Launch

    @classmethod
    def build(
        cls, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], exp_avgs: Sequence[torch.Tensor],
        exp_avg_sqs: Sequence[torch.Tensor], copies: Sequence[torch.Tensor] = (), *,
        decayed: Sequence[bool] | None = None,
    ) -> AdamWPlan:  # fmt: skip
        """The plan for contiguous tensors of equal lengths; ValueError if they are not what the kernel takes.

        params, exp_avgs, exp_avg_sqs fp32; grads fp32, bf16 or fp16; copies (none, or one for each) bf16 or fp16.
        `decayed`: which tensors weight decay applies to; None = all.
        Not while a CUDA graph is captured: its replays would copy the tables again, out of memory freed since. One
        step before the capture makes the plan that captured steps are given as `previous`.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "AdamW's tables would be made inside a captured CUDA graph, whose replays copy them from memory that "
                "is free by then: take one warm-up step before the capture, and pass the plan it returns with tensors "
                "that stay where they are"
            )
        lists = (params, grads, exp_avgs, exp_avg_sqs, copies)
        _check(lists, decayed)
        host_table = _table_of(lists, decayed)
        device = params[0].device if params else torch.device("cpu")
        target = target_of(params[0] if params else host_table)
        launch = plan(sum(p.numel() for p in params), arch=target.arch, num_sms=target.num_sms)
        host_chunks = _chunks_of(host_table, launch.chunk)
        if device.type == "cuda":  # from pinned memory the copies are only put in the stream
            host_table, host_chunks = host_table.pin_memory(), host_chunks.pin_memory()
        return cls(
            table=host_table.to(device, non_blocking=True), chunks=host_chunks.to(device, non_blocking=True),
            ticket=torch.zeros(1, dtype=torch.int32, device=device), host_table=host_table, host_chunks=host_chunks,
            launch=launch,
        )  # fmt: skip

    @classmethod
    def renewed(cls, previous: AdamWPlan | None, lists: Lists, decayed: Sequence[bool] | None) -> AdamWPlan:
        """`previous` where it fits `lists`, else a new plan."""
        return previous if previous is not None and previous.fits(*lists) else cls.build(*lists, decayed=decayed)

    @classmethod
    def of_tensors(
        cls, lists: Lists, scalars: Sequence[torch.Tensor], table: torch.Tensor, chunks: torch.Tensor,
        ticket: torch.Tensor, host_table: torch.Tensor,
    ) -> AdamWPlan:  # fmt: skip
        """The plan whose tensors these are, or a new one where they are not of `lists`.

        ValueError if a scalar (step, learning_rate, grad_divisor, is_bad) is not one number on the plan's device.
        """
        check_scalars(table.device, *scalars)
        if not _is_table_of(host_table, lists):
            return cls.build(*lists, decayed=[bool(row[7] & _DECAYED) for row in host_table.tolist()])
        target = target_of(table)
        launch = plan(sum(p.numel() for p in lists[0]), arch=target.arch, num_sms=target.num_sms)
        return cls(table=table, chunks=chunks, ticket=ticket, host_table=host_table, host_chunks=chunks, launch=launch)

    def fits(
        self, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], exp_avgs: Sequence[torch.Tensor],
        exp_avg_sqs: Sequence[torch.Tensor], copies: Sequence[torch.Tensor] = (),
    ) -> bool:  # fmt: skip
        """Whether these are the tensors (addresses, lengths and dtypes) that the plan was made for."""
        return _is_table_of(self.host_table, (params, grads, exp_avgs, exp_avg_sqs, copies))


def _check(lists: Lists, decayed: Sequence[bool] | None) -> None:
    params, grads, *_, copies = lists
    counts = [len(each) for each in lists]
    if counts[:4] != counts[:1] * 4 or counts[4] not in (0, counts[0]) or len(decayed or params) != counts[0]:
        raise ValueError(f"AdamW takes lists of equal lengths (copies may be empty), got {counts} tensors")
    if len({g.dtype for g in grads}) > 1 or len({c.dtype for c in copies}) > 1:
        raise ValueError("AdamW takes gradients of one dtype and copies of one dtype: make a plan for each dtype")
    allowed = ((torch.float32,), GRADIENT_DTYPES, (torch.float32,), (torch.float32,), COPY_DTYPES)
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "copies")
    for name, tensors, dtypes in zip(names, lists, allowed, strict=True):
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=False)):
            if tensor.dtype not in dtypes:
                raise ValueError(f"{name}[{i}] is {tensor.dtype}; the AdamW kernel takes {', '.join(map(str, dtypes))}")
            if tensor.numel() != param.numel() or not tensor.is_contiguous() or tensor.device != params[0].device:
                raise ValueError(
                    f"{name}[{i}] {tuple(tensor.shape)} on {tensor.device} must be contiguous and have the "
                    f"{param.numel()} elements of params[{i}], on {params[0].device}"
                )


def check_scalars(device: torch.device, *scalars: torch.Tensor) -> None:
    """ValueError unless step, learning_rate, grad_divisor and is_bad are one number each on `device`, step in fp32."""
    names = ("step", "learning_rate", "grad_divisor", "is_bad")
    for name, scalar in zip(names, scalars, strict=True):
        if scalar.numel() != 1 or scalar.device != device:
            got = f"{tuple(scalar.shape)} on {scalar.device}"
            raise ValueError(f"AdamW's {name} must be one number on {device}, where the params are; got {got}")
    if scalars[0].dtype != torch.float32:
        raise ValueError(f"AdamW's step must be fp32, got {scalars[0].dtype}")


def _table_of(lists: Lists, decayed: Sequence[bool] | None) -> torch.Tensor:
    params, grads, *_, copies = lists
    dtypes = GRADIENT_DTYPES.index(grads[0].dtype) << _GRADIENT_SHIFT if grads else 0
    if copies:
        dtypes |= GRADIENT_DTYPES.index(copies[0].dtype) << _COPY_SHIFT
    rows = []
    for i, param in enumerate(params):
        tensors = [each[i] for each in lists if each]
        shift = _common_shift(tensors)
        addresses = [t.data_ptr() - (shift or 0) * t.element_size() for t in tensors] + [0]
        flags = _DECAYED * int(decayed is None or decayed[i]) + _ALIGNED * int(shift is not None) + dtypes
        rows.append([*addresses[:5], shift or 0, (shift or 0) + param.numel(), flags])
    return torch.tensor(rows, dtype=torch.int64).view(-1, COLUMNS)


def _common_shift(tensors: Sequence[torch.Tensor]) -> int | None:
    """How many elements before its first one each tensor's aligned vector begins; None if that is not one number."""
    shifts = {t.data_ptr() // t.element_size() % _VECTOR for t in tensors}
    return shifts.pop() if len(shifts) == 1 else None


def _is_table_of(table: torch.Tensor, lists: Lists) -> bool:
    """Whether the addresses, lengths and dtypes are those of `lists`. Runs every step: by whole lists, for speed."""
    params, *_, copies = lists
    if len(table) != len(params):
        return False
    if not params:
        return True
    *addresses, firsts, ends, flags = table.t().tolist()
    if not copies and any(addresses[4]):
        return False
    lengths = [end - first for first, end in zip(firsts, ends, strict=True)]
    gradient, copy = (GRADIENT_DTYPES[flags[0] >> shift & 3] for shift in (_GRADIENT_SHIFT, _COPY_SHIFT))
    for tensors, column, dtype in zip(
        lists, addresses, (torch.float32, gradient, torch.float32, torch.float32, copy), strict=True
    ):
        if not tensors and tensors is copies:
            continue
        if {t.dtype for t in tensors} != {dtype} or [t.numel() for t in tensors] != lengths:
            return False
        size = dtype.itemsize
        expected = [address + size * first for address, first in zip(column, firsts, strict=True)]
        if [t.data_ptr() for t in tensors] != expected or not all(t.is_contiguous() for t in tensors):
            return False
    return True


def _chunks_of(table: torch.Tensor, chunk: int) -> torch.Tensor:
    """[c, 2] int32: every (tensor, chunk of it) that has an element to update."""
    first, end = table[:, 5], table[:, 6]
    counts = torch.where(end > first, (end + chunk - 1) // chunk, 0)
    tensor = torch.repeat_interleave(torch.arange(len(table)), counts)
    number = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    return torch.stack([tensor, number], dim=1).to(torch.int32)


def log_beta(beta: float) -> float:
    """log(beta), very negative for beta 0 (and not infinite: 0 * inf would be NaN)."""
    if not 0 <= beta < 1:
        raise ValueError(f"AdamW's beta ({beta}) must be at least 0 and less than 1")
    return math.log(beta) if beta else -1e30
