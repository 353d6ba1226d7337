"""What each GPU can do at best: the denominators of MFU and of a memory plan.

Peaks are DENSE: makers' headline figures for NVIDIA since Ampere are with 2:4 sparsity, twice these. Sources are the
makers' datasheets, named in each row; `find_gpu` returns None for a device that is not here, never a neighbour's row,
because a wrong peak silently spoils every MFU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Peak rates of one GPU."""

    name: str
    """Short name for reports."""
    device_names: tuple[str, ...]
    """What the driver calls it, without NVIDIA, Tesla or GeForce; `find_gpu` looks for one of these."""
    bf16_flops: float | None
    """Peak dense bf16 tensor FLOP/s with fp32 accumulation; None = the GPU has no bf16 tensor cores."""
    tf32_flops: float | None
    """Peak dense TF32 tensor FLOP/s; None = none."""
    fp32_flops: float
    """Peak fp32 FLOP/s without tensor cores."""
    fp8_flops: float | None
    """Peak dense fp8 tensor FLOP/s; None = none."""
    memory_bytes: float
    """Advertised capacity, GB read as 1e9: a little less than what HBM parts really have."""
    memory_bytes_per_s: float
    """Peak memory bandwidth."""
    source: str
    """Where the figures are published."""

    def peak_flops(self, precision: str) -> float | None:
        """Peak FLOP/s of matrix products in `precision` (fp32, tf32, bf16, fp16, fp8); None if there is no figure.

        fp16 and bf16 run at one rate, except where bf16 is missing; fp64 is for proofs and has no row.
        """
        known = {"fp32": self.fp32_flops, "tf32": self.tf32_flops, "bf16": self.bf16_flops, "fp16": self.bf16_flops}
        return {**known, "fp8": self.fp8_flops}.get(precision)


def find_gpu(device_name: str) -> Gpu | None:
    """The row of the GPU that the driver calls `device_name` ("NVIDIA H100 80GB HBM3"), or None.

    A row's device name must be in it, whole words, and every other word must be one that does not change the chip: so
    an A100 is not an A10, and a MIG slice, a laptop part or a China edition is unknown instead of wrong.
    """
    words = _words(device_name)
    for gpu in GPUS:
        for known in gpu.device_names:
            wanted = _words(known)
            for start in range(len(words) - len(wanted) + 1):
                rest = words[:start] + words[start + len(wanted) :]
                if words[start : start + len(wanted)] == wanted and not set(rest) - _NEUTRAL_WORDS:
                    return gpu
    return None


_NEUTRAL_WORDS = frozenset({"nvidia", "tesla", "geforce", "gpu", "tensor", "core"})


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\s\-_]+", name.lower()) if word]


def _row(
    name: str, device_names: tuple[str, ...], bf16: float | None, tf32: float | None, fp32: float, fp8: float | None,
    memory_gb: float, gb_per_s: float, source: str = "",
) -> Gpu:  # fmt: skip
    """One row: rates in TFLOP/s, capacity in GB, bandwidth in GB/s; `source` "" = the datasheet of its name."""

    def tera(rate: float | None) -> float | None:
        return None if rate is None else rate * 1e12

    return Gpu(
        name=name, device_names=device_names, bf16_flops=tera(bf16), tf32_flops=tera(tf32), fp32_flops=fp32 * 1e12,
        fp8_flops=tera(fp8), memory_bytes=memory_gb * 1e9, memory_bytes_per_s=gb_per_s * 1e9,
        source=source or f"NVIDIA {name} datasheet",
    )  # fmt: skip


_GB200 = "NVIDIA GB200 NVL72 datasheet, divided by 72"
_B200 = "NVIDIA HGX B200 datasheet, divided by 8"
_A100 = "NVIDIA A100 datasheet"
_H100 = "NVIDIA H100 datasheet and Hopper whitepaper"
_V100 = "NVIDIA V100 datasheet"
_ADA = "NVIDIA Ada architecture whitepaper"
_GA102 = "NVIDIA GA102 architecture whitepaper"

# fmt: off
GPUS: tuple[Gpu, ...] = (
    #    name         device names                                    bf16  tf32   fp32  fp8  GB  GB/s
    _row("GB200", ("GB200",),                                         2500, 1250, 80.0, 5000, 186, 8000, _GB200),
    _row("B200", ("B200",),                                           2250, 1125, 75.0, 4500, 180, 8000, _B200),
    _row("H200 SXM", ("H200",),                                       989.4, 494.7, 66.9, 1978.9, 141, 4800),
    _row("H200 NVL", ("H200 NVL",),                                   835.5, 417.5, 60.0, 1670.5, 141, 4800),
    _row("GH200 96GB", ("GH200 480GB",),                              989.4, 494.7, 66.9, 1978.9, 96, 4000),
    _row("H100 SXM", ("H100 80GB HBM3", "H100 SXM"),               989.4, 494.7, 66.9, 1978.9, 80, 3350, _H100),
    _row("H100 PCIe", ("H100 PCIe", "H100 80GB PCIe"),                756.0, 378.0, 51.2, 1513.0, 80, 2000, _H100),
    _row("H100 NVL", ("H100 NVL",),                                   835.5, 417.5, 60.0, 1670.5, 94, 3900, _H100),
    _row("H800 SXM", ("H800", "H800 80GB HBM3"),                      989.4, 494.7, 66.9, 1978.9, 80, 3350),
    _row("H20", ("H20",),                                             148.0, 74.0, 44.0, 296.0, 96, 4000),
    _row("A100 80GB SXM", ("A100 SXM4 80GB", "A800 SXM4 80GB"),       312.0, 156.0, 19.5, None, 80, 2039, _A100),
    _row("A100 40GB SXM", ("A100 SXM4 40GB",),                        312.0, 156.0, 19.5, None, 40, 1555, _A100),
    _row("A100 80GB PCIe", ("A100 80GB PCIe", "A800 80GB PCIe"),      312.0, 156.0, 19.5, None, 80, 1935, _A100),
    _row("A100 40GB PCIe", ("A100 PCIE 40GB",),                       312.0, 156.0, 19.5, None, 40, 1555, _A100),
    _row("A30", ("A30",),                                             165.0, 82.0, 10.3, None, 24, 933),
    _row("A40", ("A40",),                                             149.7, 74.8, 37.4, None, 48, 696),
    _row("A10", ("A10",),                                             125.0, 62.5, 31.2, None, 24, 600),
    _row("L40S", ("L40S",),                                           362.05, 183.0, 91.6, 733.0, 48, 864),
    _row("L40", ("L40",),                                             181.05, 90.5, 90.5, 362.0, 48, 864),
    _row("L4", ("L4",),                                               121.0, 60.0, 30.3, 242.5, 24, 300),
    _row("RTX 4090", ("RTX 4090",),                                   165.2, 82.6, 82.6, 330.3, 24, 1008, _ADA),
    _row("RTX 3090", ("RTX 3090",),                                   71.0, 35.6, 35.6, None, 24, 936, _GA102),
    _row("V100 32GB SXM", ("V100 SXM2 32GB",),                        None, None, 15.7, None, 32, 900, _V100),
    _row("V100 16GB SXM", ("V100 SXM2 16GB",),                        None, None, 15.7, None, 16, 900, _V100),
)
# fmt: on
