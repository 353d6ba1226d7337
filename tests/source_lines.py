"""Definitions and lines of an installed package's file, run as they are, without importing the package."""

from __future__ import annotations
import __future__ as future

import ast
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

Space = dict[str, Any]


class Config(dict):  # type: ignore[type-arg]
    """Options as attributes and as items."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Source:
    """One file of a package."""

    def __init__(self, path: Path, **names: Any) -> None:
        self._text = path.read_text(encoding="utf-8")
        self._tree, self._path = ast.parse(self._text), str(path)
        self.space: Space = {"torch": torch, "np": np, "nn": nn, "F": F, "defaultdict": defaultdict} | names

    def define(self, *names: str) -> Space:
        """Runs the definitions of top-level functions, classes and constants, without their decorators."""
        return self._run([node for node in self._tree.body if _name(node) in names], len(names))

    def methods(self, owner: str, *names: str) -> type:
        """A class of its own with these methods."""
        (found,) = (node for node in self._tree.body if _name(node) == owner)
        assert isinstance(found, ast.ClassDef)
        space = self._run([node for node in found.body if _name(node) in names], len(names))
        return type(owner, (), {name: space[name] for name in names})

    def lines(self, first: str, last: str, /, **scope: Any) -> Space:
        """Runs the lines from the first that begins with `first` to the next that begins with `last`."""
        every = self._text.splitlines()
        start = next(i for i, line in enumerate(every) if line.strip().startswith(first))
        stop = next(i for i, line in enumerate(every) if i >= start and line.strip().startswith(last))
        space = self.space | scope
        exec(compile(textwrap.dedent("\n".join(every[start : stop + 1])), self._path, "exec"), space)
        return space

    def _run(self, nodes: list[ast.stmt], count: int) -> Space:
        assert len(nodes) == count, f"{self._path}: {len(nodes)} of {count} definitions"
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                node.decorator_list = []
        flags = future.annotations.compiler_flag
        exec(compile(ast.Module(body=nodes, type_ignores=[]), self._path, "exec", flags=flags), self.space)
        return self.space


def _name(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return getattr(node, "name", None)
