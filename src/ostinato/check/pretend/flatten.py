"""Leaves of the arguments of an operation. Faster than pytree for tuples, lists and dicts."""

from __future__ import annotations

from typing import Any

import torch


def leaves(value: Any, into: list[Any] | None = None) -> list[Any]:
    """The leaves of nested tuples, lists and dicts, in order."""
    found = [] if into is None else into
    if isinstance(value, tuple | list):
        for item in value:
            if isinstance(item, tuple | list | dict):
                leaves(item, found)
            else:
                found.append(item)
    elif isinstance(value, dict):
        for item in value.values():
            leaves(item, found)
    else:
        found.append(value)
    return found


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors among the leaves."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor)]
