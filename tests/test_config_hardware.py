"""The GPU table finds the right row or none."""

from __future__ import annotations

import pytest

from megallm.config.hardware import GPUS, find_gpu


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA GH200 480GB", "GH200 96GB"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB SXM"),
        ("A100-SXM4-40GB", "A100 40GB SXM"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB PCIe"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla V100-SXM2-32GB", "V100 32GB SXM"),
    ],
)
def test_driver_names_find_their_row(device_name: str, name: str) -> None:
    gpu = find_gpu(device_name)
    assert gpu is not None
    assert gpu.name == name


@pytest.mark.parametrize(
    "device_name",
    [
        "", "cpu", "NVIDIA", "NVIDIA A10G", "NVIDIA A1000", "NVIDIA RTX A4000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H800 PCIe", "NVIDIA B300 SXM6 AC",
        "AMD Instinct MI300X", "NVIDIA A100",
    ],
)  # fmt: skip
def test_an_unknown_device_has_no_row(device_name: str) -> None:
    assert find_gpu(device_name) is None


def test_rows_are_consistent() -> None:
    names = [name.lower() for gpu in GPUS for name in gpu.device_names]
    assert len(names) == len(set(names))
    for gpu in GPUS:
        assert gpu.source
        assert 1e10 < gpu.memory_bytes < 1e12
        assert 2e11 < gpu.memory_bytes_per_s < 1e13
        assert 1e13 <= gpu.fp32_flops < 1.1e14
        if gpu.bf16_flops is not None:
            assert gpu.tf32_flops is not None
            assert gpu.bf16_flops / gpu.tf32_flops == pytest.approx(2.0, rel=0.02)
            assert gpu.fp8_flops is None or gpu.fp8_flops / gpu.bf16_flops == pytest.approx(2.0, rel=0.03)


def test_peak_by_precision() -> None:
    h200, a100 = find_gpu("NVIDIA H200"), find_gpu("NVIDIA A100-SXM4-80GB")
    assert h200 is not None and a100 is not None
    assert h200.peak_flops("bf16") == 989.4e12
    assert a100.peak_flops("bf16") == 312e12  # the peak that SC21 and K22 divide by
    assert a100.peak_flops("fp32") == 19.5e12
    assert a100.peak_flops("fp8") is None
    assert a100.peak_flops("fp64") is None
