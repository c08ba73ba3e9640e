"""Walks over trees of tensors: tuples, named tuples, lists, dicts and dataclasses, nested in any way.

Everything else is a leaf. Leaves that are not tensors (numbers, strings, ``None``) are *host values*: a graph cannot
see them change, so whoever compares two trees compares them for equality.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ``(path, leaf)`` in a fixed order; a path reads like Python, ``[0].logits["top"]``; the root is ``""``."""
    if names := _tuple_names(tree):
        for name, item in zip(names, tree, strict=True):
            yield from leaves(item, f"{path}.{name}")
    elif isinstance(tree, list | tuple):
        for index, item in enumerate(tree):
            yield from leaves(item, f"{path}[{index}]")
    elif isinstance(tree, dict):
        for key, item in tree.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif is_dataclass_value(tree):
        for field in dataclasses.fields(tree):
            yield from leaves(getattr(tree, field.name), f"{path}.{field.name}")
    else:
        yield path, tree


def tensors(tree: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The leaves that are tensors, with their paths."""
    return ((where, leaf) for where, leaf in leaves(tree, path) if isinstance(leaf, torch.Tensor))


def map_tensors(
    function: Callable[[torch.Tensor], torch.Tensor], tree: Any, *, keep: type | tuple[type, ...] = ()
) -> Any:
    """The same tree with every tensor replaced by ``function(tensor)``; host values and instances of ``keep`` stay."""
    if isinstance(tree, keep):
        return tree
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if _tuple_names(tree):
        return type(tree)(*(map_tensors(function, item, keep=keep) for item in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(function, item, keep=keep) for item in tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, item, keep=keep) for key, item in tree.items()}
    if is_dataclass_value(tree):
        fields = [field.name for field in dataclasses.fields(tree) if field.init]
        return dataclasses.replace(
            tree, **{name: map_tensors(function, getattr(tree, name), keep=keep) for name in fields}
        )
    return tree


def is_dataclass_value(value: Any) -> bool:
    """Whether ``value`` is an instance of a dataclass (and not the class itself)."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _tuple_names(value: Any) -> tuple[str, ...]:
    """Field names of a named tuple, else nothing."""
    return tuple(getattr(value, "_fields", ())) if isinstance(value, tuple) else ()
