"""Which back ends each fused operation has: the words of `--backend attention=triton`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megallm.config.fields import did_you_mean

BACKENDS: Mapping[str, tuple[str, ...]] = {
    "rms_norm": ("torch", "triton", "cuda", "apex"),
    "layer_norm": ("torch", "triton", "apex"),
    "rope": ("torch", "triton", "cuda"),
    "activation": ("torch", "triton"),
    "attention": ("torch", "triton", "flash-attn"),
    "decode_attention": ("torch", "triton"),
    "cross_entropy": ("torch", "triton"),
    "linear_cross_entropy": ("torch", "triton"),
    "adamw": ("torch", "triton", "cuda", "apex", "cpu"),
    "grouped_gemm": ("torch", "triton"),
    "nf4": ("torch", "triton"),
}
"""`torch` comes first: it runs everywhere and is what the others are compared with."""


def parse_backends(items: Iterable[str]) -> dict[str, str]:
    """{operation: back end} of `op=backend` items; ValueError for an unknown or doubled one."""
    forced: dict[str, str] = {}
    for item in items:
        op, separator, name = item.partition("=")
        if not separator:
            raise ValueError(f"--backend {item}: write operation=backend, such as attention=triton")
        if op not in BACKENDS:
            hint = did_you_mean(op, BACKENDS) or f": choose one of {', '.join(BACKENDS)}"
            raise ValueError(f"--backend {item}: {op!r} is no operation{hint}")
        if name not in BACKENDS[op]:
            raise ValueError(f"--backend {item}: {op} has no back end {name!r}: choose {' or '.join(BACKENDS[op])}")
        if forced.get(op, name) != name:
            raise ValueError(f"--backend names both {forced[op]} and {name} for {op}: give one")
        forced[op] = name
    return forced
