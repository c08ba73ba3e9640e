"""Capture of a callable as a CUDA graph that cannot silently replay garbage. Knows no language model.

pool = GraphPool("cuda:0")                              # one memory pool and one stream for all graphs of a device
step = capture(run_step, (buffers,), pool=pool, state=(kv_slice,))
with pool.stream:                                       # inside, a replay is a launch and nothing else
    buffers.fill("temperature", 0.8)
    step.replay()
"""

from ostinato.graphs.breaks import Breaks, Segment
from ostinato.graphs.buckets import Buckets, Replayable
from ostinato.graphs.callable import CapturedCallable, EagerCallable
from ostinato.graphs.capture import capture
from ostinato.graphs.report import CaptureReport, Scratch
from ostinato.graphs.static import StaticBuffers, TensorSignature
from ostinato.graphs.streams import CaptureStream, GraphPool
from ostinato.graphs.verify import (
    Mismatch,
    StateSnapshot,
    Tolerance,
    compare_outputs,
    default_tolerance,
    fresh_like,
    is_poison,
    poison_,
)

__all__ = [
    "Breaks",
    "Buckets",
    "CaptureReport",
    "CaptureStream",
    "CapturedCallable",
    "EagerCallable",
    "GraphPool",
    "Mismatch",
    "Replayable",
    "Scratch",
    "Segment",
    "StateSnapshot",
    "StaticBuffers",
    "TensorSignature",
    "Tolerance",
    "capture",
    "compare_outputs",
    "default_tolerance",
    "fresh_like",
    "is_poison",
    "poison_",
]
