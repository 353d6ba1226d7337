"""Where a run happens and how large it is: the device, the dtype, and full or tiny shapes."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass

import torch

L2_BYTES = 60 * 2**20
"""H200's second-level cache; buffers that are used in turns are several times that together."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Device, dtype and scale."""

    device: torch.device
    tiny: bool
    """Shapes that the interpreter can take; nothing is measured there in earnest."""
    seed: int
    """Of this run: a new one each time unless given, so that every run checks other numbers."""

    @property
    def is_cuda(self) -> bool:
        """Whether kernels are compiled and events exist."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """bf16; fp32 where kernels are interpreted, since the interpreter computes bf16 wrongly unless repaired."""
        return torch.bfloat16 if self.is_cuda else torch.float32

    @property
    def dtype_name(self) -> str:
        """As in the tables: bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def arch(self) -> int:
        """90 for H200; 0 on CPU."""
        if not self.is_cuda:
            return 0
        major, minor = torch.cuda.get_device_capability(self.device)
        return 10 * major + minor

    @property
    def num_sms(self) -> int:
        """Multiprocessors; on CPU what megallm_kernels.device says of the interpreter."""
        return torch.cuda.get_device_properties(self.device).multi_processor_count if self.is_cuda else 2

    def pick(self, full: int, tiny: int) -> int:
        """The size that fits this run."""
        return tiny if self.tiny else full

    def generator(self, key: str) -> torch.Generator:
        """Random numbers of one unit: a function of (seed, key)."""
        digest = hashlib.sha256(f"{self.seed} {key}".encode()).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest[:6], "big"))

    def normal(self, *shape: int, generator: torch.Generator, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers on the device, in `dtype` (default: the place's)."""
        wanted = self.dtype if dtype is None else dtype
        return torch.randn(shape, generator=generator, device=self.device, dtype=wanted)

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)


def why_no_device(device: str) -> str | None:
    """What is missing for `device` and the way out, in one line; None if it is there. Makes no CUDA context."""
    if device != "cuda":
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own words about a driver that does not answer
        if torch.cuda.is_available():
            return None
    what = "no CUDA device" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
    return f"{what}: run on a machine with a GPU, or with --tiny --device cpu for the code path alone"


def make_place(device: str, *, tiny: bool, seed: int) -> Place:
    """The place; ValueError if its device is not there."""
    missing = why_no_device(device)
    if missing is not None:
        raise ValueError(missing)
    if device == "cpu" and not tiny:
        raise ValueError("full shapes on CPU would take days: add --tiny")
    where = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    return Place(device=where, tiny=tiny, seed=seed)
