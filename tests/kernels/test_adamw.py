"""The AdamW kernel in the interpreter against the specification in fp64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from megallm.ops.adamw import adamw_reference_
from megallm.testing.tolerances import assert_close
from megallm_kernels import adamw
from megallm_kernels.adamw import adamw_
from megallm_kernels.adamw_plan import AdamWPlan, log_beta, plan

SIZES = (0, 1, 7, 256, 257, 509, 512, 1031)
"""Nothing, one element, primes, whole blocks of 256, whole chunks of 512, one more."""
SETTINGS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
ROUNDINGS_PER_STEP = 8
"""Longest chain of roundings on the way into p: divisor, g, m, v, root, quotient, rate, difference."""
ROOT = Path(__file__).parents[2]


@dataclass
class State:
    """The tensors of one optimizer."""

    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    exp_avgs: list[torch.Tensor]
    exp_avg_sqs: list[torch.Tensor]
    copies: list[torch.Tensor]

    @property
    def lists(self) -> tuple[list[torch.Tensor], ...]:
        return self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.copies


def state(
    sizes: Sequence[int] = SIZES, grad: torch.dtype = torch.float32, copy: torch.dtype | None = None, scale: float = 1.0
) -> State:
    random = torch.Generator().manual_seed(0)
    params, grads = ([torch.randn(n, generator=random) for n in sizes] for _ in range(2))
    exp_avgs, exp_avg_sqs = ([torch.zeros(n) for n in sizes] for _ in range(2))
    copies = [] if copy is None else [p.to(copy) for p in params]
    return State(params, [(scale * g).to(grad) for g in grads], exp_avgs, exp_avg_sqs, copies)


def scalars(step: float = 0.0, lr: float = 1e-2, divisor: float = 1.0, bad: float = 0.0) -> dict[str, torch.Tensor]:
    given = {"step": step, "learning_rate": lr, "grad_divisor": divisor, "is_bad": bad}
    return {name: torch.tensor(float(value)) for name, value in given.items()}


def expect(s: State, decayed: Sequence[bool], rates: Sequence[float], divisor: float, first: int = 1) -> State:
    """What `len(rates)` updates make of the state, in fp64."""
    p, g, m, v = ([t.double() for t in tensors] for tensors in (s.params, s.grads, s.exp_avgs, s.exp_avg_sqs))
    for step, lr in enumerate(rates, first):
        for i, is_decayed in enumerate(decayed):
            wd = SETTINGS["weight_decay"] if is_decayed else 0.0
            adamw_reference_(
                p[i], g[i] / divisor, m[i], v[i], step=step, lr=lr, weight_decay=wd, beta1=0.9, beta2=0.999, eps=1e-8
            )
    return State(p, s.grads, m, v, s.copies)


def compare(actual: State, expected: State, steps: int) -> None:
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        for got, want in zip(getattr(actual, name), getattr(expected, name), strict=True):
            assert_close(got, want, terms=ROUNDINGS_PER_STEP * steps, label=f"{name} of {want.numel()}")


def clones(s: State) -> State:
    return State(*([t.clone() for t in tensors] for tensors in s.lists))


def assert_equal(one: State, other: State) -> None:
    for a, b in zip(one.lists, other.lists, strict=True):
        assert [torch.equal(x, y) for x, y in zip(a, b, strict=True)] == [True] * len(a)


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_updates_are_the_specification_s(grad: torch.dtype, scale: float) -> None:
    s = state(grad=grad, scale=scale)
    decayed = [i % 3 != 0 for i in range(len(SIZES))]
    rates = [torch.tensor(lr).item() for lr in (1e-2, 3e-3, 1e-4)]  # as fp32 holds them
    expected = expect(s, decayed, rates, divisor=scale)
    step, plan = torch.zeros(()), None
    for lr in rates:
        values = scalars(lr=lr, divisor=scale) | {"step": step}
        plan = adamw_(plan, *s.lists, decayed=decayed, **values, **SETTINGS)
    compare(s, expected, steps=3)
    assert step.item() == 3


@pytest.mark.parametrize("copy", [torch.bfloat16, torch.float16])
def test_copies_are_the_rounded_params(copy: torch.dtype) -> None:
    s = state(grad=torch.bfloat16, copy=copy)
    expected = expect(s, [True] * len(SIZES), [1e-2], divisor=1.0)
    adamw_(None, *s.lists, **scalars(), **SETTINGS)
    compare(s, expected, steps=1)
    for param, low in zip(s.params, s.copies, strict=True):
        assert torch.equal(low, param.to(copy))


def test_a_later_step_continues_from_its_count() -> None:
    s = state()
    expected = expect(s, [True] * len(SIZES), [1e-2], divisor=1.0, first=1001)
    values = scalars(step=1000)
    adamw_(None, *s.lists, **values, **SETTINGS)
    compare(s, expected, steps=1)
    assert values["step"].item() == 1001


def test_a_bad_step_changes_nothing() -> None:
    s = state(copy=torch.bfloat16)
    for g in s.grads:
        g.fill_(float("nan"))
    before, values = clones(s), scalars(step=5, bad=1)
    adamw_(None, *s.lists[:1], before.grads, *s.lists[2:], **values, **SETTINGS)
    assert_equal(State(s.params, [], s.exp_avgs, s.exp_avg_sqs, s.copies), State(before.params, [], *before.lists[2:]))
    assert values["step"].item() == 5


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_is_bad_may_have_any_dtype(dtype: torch.dtype) -> None:
    s = state([3])
    values = scalars()
    for bad, steps in ((1, 0), (0, 1)):
        adamw_(None, *s.lists, **(values | {"is_bad": torch.tensor(bad, dtype=dtype)}), **SETTINGS)
        assert values["step"].item() == steps


def test_gradients_are_only_read() -> None:
    s = state()
    before = clones(s)
    adamw_(None, *s.lists, **scalars(divisor=3.0), **SETTINGS)
    assert [torch.equal(a, b) for a, b in zip(s.grads, before.grads, strict=True)] == [True] * len(SIZES)


def test_two_runs_are_bit_equal() -> None:
    one = state(copy=torch.bfloat16)
    other = clones(one)
    for s in (one, other):
        adamw_(None, *s.lists, **scalars(), **SETTINGS)
    assert_equal(one, other)


def test_beta_0_keeps_no_memory() -> None:
    s = state([5])
    adamw_(None, *s.lists, **scalars(), **(SETTINGS | {"beta1": 0.0, "beta2": 0.0}))
    assert torch.equal(s.exp_avgs[0], s.grads[0])
    assert_close(s.exp_avg_sqs[0], s.grads[0].double() ** 2)


def slices(shifts: Sequence[int], size: int, grad: torch.dtype) -> tuple[list[torch.Tensor], State]:
    """Flat buffers, and in each a slice that starts `shift` elements behind an aligned address."""
    dtypes = (torch.float32, grad, torch.float32, torch.float32, torch.bfloat16)
    buffers = []
    for dtype in dtypes:
        buffer = torch.zeros(size + 64, dtype=dtype)
        start = -(buffer.data_ptr() // buffer.element_size()) % 16
        buffers.append(buffer[start : start + size + 16])
    views = [[b[shift : shift + size]] for b, shift in zip(buffers, shifts, strict=True)]
    views[0][0].copy_(torch.linspace(-1, 1, size))
    views[1][0].copy_(torch.linspace(2, -1, size))
    return buffers, State(*views)


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shifts", "is_aligned"), [((0,) * 5, True), ((3,) * 5, True), ((1, 5, 1, 9, 1), True), ((0, 1, 0, 0, 0), False)]
)
def test_slices_of_flat_buffers(shifts: tuple[int, ...], is_aligned: bool, grad: torch.dtype) -> None:
    buffers, s = slices(shifts, 1500, grad)
    outside = [torch.cat([b[:shift], b[shift + 1500 :]]) for b, shift in zip(buffers, shifts, strict=True)]
    expected = expect(s, [True], [1e-2], divisor=1.0)
    plan = adamw_(None, *s.lists, **scalars(), **SETTINGS)
    assert bool(plan.host_table[0, 7] & 2) == is_aligned
    assert plan.host_table[0, 5].item() == (shifts[0] if is_aligned else 0)
    compare(s, expected, steps=1)
    after = [torch.cat([b[:shift], b[shift + 1500 :]]) for b, shift in zip(buffers, shifts, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(after, outside, strict=True))


def test_every_element_belongs_to_one_chunk() -> None:
    s = state()
    plan = AdamWPlan.build(*s.lists)
    seen = [torch.zeros(n) for n in SIZES]
    for tensor, number in plan.chunks.tolist():
        first = int(plan.host_table[tensor, 5])
        start = max(number * plan.launch.chunk - first, 0)
        seen[tensor][start : (number + 1) * plan.launch.chunk - first] += 1
    assert all((each == 1).all() for each in seen)


def test_chunks_shrink_until_the_gpu_is_full() -> None:
    for arch in (80, 90):
        large, small = (plan(n, arch=arch, num_sms=132) for n in (10**9, 10**6))
        assert (large.chunk, small.chunk) == (16384, 1024)
        assert large.chunk % large.block == small.chunk % small.block == 0


def test_a_plan_is_kept_until_memory_moves() -> None:
    s = state(copy=torch.bfloat16)
    plan = adamw_(None, *s.lists, **scalars(), **SETTINGS)
    assert adamw_(plan, *s.lists, **scalars(), **SETTINGS) is plan
    assert plan.ticket.item() == 0
    for i in range(5):
        moved = clones(s)
        lists: list[Any] = list(s.lists)
        lists[i] = moved.lists[i]
        assert not plan.fits(*lists)
    assert not plan.fits(*s.lists[:4])
    moved = clones(s)
    expected = expect(moved, [True] * len(SIZES), [1e-2], divisor=1.0)
    adamw_(plan, *moved.lists, **scalars(), **SETTINGS)
    compare(moved, expected, steps=1)


@pytest.mark.parametrize("which", range(5))
def test_a_plan_is_of_its_dtypes(which: int) -> None:
    """Memory that now holds another dtype, element for element at the same addresses."""
    s = state([4, 8], grad=torch.bfloat16, copy=torch.bfloat16)
    plan = AdamWPlan.build(*s.lists)
    lists: list[Any] = list(s.lists)
    lists[which] = [t.view(torch.float16 if t.dtype == torch.bfloat16 else torch.int32) for t in lists[which]]
    assert plan.fits(*s.lists) and not plan.fits(*lists)


@pytest.mark.parametrize("operator", [False, True])
def test_gradients_of_another_dtype_at_the_same_address_make_a_new_plan(operator: bool) -> None:
    s = state([5, 300], grad=torch.bfloat16)
    values, plan = scalars(), AdamWPlan.build(*s.lists)
    for g in s.grads:
        g.view(torch.float16).copy_(g.clone())
    s.grads = [g.view(torch.float16) for g in s.grads]
    expected = expect(s, [True, True], [1e-2], divisor=1.0)
    if operator:
        adamw.update(*s.lists, *values.values(), *tables(plan), *SETTINGS.values())
    else:
        assert adamw_(plan, *s.lists, **values, **SETTINGS) is not plan
    compare(s, expected, steps=1)


def test_a_plan_is_not_of_tensors_with_gaps() -> None:
    s = state([8])
    s.grads[0] = torch.zeros(16)[:8]
    plan = AdamWPlan.build(*s.lists)
    s.grads[0] = s.grads[0].as_strided((8,), (2,))
    assert not plan.fits(*s.lists)


def test_the_tensors_are_marked_as_written() -> None:
    s, values = state([3], copy=torch.bfloat16), scalars()
    written = [s.params[0], s.exp_avgs[0], s.exp_avg_sqs[0], s.copies[0], values["step"]]
    before = [t._version for t in written]
    adamw_(None, *s.lists, **values, **SETTINGS)
    assert all(t._version > version for t, version in zip(written, before, strict=True))
    assert s.grads[0]._version == 0


def test_a_captured_graph_takes_a_plan_made_before(monkeypatch: pytest.MonkeyPatch) -> None:
    s = state([3])
    plan = adamw_(None, *s.lists, **scalars(), **SETTINGS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert adamw_(plan, *s.lists, **scalars(), **SETTINGS) is plan
    with pytest.raises(ValueError, match="one warm-up step before the capture"):
        adamw_(plan, *clones(s).lists, **scalars(), **SETTINGS)


@pytest.mark.parametrize("sizes", [(), (0,), (0, 0)])
def test_no_elements_still_count_a_step(sizes: tuple[int, ...]) -> None:
    s, values = state(sizes), scalars()
    plan = adamw_(None, *s.lists, **values, **SETTINGS)
    assert values["step"].item() == 1
    adamw_(plan, *s.lists, **(values | {"is_bad": torch.ones(())}), **SETTINGS)
    assert values["step"].item() == 1


@triton.jit
def _corrections(out, steps, log_beta, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, adamw._one_minus_power(tl.cast(log_beta, tl.float32), tl.load(steps + at)))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999])
def test_bias_corrections_have_fp32_precision(beta: float) -> None:
    steps = torch.cat([torch.arange(1, 1020), torch.tensor([1e4, 1e5, 1e6, 1e7, 2**24])]).float()
    out = torch.empty_like(steps)
    _corrections[(1,)](out, steps, log_beta(beta), BLOCK=len(steps))
    expected = 1 - torch.tensor(beta, dtype=torch.float64) ** steps.double()
    assert ((out - expected) / expected).abs().max() < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.grads.pop(), r"equal lengths"),
        (lambda s: s.copies.pop(), r"equal lengths"),
        (lambda s: s.grads.__setitem__(0, s.grads[0].bfloat16()), r"one dtype"),
        (lambda s: s.exp_avgs.__setitem__(1, s.exp_avgs[1].double()), r"exp_avgs\[1\] is torch.float64"),
        (lambda s: s.params.__setitem__(1, s.params[1].half()), r"params\[1\] is torch.float16"),
        (lambda s: s.grads.__setitem__(1, torch.zeros(3, 2)[:, 0]), r"grads\[1\] \(3,\) .* contiguous"),
        (lambda s: s.exp_avg_sqs.__setitem__(1, torch.zeros(4)), r"exp_avg_sqs\[1\] \(4,\) .* 3 elements"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, message: str) -> None:
    s = state([2, 3], copy=torch.float16)
    change(s)
    with pytest.raises(ValueError, match=message):
        AdamWPlan.build(*s.lists)


def test_scalars_that_do_not_fit_are_refused() -> None:
    s = state([2])
    with pytest.raises(ValueError, match="step must be fp32"):
        adamw_(None, *s.lists, **(scalars() | {"step": torch.tensor(0)}), **SETTINGS)
    with pytest.raises(ValueError, match="learning_rate must be one number on cpu"):
        adamw_(None, *s.lists, **(scalars() | {"learning_rate": torch.zeros(2)}), **SETTINGS)
    with pytest.raises(ValueError, match=r"beta \(1.0\)"):
        adamw_(None, *s.lists, **scalars(), **(SETTINGS | {"beta1": 1.0}))


def tables(plan: AdamWPlan) -> tuple[torch.Tensor, ...]:
    return plan.table, plan.chunks, plan.ticket, plan.host_table


def operands(s: State) -> tuple[Any, ...]:
    return (*s.lists, *scalars().values(), *tables(AdamWPlan.build(*s.lists)), *SETTINGS.values())


def test_opcheck() -> None:
    torch.library.opcheck(adamw.update, operands(state([3, 300], copy=torch.bfloat16)))


def test_the_operator_compiles_into_a_full_graph() -> None:
    s = state([3, 300], copy=torch.bfloat16)
    expected = expect(s, [True, True], [1e-2], divisor=1.0)
    given = operands(s)
    torch.compile(lambda: adamw.update(*given), fullgraph=True, backend="aot_eager")()
    compare(s, expected, steps=1)
    assert given[5].item() == 1


FAR = """
import torch
from megallm_kernels import adamw
from megallm_kernels.adamw_plan import AdamWPlan
n = 2**31 + 5
reach = 1024  # four windows of n elements over one untouched buffer, that far apart: their last chunks are disjoint
buffer = torch.empty(n + 3 * reach)
p, g, m, v = (buffer[i * reach : i * reach + n] for i in range(4))
plan = AdamWPlan.build([p], [g], [m], [v])
assert plan.chunks[-1].tolist() == [0, 2**31 // 512]
for tensor, value in ((p, 1.0), (g, 2.0), (m, 0.0), (v, 0.0)):
    tensor[-5:] = value
last = AdamWPlan(
    table=plan.table, chunks=plan.chunks[-1:], ticket=plan.ticket, host_table=plan.host_table,
    host_chunks=plan.host_chunks, launch=plan.launch,
)
one, step = torch.ones(()), torch.zeros(())
adamw.launch_adamw(
    last, step, one, one, torch.zeros(()), gradient=torch.float32, copy=None, beta1=0.9, beta2=0.999, eps=0.0,
    weight_decay=0.5,
)
print(p[-5:].tolist(), g[-5:].tolist(), step.item())
"""


def test_tensors_past_2_to_the_31_elements() -> None:
    """The last chunk of one tensor of 2^31 + 5 elements: with int32 element numbers this crashes or updates others."""
    source = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": source}
    done = subprocess.run([sys.executable, "-c", FAR], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    values = done.stdout.replace("[", "").replace("]", "").replace(",", "").split()
    # p = 1 (1 - 0.5) - 1 m / sqrt(v), and the first step's m / sqrt(v) is the gradient's sign
    assert [float(x) for x in values] == pytest.approx([-0.5] * 5 + [2.0] * 5 + [1.0], abs=1e-6)


WIDTHS = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
import cases_adamw
from megallm.testing import compiled_kernel
def count_accesses(cubin, shared_bytes):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        text = subprocess.run([tool, "-sass", file.name], check=True, capture_output=True, text=True).stdout
    return [len(re.findall(rf"{name}[.]E[.]{width}\\b", text)) for name in ("LDG", "STG") for width in (64, 128)]
compiled_kernel._read = count_accesses
for case in cases_adamw.cases():
    print(case.name, *compiled_kernel.compile_case(case, 90), sep=",")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton brings its assembler on Linux only")
def test_aligned_blocks_take_wide_accesses() -> None:
    """Two 16-byte accesses a thread of each fp32 tensor, two 8-byte ones of each 2-byte tensor."""
    source = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "kernels")])
    environment = {**os.environ, "PYTHONPATH": source}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", WIDTHS], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    loads_and_stores = {}
    for line in done.stdout.splitlines():
        name, *counts = line.split(",")
        loads_and_stores[name] = [int(n) for n in counts]
    table_loads = 6  # four addresses, first element, end (int64; of flags the low half); the copies' address if any
    assert loads_and_stores == {
        "grad fp32 copy None": [table_loads, 8, 0, 6],
        "grad fp32 copy bf16": [table_loads + 1, 8, 2, 6],
        "grad bf16 copy None": [table_loads + 2, 6, 0, 6],
        "grad bf16 copy bf16": [table_loads + 3, 6, 2, 6],
    }
