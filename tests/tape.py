"""A recorder for tests that repeats a step as a CUDA graph does: the same operations on the same tensors, no Python.

What a graph cannot hold is an error while it records: values read by the host, sizes that depend on values, numbers
that come from the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FORBIDDEN = {
    "_local_scalar_dense": "the host reads a value",
    "equal": "the host reads a value",
    "is_nonzero": "the host reads a value",
    "nonzero": "a size depends on values",
    "masked_select": "a size depends on values",
    "_unique2": "a size depends on values",
    "repeat_interleave": "a size depends on values",
    "lift_fresh": "numbers come from the host",
    "bernoulli_": "random numbers have a state",
    "uniform_": "random numbers have a state",
    "normal_": "random numbers have a state",
}

Call = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


class Tape:
    """Records calls of operations with their very tensors, and makes them again."""

    is_recording = True

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Runs it once; what makes its calls again."""
        calls: list[Call] = []
        with _Recording(calls):
            run()
        self.num_recorded += 1

        def replay() -> None:
            self.num_replayed += 1
            _play(calls)

        return replay


class Again:
    """As a tape, but by calling Python again: the operations that a tape's replay must equal, to the bit."""

    is_recording = True

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Runs it once; `run` itself."""
        run()
        return run


class _Recording(TorchDispatchMode):
    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in _FORBIDDEN, f"{func}: {_FORBIDDEN[name]}"
        if name in ("index", "index_put", "index_put_"):
            indices = [each for each in args[1] if each is not None]
            assert all(each.dtype != torch.bool for each in indices), f"{func}: a size depends on values"
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, out))
        return out


def _play(calls: list[Call]) -> None:
    works: list[Any] = []
    for func, args, kwargs, out in calls:
        if func.namespace != "c10d":  # those that belong together are under way together
            while works:
                works.pop().wait()
        found = func(*args, **kwargs)
        for old, new in zip(tree_leaves(out), tree_leaves(found), strict=True):
            if not isinstance(new, torch.Tensor):
                works += [new] if hasattr(new, "wait") else []
            elif old.data_ptr() != new.data_ptr():  # neither a view nor in place
                old.copy_(new)
    while works:
        works.pop().wait()
