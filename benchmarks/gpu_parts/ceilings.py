"""What this GPU reaches at best, measured in the same run: copy bandwidth and the rate of a large matrix product."""

from __future__ import annotations

import torch

from gpu_parts.clock import Clock
from gpu_parts.place import Place
from gpu_parts.rows import Row, row


def measure_ceilings(place: Place, clock: Clock) -> list[Row]:
    """Copy of several GB counting bytes read and written, and an 8192^3 bf16 product, both on random data."""
    generator = place.generator("ceilings")
    numel = place.pick(2**31, 2**12)  # 4 GiB in bf16, read and written
    source = torch.empty(numel, dtype=place.dtype, device=place.device)
    for piece in source.chunk(8):
        piece.normal_(generator=generator)
    target = torch.empty_like(source)
    size = place.pick(8192, 64)
    a, b = (place.normal(size, size, generator=generator) for _ in range(2))
    out = torch.empty_like(a)
    with clock.stream():
        copy = clock.seconds(lambda i: target.copy_(source), num_sets=1, repeats=place.pick(20, 2))
        product = clock.seconds(lambda i: torch.mm(a, b, out=out), num_sets=1, repeats=place.pick(40, 2))
    moved = 2 * numel * place.dtype.itemsize
    common = {"section": "ceilings", "dtype": place.dtype_name, "contender": "torch", "direction": "fwd"}
    return [
        row(
            **common, op="copy", case=f"{moved / 1e9:.1f} GB", eager_us=copy.p50, eager_us_p20=copy.p20,
            eager_us_p80=copy.p80, gb_per_s=moved / copy.p50 * 1e-3,
        ),
        row(
            **common, op="matmul", case=f"{size}^3", eager_us=product.p50, eager_us_p20=product.p20,
            eager_us_p80=product.p80, tflop_per_s=2.0 * size**3 / product.p50 * 1e-6,
        ),
    ]  # fmt: skip
