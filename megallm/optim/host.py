"""The host's memory as a place for optimizer state, gradient sums and parameters (ZeRO-Offload, arXiv 2101.06840).

    backward         a bucket's sum is reduced on the device, copied to the host behind the next layers' backward
    update           the host waits for the copies, updates bucket after bucket in the order of use; a bucket's new
                     parameters are copied to the device, and gathered, while the next bucket is updated
    next forward     waits for its own buckets only

Sent in a step: gradients down and parameters up, once each. Sums over microbatches go up and down once more for each
further microbatch: they are added on the device, so that nothing on the host waits in between. So do, once a step, sums
that other groups of ranks must join: of replicated shards, of slices that tp ranks share, of an embedding that is tied
over pipeline stages.
Memory of the device that copies read or write is used again only by work that has waited for them (`mark`, `wait`).
On a CPU host and device are one: the same happens, at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megallm.parallel.recorder import Recorder
from megallm_kernels.host_memory import host_zeros


class HostMemory:
    """Memory of the host, and copies to and from a device behind what it computes."""

    def __init__(self, device: torch.device, recorder: Recorder, *, holds_params: bool) -> None:
        """holds_params: whether parameters live there too."""
        self.holds_params = holds_params
        self._device, self._recorder = device, recorder
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def is_apart(self) -> bool:
        """Whether the device has memory of its own, and work is queued on it without the host waiting."""
        return self._stream is not None

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros [numel], pinned where there is a GPU."""
        return host_zeros(numel, dtype, pinned=self._stream is not None)

    @contextmanager
    def behind(self) -> Iterator[None]:
        """What is queued inside runs after all that the device has been given so far, and beside what follows."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def store_(self, kept: torch.Tensor, values: torch.Tensor, *, add: bool) -> None:
        """Copies values, of the device, into (or adds them to) kept, on the host; inside `behind`."""
        if add:
            before = torch.empty_like(values)
            self.fetch_(before, kept)
            values.add_(before)
        self._recorder.add("to_host", "send", values.numel(), values.element_size(), 1)
        kept.copy_(values, non_blocking=True)

    def fetch_(self, target: torch.Tensor, kept: torch.Tensor) -> None:
        """Copies kept, on the host, into target, on the device; inside `behind`."""
        self._recorder.add("to_device", "send", kept.numel(), kept.element_size(), 1)
        target.copy_(kept, non_blocking=True)

    @contextmanager
    def lent(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
        """Inside, each (place on the device, kept on the host) has on the device what is kept; then it is kept again.

        The host waits for the end of it.
        """
        with self.behind():
            for place, kept in pairs:
                self.fetch_(place, kept)
            fetched = self.mark()
        self.wait(fetched)
        yield
        with self.behind():
            for place, kept in pairs:
                self.store_(kept, place, add=False)
        self.synchronize()

    def mark(self) -> Any:
        """What `wait` needs to wait for all queued so far."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, mark: Any) -> None:
        """The device goes on when the copies up to `mark` are done."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def synchronize(self) -> None:
        """The host goes on when all copies are done."""
        if self._stream is not None:
            self._stream.synchronize()
