"""The planner's formulas give the ZeRO paper's table of memory, and its multiples of traffic."""

from __future__ import annotations

from fractions import Fraction

import pytest

from megallm.planner.memory import elements_sent, state_bytes

# arXiv 1910.02054, table 1: GB of model states a device, {N: stages 1, 2, 3 of 7.5B, of 128B, of 1T}.
TABLE = {
    1: ((120, 120, 120), (2048, 2048, 2048), (16000, 16000, 16000)),
    4: ((52.5, 41.3, 30), (896, 704, 512), (7000, 5500, 4000)),
    16: ((35.6, 21.6, 7.5), (608, 368, 128), (4750, 2875, 1000)),
    64: ((31.4, 16.6, 1.88), (536, 284, 32), (4187, 2218, 250)),
    256: ((30.4, 15.4, 0.47), (518, 263, 8), (4046, 2054, 62.5)),
    1024: ((30.1, 15.1, 0.12), (513, 257, 2), (4011, 2013, 15.6)),
}
CELLS = [
    (number, ranks, stage, gigabytes)
    for ranks, row in TABLE.items()
    for number, cells in zip((7_500_000_000, 128_000_000_000, 1_000_000_000_000), row, strict=True)
    for stage, gigabytes in enumerate(cells, start=1)
]


@pytest.mark.parametrize(("number", "ranks", "stage", "gigabytes"), CELLS)
def test_the_paper_s_table_comes_out(number: int, ranks: int, stage: int, gigabytes: float) -> None:
    held = state_bytes(number, zero=stage, num_shards=ranks, gradient_bytes=2)
    last_digit = 10.0 ** -len(str(gigabytes).partition(".")[2])  # the paper cuts some cells and rounds others
    assert abs(float(held.total) / 1e9 - gigabytes) < last_digit


def test_traffic_is_two_or_three_times_the_parameters() -> None:
    sent = [elements_sent(1000, zero=zero, num_shards=4) / (1000 * Fraction(3, 4)) for zero in (0, 1, 2, 3)]
    assert sent == [2, 2, 2, 3]
    sent = [elements_sent(1000, zero=zero, num_shards=4, num_microbatches=5) / 750 for zero in (0, 1, 2, 3)]
    assert sent == [2, 2, 6, 15]


def test_what_is_no_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="zero 4 over 2 ranks"):
        state_bytes(1, zero=4, num_shards=2)
