"""Products of rows with their expert's matrix against fp64 torch, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, normal, run_alone, strided
from torch.library import opcheck

from megallm.testing.tolerances import assert_close
from megallm_kernels import grouped_gemm as kernel

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
COUNTS = ([1], [5, 0, 33, 1], [0, 0, 7], [64, 31, 0], [17, 16, 15, 0, 0, 40])
PATHS = pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def use_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hopper path, with small tiles."""
    for name in ("_FEW", "_MANY", "_DWEIGHT"):
        monkeypatch.setattr(kernel, name, {0: (16, 32, 16, 4, 1, True)})


def check(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, dy: torch.Tensor) -> None:
    """y, dx and dweight equal the reference's in fp64 on the same rounded numbers."""
    own = [t.detach().requires_grad_() for t in (x, weight)]
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    y, expected = kernel.grouped_gemm(*own, offsets), kernel.grouped_gemm_reference(*wide, offsets)
    assert y.dtype == x.dtype and y.is_contiguous()
    # sums in fp32 of In products (y), Out (dx) or rows (dweight); one rounding in x's dtype
    single = x.dtype == torch.float32
    assert_close(y, expected, terms=2 * x.size(1) if single else 2, label="y")
    actual, wanted = torch.autograd.grad(y, own, dy), torch.autograd.grad(expected, wide, dy.double())
    for a, w, terms, label in zip(actual, wanted, (weight.size(1), x.size(0)), ("dx", "dweight"), strict=True):
        assert a.shape == w.shape and a.dtype == x.dtype
        assert_close(a, w, terms=2 * terms if single else 2, label=label)
    for expert, count in enumerate(offsets.diff().tolist()):
        assert count or not actual[1][expert].any()  # exact zeros


def tensors(
    counts: list[int], num_in: int, num_out: int, dtype: torch.dtype, *, extra: int = 0, scale: float = 1.0
) -> list[torch.Tensor]:
    """x [R, In], weight [E, Out, In], offsets, dy [R, Out]; `extra` rows belong to no expert."""
    rows = sum(counts) + extra
    x, dy = normal(rows, num_in, dtype=dtype, seed=1, scale=scale), normal(rows, num_out, dtype=dtype, seed=3)
    weight = normal(len(counts), num_out, num_in, dtype=dtype, seed=2, scale=scale)
    return [x, weight, offsets_of(counts), dy]


