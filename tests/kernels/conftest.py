"""Kernels run in Triton's interpreter here, with bf16 made right."""

from __future__ import annotations

from megallm.testing.triton_interpreter import repair_bf16

repair_bf16()
