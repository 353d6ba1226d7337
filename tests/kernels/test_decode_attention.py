"""Attention of one token a sequence to a cache in pages, against its specification in fp64, in the interpreter."""

from __future__ import annotations

import math
import textwrap
from typing import Any

import pytest
import torch
from kernel_checks import DTYPES, normal, run_alone
from torch.library import opcheck

from megallm.ops.decode_attention import decode_attention_reference, paged_decode_attention
from megallm.testing.tolerances import assert_close
from megallm_kernels import decode_attention as kernel


def cache(
    positions: list[int], *, heads: int, kv_heads: int, dim: int, page: int, pages: int,
    dtype: torch.dtype = torch.float32, scale: float = 1.0,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """(q, keys, values, table, positions): pages dealt out in a mixed order; cells that nobody sees are NaN."""
    rows = len(positions)
    q = normal(rows, heads, dim, dtype=dtype, seed=1, scale=scale)
    keys, values = (normal(rows * pages, kv_heads, page, dim, dtype=dtype, seed=s) for s in (2, 3))
    table = torch.randperm(rows * pages, generator=torch.Generator().manual_seed(4)).view(rows, pages)
    for at, own in zip(positions, table, strict=True):
        for cell in range(at + 1, pages * page):
            for pool in (keys, values):
                pool[own[cell // page], :, cell % page] = float("nan")
    return q, keys, values, table, torch.tensor(positions)


def check(given: tuple[torch.Tensor, ...], *, window: int | None = None, magnitude: float | None = None) -> None:
    found = paged_decode_attention(*given, window=window)
    wide = [each.nan_to_num().double() if each.is_floating_point() else each for each in given]
    wanted = decode_attention_reference(*wide, window=window)
    assert found.dtype == given[0].dtype
    # In fp32 up to D products a score, and a sum over the cells of them; else p and the result are rounded once each.
    terms = given[0].size(-1) + given[3].size(1) * given[1].size(2) if found.dtype == torch.float32 else 3
    assert_close(found, wanted, terms=terms, magnitude=magnitude or float(wide[2].abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
def test_every_dtype_and_head_dim(dim: int, dtype: torch.dtype) -> None:
    check(cache([0, 36, 95, 130], heads=4, kv_heads=2, dim=dim, page=32, pages=5, dtype=dtype))


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 17])
def test_every_size_of_a_group(group: int) -> None:
    check(cache([5, 70], heads=2 * group, kv_heads=2, dim=16, page=16, pages=5))


@pytest.mark.parametrize(("page", "pages"), [(16, 1), (16, 17), (32, 9), (48, 6), (272, 1), (1040, 1)])
def test_every_size_of_a_page(page: int, pages: int) -> None:
    """One page a sequence; several; more than a chunk of cells."""
    last = page * pages - 1
    check(cache([last, last // 2, 0, 15], heads=4, kv_heads=1, dim=16, page=page, pages=pages))


@pytest.mark.parametrize("position", [0, 1, 31, 32, 126, 127, 128, 129, 255, 256, 257, 287])
def test_lengths_around_tiles_and_chunks(position: int) -> None:
    check(cache([position], heads=2, kv_heads=1, dim=16, page=32, pages=9))


@pytest.mark.parametrize("window", [1, 7, 33, 64, 150])
@pytest.mark.parametrize(("page", "pages"), [(32, 5), (160, 1)])
def test_windows_in_cells_that_are_used_again(page: int, pages: int, window: int) -> None:
    """Positions far beyond the 160 cells: cell c holds the newest position that is c modulo 160."""
    check(cache([3, 40, 158, 159, 160, 161, 335, 4000], heads=4, kv_heads=2, dim=16, page=page, pages=pages),
          window=window)  # fmt: skip


def test_large_scores() -> None:
    check(cache([120, 300], heads=2, kv_heads=2, dim=64, page=32, pages=10, scale=100.0))


def test_chunks_grow_with_the_cache() -> None:
    def plan(num_cells: int, arch: int = 90) -> kernel.Launch:
        return kernel.plan(arch, 128, group=4, num_cells=num_cells, element_bytes=2)

    sizes = [(plan(n).chunk, plan(n).num_chunks) for n in (16, 128, 129, 8192, 8193, 131072)]
    assert sizes == [(128, 1), (128, 1), (128, 2), (128, 64), (256, 33), (2048, 64)]
    assert all(plan(n).chunk % plan(n).block_n == 0 for n in (16, 10_000))
    launch = plan(640, arch=0)
    given = cache([600, 250], heads=2, kv_heads=1, dim=16, page=32, pages=20)
    for chunk in (32, 640):
        own = kernel.Launch(**vars(launch) | {"chunk": chunk, "num_chunks": -(-640 // chunk), "block_d": 16})
        found = kernel.forward(*given, window=0, scale=0.25, launch=own)
        assert_close(found.flatten(1), paged_decode_attention(*given, window=None), terms=656, magnitude=5.0)


def test_a_sequences_bits_do_not_depend_on_what_is_beside_it() -> None:
    q, keys, values, table, positions = cache([140, 9, 77], heads=4, kv_heads=2, dim=16, page=32, pages=5)
    together = paged_decode_attention(q, keys, values, table, positions, window=None)
    for row in range(3):
        own = slice(row, row + 1)
        alone = paged_decode_attention(q[own], keys, values, table[own], positions[own], window=None)
        assert torch.equal(alone, together[own])


def test_slices_of_a_packed_projection_and_int32_numbers() -> None:
    q, keys, values, table, positions = cache([33, 60], heads=4, kv_heads=2, dim=16, page=32, pages=2)
    packed = torch.full((2, 8, 16), float("nan"))
    packed[:, :4] = q
    wanted = paged_decode_attention(q, keys, values, table, positions, window=None)
    sliced = paged_decode_attention(packed[:, :4], keys, values, table.int(), positions.int(), window=None)
    transposed = q.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(sliced, wanted)
    assert torch.equal(paged_decode_attention(transposed, keys, values, table, positions, window=None), wanted)


def test_no_sequences() -> None:
    given = cache([3], heads=2, kv_heads=1, dim=16, page=16, pages=1)
    q, keys, values, table, positions = given
    assert paged_decode_attention(q[:0], keys, values, table[:0], positions[:0], window=None).shape == (0, 32)


def test_pages_more_than_two_billion_elements_apart() -> None:
    """In 32 bits, the offset of page 2 would be negative."""
    run_alone(textwrap.dedent("""
        import torch
        from megallm.testing.triton_interpreter import repair_bf16
        repair_bf16()
        from megallm.ops.decode_attention import decode_attention_reference, paged_decode_attention
        page = 2**30 // 16
        keys, values = (torch.empty(3, 1, page, 16, dtype=torch.float16) for _ in range(2))
        generator = torch.Generator().manual_seed(1)
        for pool in (keys, values):
            pool[2, :, :40].normal_(generator=generator)
        q = torch.randn(1, 2, 16, generator=generator).half()
        table, positions = torch.tensor([[2]]), torch.tensor([39])
        from megallm_kernels import decode_attention as kernel
        launch = kernel.plan(0, 16, group=2, num_cells=64, element_bytes=2)
        found = kernel.forward(q, keys, values, table, positions, window=0, scale=0.25, launch=launch)
        near = [pool[2:, :, :48].clone().double() for pool in (keys, values)]
        wanted = decode_attention_reference(q.double(), *near, torch.tensor([[0]]), positions, window=None)
        torch.testing.assert_close(found.flatten(1).double(), wanted, rtol=0, atol=4e-3)
    """))


def test_it_is_an_operator() -> None:
    given = cache([33, 60], heads=4, kv_heads=2, dim=16, page=32, pages=2)
    clean = [each.nan_to_num() if each.is_floating_point() else each for each in given]
    opcheck(kernel.decode_attention, (*clean, 0, 0.25))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 16)}, "3 query heads do not divide among 2 kv heads"),
        ({"q": torch.zeros(2, 4, 8)}, "expected q"),
        ({"q": torch.zeros(2, 4, 16).half()}, "cast them to one dtype"),
        ({"q": torch.zeros(2, 4, 16).double()}, "float64"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, "for 2 rows"),
        ({"positions": torch.zeros(2)}, "expected integers"),
        ({"table": torch.zeros(2, 0, dtype=torch.int64)}, "unit stride"),
        ({"window": -1}, "a window is 1 or more"),
        ({"keys": torch.zeros(2, 2, 16, 32)[..., ::2]}, "contiguous"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "q": torch.zeros(2, 4, 16), "keys": torch.zeros(2, 2, 16, 16), "values": torch.zeros(2, 2, 16, 16),
        "table": torch.zeros(2, 1, dtype=torch.int64), "positions": torch.zeros(2, dtype=torch.int64),
    }  # fmt: skip
    options = {"window": 0, "scale": 1.0 / math.sqrt(16)} | given | change
    with pytest.raises(ValueError, match=message):
        kernel.forward(options.pop("q"), **options)
