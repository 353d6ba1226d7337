"""AdamW with decoupled weight decay (arXiv 1711.05101, algorithm 2) over many tensors in one launch.

    t <- t + 1                                   (t, the learning rate lr and the divisor c: 0-d tensors on the device)
    g <- grad / c
    m <- m + (1 - b1) (g - m)                    v <- v + (1 - b2) (g^2 - v)
    p <- p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps),      copy <- p, rounded

Where `is_bad` is not 0 nothing changes, t included. Gradients are only read.

Bytes per element: 28 with fp32 gradients (reads p g m v, writes p m v), 26 with bf16 gradients, 2 more with a copy.
Every number is fp32 in registers. 1 - b1 and 1 - b2 are formed in fp64 before the launch, 1 - b^t as -expm1(t log b):
in fp32 the plain difference loses four digits at b2 = 0.999, t = 1.
Tiling: an int64 table on the device holds the addresses of every tensor, a second one its chunks of CHUNK elements; a
program updates one chunk, BLOCK elements at a time. A block whose tensors are aligned is taken 4 elements a thread
(16 bytes of fp32) without masks; the edges of a tensor are taken one by one. Tensors that all start the same one to
three elements past such a boundary (slices of flat buffers) are counted from the boundary, so that their inner blocks
are aligned as well.
Each program takes a ticket when it is done, and the last one counts t up: no program can still have to read it.
int64: chunk numbers are widened before they become element numbers; addresses are int64 from the start.

Letters: n tensors, c chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from megallm_kernels.adamw_plan import COLUMNS, AdamWPlan, check_scalars, log_beta

_GRADIENT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_COPY_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
@triton.jit
def _one_minus_power(log_beta, t):
    """1 - beta^t to fp32 precision, from log(beta) < 0 or -inf (beta 0)."""
    x = log_beta * t
    near = tl.maximum(x, -0.5)
    series = 1.0 + near / 9.0  # expm1(near) / near, by Horner; the next term is below 2^-24
    series = 1.0 + near / 8.0 * series
    series = 1.0 + near / 7.0 * series
    series = 1.0 + near / 6.0 * series
    series = 1.0 + near / 5.0 * series
    series = 1.0 + near / 4.0 * series
    series = 1.0 + near / 3.0 * series
    series = 1.0 + near / 2.0 * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _from(tensor, element, ALIGNED: tl.constexpr):
    """Where `element` of a tensor lies. Four elements a thread and access for every dtype: were the 2-byte ones loaded
    by 16 bytes, the fp32 ones would have to change threads through shared memory before they are stored.
    """
    at = tensor + element
    if ALIGNED:
        at = tl.multiple_of(at, tensor.dtype.element_ty.primitive_bitwidth // 2)
    return at


@triton.jit
def _update_block(
    params, grads, exp_avgs, exp_avg_sqs, copies, element, first, end, scale, keep, rate, root_scale, weight1, weight2,
    eps, COPIES: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """BLOCK elements from `element` on: all of them where ALIGNED, else those inside [first, end)."""
    lane = tl.arange(0, BLOCK)
    inside = None
    if not ALIGNED:
        inside = (element + lane >= first) & (element + lane < end)
    at_p = _from(params, element, ALIGNED) + lane
    at_g = _from(grads, element, ALIGNED) + lane
    at_m = _from(exp_avgs, element, ALIGNED) + lane
    at_v = _from(exp_avg_sqs, element, ALIGNED) + lane
    p = tl.load(at_p, mask=inside)
    g = tl.load(at_g, mask=inside).to(tl.float32) * scale
    m = tl.load(at_m, mask=inside)
    v = tl.load(at_v, mask=inside)
    m += weight1 * (g - m)
    v += weight2 * (g * g - v)
    p = p * keep - rate * (m / (tl.sqrt(v) * root_scale + eps))
    tl.store(at_p, p, mask=inside)
    tl.store(at_m, m, mask=inside)
    tl.store(at_v, v, mask=inside)
    if COPIES:
        tl.store(_from(copies, element, ALIGNED) + lane, p.to(copies.dtype.element_ty), mask=inside)


@triton.jit
def adamw_kernel(
    table, chunks, ticket, step, learning_rate, grad_divisor, is_bad,
    log_beta1, log_beta2, weight1, weight2, eps, weight_decay,
    GRADIENT: tl.constexpr, COPY: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk. weight1, weight2: 1 - b1, 1 - b2. COPY: the copies' type, or None."""
    if tl.load(is_bad) == 0:
        program = tl.program_id(0).to(tl.int64)
        row = table + tl.load(chunks + 2 * program).to(tl.int64) * COLUMNS
        start = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
        params = tl.load(row).to(tl.pointer_type(tl.float32))
        grads = tl.load(row + 1).to(tl.pointer_type(GRADIENT))
        exp_avgs = tl.load(row + 2).to(tl.pointer_type(tl.float32))
        exp_avg_sqs = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        copies = params
        if COPY is not None:
            copies = tl.load(row + 4).to(tl.pointer_type(COPY))
        first = tl.load(row + 5)
        end = tl.load(row + 6)
        flags = tl.load(row + 7)
        t = tl.load(step) + 1.0
        lr = tl.load(learning_rate).to(tl.float32)
        scale = 1.0 / tl.load(grad_divisor).to(tl.float32)
        rate = lr / _one_minus_power(tl.cast(log_beta1, tl.float32), t)
        root_scale = 1.0 / tl.sqrt(_one_minus_power(tl.cast(log_beta2, tl.float32), t))
        keep = 1.0 - lr * tl.cast(weight_decay, tl.float32) * (flags & 1).to(tl.float32)
        weight1 = tl.cast(weight1, tl.float32)
        weight2 = tl.cast(weight2, tl.float32)
        eps = tl.cast(eps, tl.float32)
        for offset in range(0, tl.minimum(end - start, CHUNK).to(tl.int32), BLOCK):
            element = start + offset
            if ((flags & 2) != 0) & (element >= first) & (element + BLOCK <= end):
                _update_block(
                    params, grads, exp_avgs, exp_avg_sqs, copies, element, first, end, scale, keep, rate, root_scale,
                    weight1, weight2, eps, COPY is not None, BLOCK, True,
                )  # fmt: skip
            else:
                _update_block(
                    params, grads, exp_avgs, exp_avg_sqs, copies, element, first, end, scale, keep, rate, root_scale,
                    weight1, weight2, eps, COPY is not None, BLOCK, False,
                )  # fmt: skip
        tl.debug_barrier()  # every thread of the program has read `step`
        if tl.atomic_add(ticket, 1) == tl.num_programs(0) - 1:
            tl.store(step, t)
            tl.store(ticket, 0)


