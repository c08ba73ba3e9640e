"""A GPU for Python only: CPU tensors with real data that say they are on the device.

``pretence()`` is the whole of it: while it lasts, ``device="cuda"`` works on a machine without a GPU, and every
operation inside ``world.region()`` is classified.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ostinato.check.op_table import load_table
from ostinato.check.pretend.cuda import pretended_cuda
from ostinato.check.pretend.dispatch import PretendDispatch
from ostinato.check.pretend.functions import PretendFunctions
from ostinato.check.pretend.world import Gpu, Placing, World

__all__ = ["Gpu", "Placing", "World", "pretence"]


@contextlib.contextmanager
def pretence(*, gpu: Gpu | None = None, torch_version: str | None = None, meta: bool = False) -> Iterator[World]:
    """Pretend that there is a GPU.

    Args:
        gpu: the GPU; default an SM90 with a second one beside it.
        torch_version: which op table to use, like ``2.11``; default the running version.
        meta: tensors made inside are FakeTensors: no memory, no data, any size of model.
    """
    world = World(gpu or Gpu(), load_table(torch_version), is_meta=meta)
    fake = FakeTensorMode(allow_non_fake_inputs=True) if meta else contextlib.nullcontext()
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    stance = torch.compiler.set_stance("force_eager")
    with (
        warnings.catch_warnings(),
        stance,
        pretended_cuda(world),
        fake,
        PretendFunctions(world),
        PretendDispatch(world),
    ):
        warnings.simplefilter("ignore")  # what the checked code warns of must not become an error of the check
        logger.setLevel(logging.CRITICAL)  # it prints a stack for every operation that a fallback then handles
        try:
            yield world
        finally:
            logger.setLevel(level)
