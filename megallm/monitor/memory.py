"""What a rank really holds, by cause: model states counted where they lie, everything else watched for one step.

    states          sizes of the storages behind parameters, gradients and optimizer state, now
    activations     most bytes at once of all other tensors that the step made on the device
    buffers         most bytes at once of states that come and go (whole buckets), above what stays

`MemoryWatch` sees every operation of a step and the tensors that come out of it, so a step takes about a third longer
on a CPU: it is meant for one step. It sees no memory inside an operation (a GEMM's workspace); on a GPU the
allocator's own peak stands beside it. Not counted as activations: copies that gloo's exchange on a CPU needs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megallm.optim.flat import FlatParameters
from megallm.optim.gradients import Gradients
from megallm.optim.optimizer import Optimizer
from megallm.parallel.collectives import all_reduce_
from megallm.parallel.mesh import Mesh
from megallm.planner.memory import CauseBytes


@dataclass(frozen=True, kw_only=True)
class MeasuredMemory:
    """What one rank held."""

    device: CauseBytes
    host: CauseBytes
    peak: int
    """Most bytes at once on the device: less than the causes' sum, for they peak at different times."""
    allocator_peak: int | None = None
    """What the GPU's allocator had given out at most; None on a CPU."""


def held_states(flat: FlatParameters, gradients: Gradients, optimizer: Optimizer) -> tuple[CauseBytes, CauseBytes]:
    """(on the device, on the host): bytes of parameters, gradients and optimizer state now.

    Activations and buffers of the device are None: only `MemoryWatch` sees them.
    """
    on_device, on_host = _states(flat, gradients, optimizer)
    return _bytes_of(on_device, activations=None, buffers=None), _bytes_of(on_host)


def largest(measured: MeasuredMemory, mesh: Mesh) -> MeasuredMemory:
    """The maximum over all ranks, number by number. A collective."""
    numbers = [value for _, value in (*measured.device.items(), *measured.host.items())]
    numbers += [measured.peak, measured.allocator_peak]
    found = torch.tensor([-1.0 if n is None else float(n) for n in numbers], dtype=torch.float64, device=mesh.device)
    values = [None if n < 0 else int(n) for n in all_reduce_(found, mesh.world, op="max").tolist()]
    size = len(fields(CauseBytes))
    names = [name for name, _ in measured.device.items()]
    device, host = (
        CauseBytes(**dict(zip(names, part, strict=True))) for part in (values[:size], values[size : 2 * size])
    )
    return MeasuredMemory(device=device, host=host, peak=values[-2] or 0, allocator_peak=values[-1])


