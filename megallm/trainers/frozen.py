"""A model without gradients that others are compared with, or scored by: on its device always, or when it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megallm.parallel.mesh import Mesh
from megallm.trainers.engine import Engine


class Frozen:
    """`with frozen.here() as engine: ...`"""

    def __init__(self, engine: Engine, *, offload: bool = False) -> None:
        """offload: outside of `here` the weights are in the host's memory. Not for shards (ZeRO 3), which stay."""
        self._engine = engine
        self._host: dict[torch.nn.Parameter, torch.Tensor] = {}
        if offload and engine.flat is None:
            is_pinned = engine.mesh.device.type == "cuda"
            for parameter in engine.model.parameters():
                away = parameter.detach().to("cpu", copy=True)
                self._host[parameter] = away.pin_memory() if is_pinned else away
            self._leave()

    @property
    def mesh(self) -> Mesh:
        """Of the engine."""
        return self._engine.mesh

    @property
    def is_away(self) -> bool:
        """Whether the weights are in the host's memory."""
        return bool(self._host) and all(p.data_ptr() == away.data_ptr() for p, away in self._host.items())

    @contextmanager
    def here(self) -> Iterator[Engine]:
        """The engine, its weights on its device. Adapters are off: they are what is trained."""
        for parameter, away in self._host.items():
            parameter.data = away.to(self._engine.mesh.device, copy=True, non_blocking=True)
        try:
            if self._engine.lora is None:
                yield self._engine
            else:
                with self._engine.model.adapters_off():
                    yield self._engine
        finally:
            self._leave()

    def _leave(self) -> None:
        for parameter, away in self._host.items():
            parameter.data = away