def adamw_(
    previous: AdamWPlan | None, params: list[torch.Tensor], grads: list[torch.Tensor], exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor], copies: Sequence[torch.Tensor] = (), *, decayed: Sequence[bool] | None = None,
    step: torch.Tensor, learning_rate: torch.Tensor, grad_divisor: torch.Tensor, is_bad: torch.Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float,
) -> AdamWPlan:  # fmt: skip
    """Updates params, both moments, the copies and `step` in place; the plan to pass as `previous` next time.

    step (fp32, updates done so far), learning_rate, grad_divisor and is_bad are 0-d tensors on the device, so that they
    may change under a captured graph; the plan is made by one step before the capture. See `AdamWPlan.build`.
    """
    lists = (params, grads, exp_avgs, exp_avg_sqs, copies)
    made = AdamWPlan.renewed(previous, lists, decayed)
    if torch.compiler.is_compiling():  # a graph must name what is written
        update(
            params, grads, exp_avgs, exp_avg_sqs, list(copies), step, learning_rate, grad_divisor, is_bad, made.table,
            made.chunks, made.ticket, made.host_table, beta1, beta2, eps, weight_decay,
        )  # fmt: skip
        return made
    check_scalars(made.table.device, step, learning_rate, grad_divisor, is_bad)
    launch_adamw(
        made, step, learning_rate, grad_divisor, is_bad, gradient=grads[0].dtype if grads else torch.float32,
        copy=copies[0].dtype if copies else None, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
    )  # fmt: skip
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *copies, step])
    return made


def launch_adamw(
    made: AdamWPlan, step: torch.Tensor, learning_rate: torch.Tensor, grad_divisor: torch.Tensor,
    is_bad: torch.Tensor, *, gradient: torch.dtype, copy: torch.dtype | None, beta1: float, beta2: float, eps: float,
    weight_decay: float,
) -> None:  # fmt: skip
    """One launch over all chunks of the plan; `gradient`, `copy`: dtypes of the gradients and of the copies."""
    if not len(made.chunks):
        step.add_(is_bad == 0)
        return
    with torch.cuda.device_of(made.table):  # Triton launches on the current GPU
        adamw_kernel[(len(made.chunks),)](
            made.table, made.chunks, made.ticket, step, learning_rate, grad_divisor, is_bad,
            log_beta(beta1), log_beta(beta2), 1 - beta1, 1 - beta2, eps, weight_decay,
            GRADIENT=_GRADIENT_TYPES[gradient], COPY=None if copy is None else _COPY_TYPES[copy], COLUMNS=COLUMNS,
            CHUNK=made.launch.chunk, BLOCK=made.launch.block, num_warps=made.launch.num_warps,
        )  # fmt: skip


@torch.library.custom_op(
    "megallm_kernels::adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "copies", "step", "ticket")
)
def update(
    params: list[torch.Tensor], grads: list[torch.Tensor], exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor], copies: list[torch.Tensor], step: torch.Tensor, learning_rate: torch.Tensor,
    grad_divisor: torch.Tensor, is_bad: torch.Tensor, table: torch.Tensor, chunks: torch.Tensor, ticket: torch.Tensor,
    host_table: torch.Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """`adamw_` with the plan's tensors spelled out. If a compiler passes copies of the tensors, new tables are made."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, copies)
    made = AdamWPlan.of_tensors(lists, (step, learning_rate, grad_divisor, is_bad), table, chunks, ticket, host_table)
    launch_adamw(
        made, step, learning_rate, grad_divisor, is_bad, gradient=grads[0].dtype if grads else torch.float32,
        copy=copies[0].dtype if copies else None, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
    )  # fmt: skip


@update.register_fake
def _update_fake(
    params: list[torch.Tensor], grads: list[torch.Tensor], exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor], copies: list[torch.Tensor], step: torch.Tensor, learning_rate: torch.Tensor,
    grad_divisor: torch.Tensor, is_bad: torch.Tensor, table: torch.Tensor, chunks: torch.Tensor, ticket: torch.Tensor,
    host_table: torch.Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    return None
