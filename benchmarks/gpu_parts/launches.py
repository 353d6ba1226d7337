"""Which launch settings the kernels use: recorded as they are planned, and listed from the tables of the kernel files.

A check that fails condemns the settings it ran with; a measurement that would use condemned settings is not made.
Recording replaces the module's `plan...` functions, which the launch functions look up by name at each call.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from types import ModuleType
from typing import Any

from gpu_parts import checks_decode

PACKAGE = "megallm_kernels"


def describe(module: ModuleType, settings: Any) -> str:
    """`norm: Launch(rows=1, ...)`, equal for equal settings."""
    return f"{module.__name__.rpartition('.')[2]}: {settings!r}"


@contextlib.contextmanager
def recorded() -> Iterator[set[str]]:
    """The launch settings planned inside, of all kernel files; those not imported before are not watched."""
    used: set[str] = set()
    replaced: list[tuple[ModuleType, str, Callable[..., Any]]] = []
    for name, module in list(sys.modules.items()):
        if not name.startswith(PACKAGE + "."):
            continue
        for attribute, function in list(vars(module).items()):
            if attribute.startswith("plan") and callable(function):
                home = sys.modules.get(getattr(function, "__module__", ""), module)
                setattr(module, attribute, _watched(function, home, used))
                replaced.append((module, attribute, function))
    try:
        yield used
    finally:
        for module, attribute, function in replaced:
            setattr(module, attribute, function)


def import_kernels() -> dict[str, str]:
    """Imports every kernel file that is there; {file: why not} of those that do not load."""
    package = importlib.import_module(PACKAGE)
    absent = {}
    for found in pkgutil.iter_modules(package.__path__):
        if found.name.startswith("_"):
            continue
        try:
            importlib.import_module(f"{PACKAGE}.{found.name}")
        except Exception as error:  # a file that does not load is a finding, not the end of the run
            absent[found.name] = f"{type(error).__name__}: {error}"
    return absent


def expected(arch: int, num_sms: int) -> dict[str, set[str]]:
    """{kernel file: every launch that its tables give on this GPU}; "?" and the reason where a table cannot be read."""
    result: dict[str, set[str]] = {}
    for name, lister in _LISTERS.items():
        module = sys.modules.get(f"{PACKAGE}.{name}")
        if module is None:
            continue
        try:
            result[name] = {describe(module, settings) for settings in lister(module, arch, num_sms)}
        except Exception as error:  # the file's tables have changed their form
            result[name] = {f"? {name}: {type(error).__name__}: {error}"}
    return result


def _watched(function: Callable[..., Any], home: ModuleType, used: set[str]) -> Callable[..., Any]:
    @wraps(function)
    def plan(*args: Any, **kwargs: Any) -> Any:
        settings = function(*args, **kwargs)
        used.add(describe(home, settings))
        return settings

    return plan


def _norm(module: Any, arch: int, num_sms: int) -> Iterator[Any]:
    for backward, table in ((False, module._FORWARD), (True, module._BACKWARD)):
        for largest, *_ in table:
            yield module.plan(largest, backward=backward)


def _permute(module: Any, arch: int, num_sms: int) -> Iterator[Any]:
    for backward, table in ((False, module._COPY), (True, module._BACKWARD)):
        for largest, *_ in table:
            yield module.plan(largest, backward=backward)


def _activation(module: Any, arch: int, num_sms: int) -> Iterator[Any]:
    for largest, *_ in module._SETTINGS:
        yield module.plan(largest)


def _cross_entropy(module: Any, arch: int, num_sms: int) -> Iterator[Any]:
    for gradient, tables in ((False, module._STATISTICS), (True, module._GRADIENT)):
        for largest, *_ in tables[max(a for a in tables if a <= arch)]:
            yield module.plan(min(largest, 131072), arch=arch, gradient=gradient)


def _adamw(module: Any, arch: int, num_sms: int) -> Iterator[Any]:
    settings = module._SETTINGS
    for chunk in settings.get(arch, settings[max(settings)])[1]:
        yield module.plan(chunk * num_sms * module._PROGRAMS_PER_SM, arch=arch, num_sms=num_sms)


def _attention(module: Any, arch: int, num_sms: int) -> Iterator[Any]:
    for dim in (64, 128, 256):
        for element_bytes, aligned in ((2, True), (2, False), (4, True)):
            yield module.plan(arch, dim, element_bytes=element_bytes, aligned=aligned)


def _attention_backward(module: Any, arch: int, num_sms: int) -> Iterator[Any]:
    for dim in (64, 128, 256):
        for element_bytes, aligned in ((2, True), (2, False), (4, True)):
            for deterministic in (False, True):
                settings = {"element_bytes": element_bytes, "aligned": aligned, "deterministic": deterministic}
                yield module.plan(arch, dim, **settings)


def _decode_attention(module: Any, arch: int, num_sms: int) -> Iterator[Any]:
    for dim in (64, 128, 256):
        for element_bytes in (2, 4) if dim <= 128 else (2,):
            settings = {"group": checks_decode.GROUP, "num_cells": checks_decode.NUM_CELLS}
            yield module.plan(arch, dim, **settings, element_bytes=element_bytes)


def _grouped_gemm(module: Any, arch: int, num_sms: int) -> Iterator[Any]:
    for rows in (1, 100_000):
        for element_bytes, aligned in ((2, True), (2, False), (4, True)):
            for dweight in (False, True):
                yield module.plan(arch, rows, dweight=dweight, element_bytes=element_bytes, aligned=aligned)


_LISTERS: dict[str, Callable[[ModuleType, int, int], Iterator[Any]]] = {
    "norm": _norm,
    "activation": _activation,
    "cross_entropy_kernels": _cross_entropy,
    "adamw_plan": _adamw,
    "attention_forward": _attention,
    "attention_backward": _attention_backward,
    "decode_attention": _decode_attention,
    "grouped_gemm": _grouped_gemm,
    "permute": _permute,
}