@EACH_DTYPE
@PATHS
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_every_expert_multiplies_its_rows(
    counts: list[int], dtype: torch.dtype, tma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tma:
        use_descriptors(monkeypatch)
    check(*tensors(counts, 48, 40, dtype))


@PATHS
@pytest.mark.parametrize(("num_in", "num_out"), [(1, 1), (7, 5), (33, 64), (64, 37), (36, 132)])
def test_features_of_any_number(num_in: int, num_out: int, tma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if tma:  # for what is aligned; pointers for the rest
        use_descriptors(monkeypatch)
    check(*tensors([9, 0, 26], num_in, num_out, torch.float32))


@PATHS
def test_rows_of_no_expert_give_zeros_and_contribute_nothing(tma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if tma:
        use_descriptors(monkeypatch)
    x, weight, offsets, dy = tensors([5, 0, 20], 16, 24, torch.bfloat16, extra=70)
    check(x, weight, offsets, dy)
    x[25:] = dy[25:] = float("nan")
    y = kernel.grouped_gemm(x, weight, offsets)
    assert y[:25].isfinite().all() and not y[25:].any()
    dx, dweight = kernel.grouped_gemm_backward(dy, x, weight, offsets, True, True)
    assert dx[:25].isfinite().all() and not dx[25:].any() and dweight.isfinite().all()


@PATHS
def test_a_bad_expert_does_not_spoil_its_neighbours(tma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if tma:
        use_descriptors(monkeypatch)
    x, weight, offsets, dy = tensors([5, 6, 7], 24, 24, torch.float16)
    x[5:11] = dy[5:11] = weight[1] = float("nan")
    rows = torch.arange(18)
    others = (rows < 5) | (rows >= 11)
    y = kernel.grouped_gemm(x, weight, offsets)
    dx, dweight = kernel.grouped_gemm_backward(dy, x, weight, offsets, True, True)
    assert y[others].isfinite().all() and dx[others].isfinite().all() and dweight[[0, 2]].isfinite().all()
    assert y[~others].isnan().all() and dx[~others].isnan().all() and dweight[1].isnan().all()


@pytest.mark.parametrize("form", ["strided", "transposed", "expanded", "sliced"])
def test_any_strides_of_inputs_and_gradients_are_taken(form: str) -> None:
    x, weight, offsets, dy = tensors([4, 0, 9], 24, 16, torch.float32)
    change = {
        "strided": strided,
        "transposed": lambda t: t.transpose(-2, -1).contiguous().transpose(-2, -1),
        "expanded": lambda t: t[:1].expand(t.shape),
        "sliced": lambda t: torch.cat([t, t], -1)[..., : t.size(-1)],
    }[form]
    check(change(x), change(weight), offsets, change(dy))


def test_a_sum_as_loss_gives_an_expanded_gradient() -> None:
    x, weight, offsets, dy = tensors([4, 0, 9], 24, 16, torch.float32)
    check(x, weight, offsets, torch.ones(()).expand(dy.shape))


@EACH_DTYPE
@pytest.mark.parametrize("scale", [3.0, 10.0])
def test_large_numbers_are_summed_in_fp32(dtype: torch.dtype, scale: float) -> None:
    check(*tensors([40, 3], 128, 16, dtype, scale=scale))


@pytest.mark.parametrize("counts", [[0, 0], [0]])
def test_no_rows_give_zero_gradients(counts: list[int]) -> None:
    check(*tensors(counts, 8, 6, torch.float32))


def test_more_experts_than_rows() -> None:
    counts = [0] * 67
    counts[3] = counts[66] = 2
    check(*tensors(counts, 16, 8, torch.float32))


def test_tiles_in_sections_cover_every_element_once() -> None:
    check(*tensors([150, 170, 3], 16, 100, torch.float32))


def test_gradients_that_are_not_needed_are_not_computed() -> None:
    x, weight, offsets, dy = tensors([4, 0, 9], 24, 16, torch.float32)
    assert kernel.grouped_gemm_backward(dy, x, weight, offsets, True, False)[1].numel() == 0
    assert kernel.grouped_gemm_backward(dy, x, weight, offsets, False, True)[0].numel() == 0
    kernel.grouped_gemm(x, weight.requires_grad_(), offsets).sum().backward()
    assert x.grad is None and weight.grad is not None


def test_results_repeat_bit_for_bit() -> None:
    x, weight, offsets, dy = tensors([40, 3], 50, 30, torch.float32)
    runs = [kernel.grouped_gemm_backward(dy, x, weight, offsets, True, True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_unusable_inputs_are_refused_in_words() -> None:
    x, weight, offsets, _ = tensors([4, 0, 9], 24, 16, torch.float32)
    with pytest.raises(ValueError, match="are not \\[R, In\\] and \\[E, Out, In\\]"):
        kernel.grouped_gemm(x[:, :8], weight, offsets)
    with pytest.raises(ValueError, match="are not \\[E \\+ 1\\] int32 for E = 3"):
        kernel.grouped_gemm(x, weight, offsets.long())
    with pytest.raises(ValueError, match="cast one of them"):
        kernel.grouped_gemm(x.half(), weight, offsets)
    with pytest.raises(ValueError, match="takes float32, float16 and bfloat16"):
        kernel.grouped_gemm(x.double(), weight.double(), offsets)


def test_torch_computes_the_same_where_it_can() -> None:
    x, weight, offsets, dy = tensors([5, 0, 11], 24, 16, torch.bfloat16)
    inputs = [t.requires_grad_() for t in (x, weight)]
    y, expected = kernel.torch_grouped_mm(*inputs, offsets), kernel.grouped_gemm(*inputs, offsets)
    assert_close(y, expected, terms=2)  # both round once
    grads = [torch.autograd.grad(out, inputs, dy) for out in (y, expected)]
    for a, e in zip(*grads, strict=True):
        assert_close(a, e, terms=2)


def test_torch_is_refused_what_it_cannot_take() -> None:
    x, weight, offsets, _ = tensors([5, 0, 11], 23, 16, torch.bfloat16)
    with pytest.raises(ValueError, match="multiples of 16 bytes: use grouped_gemm"):
        kernel.torch_grouped_mm(x, weight, offsets)
    x, weight, offsets, _ = tensors([5, 0, 11], 24, 15, torch.bfloat16)
    assert "output rows" in kernel.torch_refusal(x, weight)


def test_launch_settings_follow_arch_rows_and_alignment() -> None:
    def tile(arch: int, rows: int, *, aligned: bool = True, size: int = 2) -> tuple[int, int, bool]:
        launch = kernel.plan(arch, rows, dweight=False, element_bytes=size, aligned=aligned)
        return launch.block_m, launch.block_n, launch.tma

    assert tile(90, 1024) == (128, 256, True) and tile(90, 64) == (64, 256, True)
    assert tile(90, 1024, aligned=False) == tile(80, 1024) == tile(120, 1024) == (128, 128, False)
    assert not tile(90, 1024, size=4)[2]


def test_op_passes_opcheck() -> None:
    x, weight, offsets, _ = tensors([3, 0, 2], 8, 6, torch.float32)
    opcheck(kernel.grouped_gemm, (x.requires_grad_(), weight.requires_grad_(), offsets))


def test_op_compiles_without_graph_breaks() -> None:
    x, weight, offsets, _ = tensors([3, 0, 2], 8, 6, torch.float32)
    inputs = (x.requires_grad_(), weight.requires_grad_())

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return kernel.grouped_gemm(x, weight, offsets).square().sum()

    eager = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, e in zip(torch.autograd.grad(compiled(*inputs), inputs), eager, strict=True):
        assert torch.equal(a, e)


def test_rows_and_experts_2_to_the_30_elements_apart_are_found() -> None:
    run_alone("""
import torch
from megallm.testing.triton_interpreter import repair_bf16
repair_bf16()

def far(*shape):  # [3, *shape], rows 2^30 elements apart over untouched memory: 2 * 2^30 is past int32
    buffer = torch.empty(2**31 + 2**12, dtype=torch.float16)
    rows = buffer.as_strided((3, *shape), (2**30, *torch.empty(shape).stride()))
    return rows.normal_(generator=torch.Generator().manual_seed(1))

from megallm_kernels import grouped_gemm as kernel

def same(x, weight, dy, offsets):
    near = x.contiguous(), weight.contiguous()
    assert torch.equal(kernel.grouped_gemm(x, weight, offsets), kernel.grouped_gemm(*near, offsets))
    expected = kernel.grouped_gemm_backward(dy.contiguous(), *near, offsets, True, True)
    for a, e in zip(kernel.grouped_gemm_backward(dy, x, weight, offsets, True, True), expected):
        assert torch.equal(a, e)

x = far(32)
same(x, far(16, 32), far(16), torch.tensor([0, 1, 2, 3], dtype=torch.int32))
same(x, far(1, 32).transpose(0, 1), far(3), torch.tensor([0, 3], dtype=torch.int32))  # features far apart
""")
