"""What a capture that CUDA ended leaves behind, and how to mend it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

_LOG = logging.getLogger(__name__)


def free_generators(stream: torch.cuda.Stream, registered: Sequence[torch.Generator] = ()) -> None:
    """Make random numbers usable again on the device of ``stream`` after a capture that CUDA ended.

    PyTorch leaves the generators of such a capture believing that they are still in it ("Offset increment outside graph
    capture"): one capture that ends well frees the default generator and those ``registered``.
    """
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        graph, scratch = torch.cuda.CUDAGraph(), torch.zeros(1, device=stream.device)
        for generator in registered:
            graph.register_generator_state(generator)
        stream.synchronize()
        try:
            graph.capture_begin(capture_error_mode="thread_local")
            scratch.add_(1)
            graph.capture_end()
            graph.reset()
        except RuntimeError as error:
            _LOG.warning("random generators may be unusable after a refused capture: %s", error)
