"""What a capture made, in numbers."""

from __future__ import annotations

import ctypes
import dataclasses

from ostinato.errors import DeviceError

_MIB = 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Scratch:
    """A tensor that the step allocates inside the graph: bytes, and the line that makes it."""

    num_bytes: int
    site: str

    def __str__(self) -> str:
        return f"{self.num_bytes / _MIB:.2f} MiB at {self.site}"


@dataclasses.dataclass(frozen=True)
class CaptureReport:
    """What was captured. Times in milliseconds, sizes in bytes.

    ``num_nodes``: kernels, copies and fills of one replay. ``memory_bytes``: what the graph added to its pool.
    ``num_inputs``, ``num_state``, ``num_constants``: storages that the graph uses and did not make: declared inputs,
    declared state, and everything else (weights). ``num_allocations``, ``largest_allocations``: what the function
    allocates on every call, which in a graph costs its initialisation and its place in the pool.
    ``num_replays_verified``: replays that were compared with eager.
    ``notes``: what was seen and is not an error, such as inputs that the verification could not vary.
    """

    name: str
    device: str
    num_ops: int
    num_nodes: int
    memory_bytes: int
    warmup_ms: float
    capture_ms: float
    verify_ms: float
    num_inputs: int
    num_state: int
    num_constants: int
    num_allocations: int
    allocated_bytes: int
    largest_allocations: tuple[Scratch, ...]
    num_replays_verified: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        verified = f"{self.num_replays_verified} replays equal eager" if self.num_replays_verified else "not verified"
        return (
            f"{self.name} on {self.device}: {self.num_nodes} nodes from {self.num_ops} operations, "
            f"{self.memory_bytes / _MIB:.1f} MiB, captured in {self.capture_ms:.1f} ms, {verified}"
        )


def count_nodes(raw_graph: int) -> int:
    """Nodes of a ``cudaGraph_t``, from the driver, which is loaded already where there is a graph."""
    driver = ctypes.CDLL("libcuda.so.1")
    number = ctypes.c_size_t(0)
    status = driver.cuGraphGetNodes(ctypes.c_void_p(raw_graph), None, ctypes.byref(number))
    if status != 0:
        raise DeviceError(f"the CUDA driver did not count the graph's nodes (error {status}); is libcuda.so.1 its own?")
    return number.value