class MemoryWatch(TorchDispatchMode):
    """Watches what is in memory while a step runs inside `with`; then `result()`."""

    def __init__(self, flat: FlatParameters, gradients: Gradients, optimizer: Optimizer) -> None:
        super().__init__()
        self._parts = (flat, gradients, optimizer)
        self._device = flat.model.mesh.device
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        on_device, on_host = _states(flat, gradients, optimizer)
        states = [t.untyped_storage() for tensors in (*on_device.values(), *on_host.values()) for t in tensors]
        self._known = {storage._cdata for storage in states}
        transient = [flat_bucket.params for flat_bucket in flat.buckets if flat_bucket.is_sharded]
        transient += [bucket.whole for bucket in gradients.buckets if flat.zero >= 2]
        self._transient = [tensor.untyped_storage() for tensor in transient]
        self._live: dict[int, _Storage] = {}
        self._total = 0
        self._most = {"activations": 0, "buffers": 0, "both": 0}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation imports torch.compile, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._see(tensor)
        if func is torch.ops.c10d.recv_.default:
            self._forget(args[0])
        if not func.__name__.startswith("empty"):  # what is empty is on its way to be used
            self._sample()
        return out

    def result(self) -> MeasuredMemory:
        """What was held at most, in the steps watched; states as they are now."""
        device, host = held_states(*self._parts)
        states, is_cuda = device.total, self._device.type == "cuda"
        stays = sum(storage.size() for storage in self._transient)
        return MeasuredMemory(
            device=CauseBytes(
                parameters=device.parameters, gradients=device.gradients, optimizer=device.optimizer,
                activations=self._most["activations"], buffers=self._most["buffers"] - stays,
            ),
            host=host,
            peak=states - stays + self._most["both"],
            allocator_peak=torch.cuda.max_memory_allocated(self._device) if is_cuda else None,
        )  # fmt: skip

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known and key not in self._live and tensor.device.type == self._device.type:
            self._live[key] = _Storage(storage, self._gone(key))
            self._total += storage.size()

    def _forget(self, arriving: list[torch.Tensor]) -> None:
        """What only receives does not count, until an operation returns it."""
        for tensor in arriving:
            if tensor.numel() * tensor.element_size() == tensor.untyped_storage().size():
                found = self._live.pop(tensor.untyped_storage()._cdata, None)
                self._total -= found.size if found is not None else 0

    def _gone(self, key: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            found = self._live.pop(key, None)
            self._total -= found.size if found is not None else 0

        return forget

    def _sample(self) -> None:
        buffers = sum(storage.size() for storage in self._transient)
        # Storages that were resized are noticed when a new maximum is at stake; steps of 1 % keep that rare.
        if self._total > 1.01 * self._most["activations"] or self._total + buffers > 1.01 * self._most["both"]:
            self._recount()
        for name, now in (("activations", self._total), ("buffers", buffers), ("both", self._total + buffers)):
            self._most[name] = max(self._most[name], now)

    def _recount(self) -> None:
        for found in list(self._live.values()):
            storage = found.reference()
            if storage is not None:
                self._total += storage.size() - found.size
                found.size = storage.size()


class _Storage:
    """A storage that is alive."""

    def __init__(self, storage: torch.UntypedStorage, on_end: Callable[[Any], None]) -> None:
        self.reference = weakref.ref(storage, on_end)
        self.size = storage.size()


def _states(
    flat: FlatParameters, gradients: Gradients, optimizer: Optimizer
) -> tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]]:
    """{cause: tensors} on the device and on the host; a CPU that plays both keeps them apart by what they are for."""
    host = flat.host
    shards = [bucket.shard for bucket in flat.buckets]
    sums = [bucket.shard for bucket in gradients.buckets]
    # Every flat tensor that the optimizer refers to; what was counted before is not counted again.
    lists = [value for value in vars(optimizer).values() if isinstance(value, list)]
    state = [each for value in lists for each in value if isinstance(each, torch.Tensor) and each.dim() > 0]
    hosts_params = host is not None and host.holds_params and flat.zero == 3
    in_4_bits = [tensor for held in flat.model.quantized.values() for tensor in held.tensors()]
    on_device = {
        "parameters": [bucket.params for bucket in flat.buckets] + ([] if hosts_params else shards) + in_4_bits,
        "gradients": [bucket.whole for bucket in gradients.buckets] + (sums if host is None else []),
        "optimizer": state if host is None else [],
    }
    if host is None:
        return on_device, {}
    return on_device, {"parameters": shards if hosts_params else [], "gradients": sums, "optimizer": state}


def _bytes_of(tensors: dict[str, list[torch.Tensor]], **others: None) -> CauseBytes:
    counted: set[int] = set()
    found: dict[str, int | None] = {}
    for cause, members in tensors.items():
        storages = {t.untyped_storage()._cdata: t.untyped_storage().size() for t in members}
        found[cause] = sum(size for key, size in storages.items() if key not in counted)
        counted |= set(storages)
    return CauseBytes(**found, **others)


def _tensors(out: Any) -> Iterable[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        yield out
    elif isinstance(out, (tuple, list)):
        for each in out:
            yield from _tensors(each)
