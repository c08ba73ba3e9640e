"""Registration of ops with PyTorch, so that tracing sees one node, and lazy loading of their kernels.

The public function of an op calls its reference directly for CPU tensors; the registered op serves CUDA tensors and
tracing. A kernel's module, and with it Triton, is imported when a CUDA tensor first reaches it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, cast

import torch

# An Any, since torch.library is not annotated. Registrations live as long as this object.
LIBRARY: Any = cast(Any, torch.library).Library("ostinato", "FRAGMENT")


@functools.cache
def load(kernel: str) -> Callable[..., Any]:
    """The function that ``kernel`` names as ``module:function``, imported on first use."""
    module, _, name = kernel.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def register(
    schema: str, *, reference: Callable[..., Any], kernel: str, fake: Callable[..., Any]
) -> torch._ops.OpOverload[..., Any]:
    """Define ``ostinato::<op>`` and return its overload, to be called by the op's public function.

    schema: as torch.library.Library.define takes it; arguments that the op writes are marked there (``Tensor(a!) x``).
    reference: the CPU implementation. kernel: ``module:function`` of the CUDA launcher, imported on first use.
    fake: shapes and dtypes of the results, for tracing.
    """
    name = schema.partition("(")[0].strip()

    def launch(*args: Any) -> Any:
        return load(kernel)(*args)

    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CPU")
    LIBRARY.impl(name, launch, "CUDA")
    torch.library.register_fake(f"ostinato::{name}", fake, lib=LIBRARY)
    overload: torch._ops.OpOverload[..., Any] = getattr(torch.ops.ostinato, name).default
    return overload
