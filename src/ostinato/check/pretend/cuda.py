"""``torch.cuda`` and ``torch.accelerator`` of the pretended device."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.amp.autocast_mode
import torch.cuda
import torch.cuda.graphs
from torch._subclasses.fake_tensor import FakeTensor

from ostinato.check.finding import Certainty, Severity
from ostinato.check.frames import asks_as_user, caller_is_user
from ostinato.check.pretend.generator import PretendGenerator
from ostinato.check.pretend.graph import make_graph_classes
from ostinato.check.pretend.streams import StreamContext, make_classes
from ostinato.check.pretend.world import World

_GIB = 1 << 30


class _Properties:
    """What ``get_device_properties`` answers; sizes in bytes."""

    def __init__(self, world: World) -> None:
        self.name = world.target.name
        self.major, self.minor = world.target.arch
        self.total_memory = 141 * _GIB
        self.multi_processor_count = 132
        self.warp_size = 32
        self.max_threads_per_multi_processor = 2048
        self.shared_memory_per_block_optin = 227 * 1024
        self.L2_cache_size = 50 << 20
        self.regs_per_multiprocessor = 65536


class _DeviceContext:
    """``torch.cuda.device`` and ``device_of``."""

    world: World

    def __init__(self, device: Any) -> None:
        found = self.world.device_of(device) if isinstance(device, torch.Tensor) else self.world.normalise(device)
        self._index = None if found is None or found.index is None else found.index
        self._previous = 0

    def __enter__(self) -> None:
        """Change the current device."""
        self._previous = self.world.current_index
        if self._index is not None and self._index >= 0:
            self.world.current_index = self._index

    def __exit__(self, *error: object) -> None:
        """Change it back."""
        self.world.current_index = self._previous


class Patches:
    """Replacements of module attributes that are undone together."""

    def __init__(self) -> None:
        self._saved: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Replace an attribute, if the owner has it."""
        if name in dir(owner):
            self._saved.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back, last first."""
        for owner, name, value in reversed(self._saved):
            setattr(owner, name, value)
        self._saved.clear()


def _by_caller(pretended: Any, real: Callable[..., Any]) -> Callable[..., Any]:
    """Answer the checked code with the pretence, and torch's own code with the truth: FakeTensorMode asks too."""

    def answer(*args: Any, **kwargs: Any) -> Any:
        if not asks_as_user(sys._getframe(1).f_code.co_filename):
            return real(*args, **kwargs)
        return pretended(*args, **kwargs) if callable(pretended) else pretended

    return answer


def _reporting(
    world: World, rule: str, severity: Severity, message: str, op: str, result: Any = None
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        # Whether the allocator really has to free something depends on what it has cached.
        certainty = Certainty.CONDITIONAL if rule == "ALLOCATOR" else Certainty.PROVED
        world.report(rule, severity, message, op, certainty=certainty)
        return result

    return call


def _answer(value: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return value

    return call


def _patch_state(world: World, patches: Patches) -> None:
    cuda = torch.cuda
    default_generators = tuple(PretendGenerator("cuda") for _ in range(world.target.num_devices))
    for generator in default_generators:
        generator.is_registered = generator.is_default = True
    patches.put(cuda, "default_generators", default_generators)
    patches.put(cuda, "is_available", _by_caller(True, cuda.is_available))
    patches.put(cuda, "is_initialized", _by_caller(True, cuda.is_initialized))
    answers: dict[str, Any] = {
        "device_count": world.target.num_devices,
        "init": None,
        "_lazy_init": None,
        "get_device_capability": world.target.arch,
        "get_device_name": world.target.name,
        "get_arch_list": [f"sm_{world.target.arch[0]}{world.target.arch[1]}"],
        "is_bf16_supported": True,
        "is_tf32_supported": True,
        "mem_get_info": (100 * _GIB, 141 * _GIB),
        "memory_stats": {},
        "memory_snapshot": [],
        "can_device_access_peer": True,
        "get_sync_debug_mode": 0,
        "graph_pool_handle": (0, 1),
    }
    answers |= dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 0)
    answers |= dict.fromkeys(
        ("reset_peak_memory_stats", "reset_max_memory_allocated", "set_sync_debug_mode", "ipc_collect")
    )
    for name, value in answers.items():
        patches.put(cuda, name, _answer(value))
    for name in ("range_push", "range_pop", "mark", "range_start", "range_end"):
        patches.put(cuda.nvtx, name, _answer(0))
    patches.put(cuda, "get_device_properties", _answer(_Properties(world)))
    patches.put(cuda, "current_device", lambda: world.current_index)
    patches.put(cuda, "set_device", lambda device: _set_device(world, device))
    patches.put(cuda, "is_current_stream_capturing", lambda: world.in_region)
    patches.put(cuda.graphs, "is_current_stream_capturing", lambda: world.in_region)
    context = type("device", (_DeviceContext,), {"world": world})
    patches.put(cuda, "device", context)
    patches.put(cuda, "device_of", context)


def _set_device(world: World, device: Any) -> None:
    found = world.normalise(device)
    if found is not None and found.type == "cuda" and found.index is not None and found.index >= 0:
        world.current_index = found.index


def _patch_streams(world: World, patches: Patches) -> None:
    cuda = torch.cuda
    stream, event, state = make_classes(world)
    patches.put(cuda, "Stream", stream)
    patches.put(cuda, "ExternalStream", stream)
    patches.put(cuda, "Event", event)
    patches.put(cuda, "stream", StreamContext)
    patches.put(cuda, "StreamContext", StreamContext)
    patches.put(cuda, "current_stream", lambda device=None: state.current)
    patches.put(cuda, "default_stream", lambda device=None: state.default)
    patches.put(cuda, "set_stream", state.enter)
    patches.put(torch, "Stream", stream)
    patches.put(torch, "Event", event)
    graph, graph_context, make_graphed = make_graph_classes(world, state)
    patches.put(cuda, "CUDAGraph", graph)
    patches.put(cuda.graphs, "CUDAGraph", graph)
    patches.put(cuda, "graph", graph_context)
    patches.put(cuda.graphs, "graph", graph_context)
    patches.put(cuda, "make_graphed_callables", make_graphed)
    accelerator = torch.accelerator
    patches.put(accelerator, "is_available", _by_caller(True, accelerator.is_available))
    patches.put(accelerator, "current_accelerator", _answer(torch.device("cuda")))
    patches.put(accelerator, "device_count", _answer(world.target.num_devices))
    patches.put(accelerator, "current_device_index", lambda: world.current_index)
    patches.put(accelerator, "current_stream", lambda device=None: state.current)


def _patch_violations(world: World, patches: Patches) -> None:
    cuda = torch.cuda
    waits = _reporting(world, "STREAM_SYNC", Severity.ERROR, "the host waits for the device", "torch.cuda.synchronize")
    patches.put(cuda, "synchronize", waits)
    patches.put(torch.accelerator, "synchronize", waits)
    for name in (
        "empty_cache",
        "set_per_process_memory_fraction",
        "caching_allocator_alloc",
        "caching_allocator_delete",
    ):
        call = _reporting(
            world, "ALLOCATOR", Severity.ERROR, "the allocator may not be changed in a capture", f"torch.cuda.{name}", 0
        )
        patches.put(cuda, name, call)
        patches.put(cuda.memory, name, call)
    seeds = "seeding in a capture: refused, or ignored if the seed is the current one"
    for name in ("manual_seed", "manual_seed_all", "seed", "seed_all"):
        patches.put(cuda, name, _reporting(world, "RNG_SEED", Severity.HAZARD, seeds, f"torch.cuda.{name}"))
        patches.put(cuda.random, name, _reporting(world, "RNG_SEED", Severity.HAZARD, seeds, f"torch.cuda.{name}"))
    state_read = _reporting(
        world,
        "D2H_SYNC",
        Severity.ERROR,
        "the generator's state is read or set by the host",
        "rng_state",
        torch.zeros(16, dtype=torch.uint8),
    )
    for name in ("get_rng_state", "get_rng_state_all", "set_rng_state", "set_rng_state_all"):
        patches.put(cuda, name, state_read)
    real_seed = torch.manual_seed

    def manual_seed(seed: int) -> torch.Generator:
        world.report("RNG_SEED", Severity.HAZARD, seeds, "torch.manual_seed")
        return real_seed(seed)

    patches.put(torch, "manual_seed", manual_seed)
    patches.put(torch.random, "manual_seed", manual_seed)
    patches.put(torch, "Generator", PretendGenerator)


def _patch_optimizers(world: World, patches: Patches) -> None:
    """torch refuses to capture some optimizers; report that, and go on to see the rest."""
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        real = getattr(torch.optim.Optimizer, name, None)
        if real is None:
            continue

        def check(self: Any, _real: Callable[[Any], None] = real) -> None:
            try:
                _real(self)
            except RuntimeError as error:
                world.report("CAPTURABLE", Severity.ERROR, f"torch refuses: {error}", f"{type(self).__name__}.step")

        patches.put(torch.optim.Optimizer, name, check)


def _patch_autocast(patches: Patches) -> None:
    """``torch.autocast("cuda")`` acts on the CPU's kernels, with CUDA's default dtype."""
    autocast = torch.amp.autocast_mode.autocast
    real = autocast.__init__

    def init(self: Any, device_type: str, dtype: torch.dtype | None = None, *args: Any, **kwargs: Any) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.float16
        real(self, device_type, dtype, *args, **kwargs)

    patches.put(autocast, "__init__", init)


def _patch_load(world: World, patches: Patches) -> None:
    """``torch.load(map_location="cuda")`` reads to the CPU and declares the result to be on the device."""
    real = torch.load

    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        names_gpu = isinstance(map_location, str | torch.device) and str(map_location).startswith("cuda")
        loaded = real(f, "cpu" if names_gpu else map_location, *args, **kwargs)
        if names_gpu:
            device = world.normalise(map_location)
            torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: world.put(t, device), loaded)
        return loaded

    patches.put(torch, "load", load)


def _patch_storages(world: World, patches: Patches) -> None:
    """Addresses can also be asked of a storage, which passes no mode."""
    real = torch.UntypedStorage.data_ptr

    def data_ptr(self: torch.UntypedStorage) -> int:
        if world.watching and world.has_storage_on_device(self) and caller_is_user():
            text = "Python reads an address, and the graph keeps the one of the capture"
            world.report("DATA_PTR", Severity.HAZARD, text, "UntypedStorage.data_ptr")
        return real(self)

    patches.put(torch.UntypedStorage, "data_ptr", data_ptr)


def _patch_triton(world: World, patches: Patches) -> None:
    """A Triton launch has no CPU kernel: it is opaque, and what it writes is not written."""
    runtime = sys.modules.get("triton.runtime.jit")
    tuner = sys.modules.get("triton.runtime.autotuner")
    owners = [(runtime, "JITFunction"), (tuner, "Autotuner"), (tuner, "Heuristics")]

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        name = getattr(self, "__name__", None) or getattr(getattr(self, "fn", None), "__name__", "kernel")
        world.opaque_ops[f"triton::{name}"] = world.opaque_ops.get(f"triton::{name}", 0) + 1
        world.report(
            "OPAQUE_OP",
            Severity.INFO,
            "a Triton kernel: it was not run, its outputs keep their old values",
            f"triton::{name}",
        )

    for module, name in owners:
        if module is not None:
            patches.put(getattr(module, name), "run", run)


@contextlib.contextmanager
def pretended_cuda(world: World) -> Iterator[None]:
    """Answer as a machine with GPUs would, for as long as the context lasts."""
    patches = Patches()
    try:
        _patch_state(world, patches)
        _patch_streams(world, patches)
        _patch_violations(world, patches)
        _patch_optimizers(world, patches)
        _patch_grouping(world, patches)
        _patch_autocast(patches)
        _patch_load(world, patches)
        _patch_storages(world, patches)
        _patch_triton(world, patches)
        if world.is_meta:
            _patch_fake_modules(world, patches)
        yield
    finally:
        patches.undo()


def _patch_grouping(world: World, patches: Patches) -> None:
    """``foreach`` optimizers group tensors in C++, which sees the real device."""
    real = torch._C._group_tensors_by_device_and_dtype

    def group(lists: Any, with_indices: bool = False) -> dict[Any, Any]:
        groups: dict[Any, Any] = {}
        for (device, dtype), (members, indices) in real(lists, with_indices).items():
            for position, tensor in enumerate(members[0]):
                placed = world.device_of(tensor) if tensor is not None else None
                key = (placed or device, dtype)
                found, order = groups.setdefault(key, ([[] for _ in members], []))
                for column, values in zip(found, members, strict=True):
                    if values:
                        column.append(values[position])
                if with_indices:
                    order.append(indices[position])
        return groups

    patches.put(torch._C, "_group_tensors_by_device_and_dtype", group)


def _patch_fake_modules(world: World, patches: Patches) -> None:
    """FakeTensor parameters cannot be swapped in place, as ``Module.to`` would: put new ones instead."""
    patches.put(FakeTensor, "device", property(_fake_device(world)))
    made: dict[int, tuple[Any, Any, Any]] = {}

    def apply(
        self: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> torch.nn.Module:
        if recurse:
            for child in self.children():
                child._apply(fn)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        with torch.no_grad():
            for owned in (self._parameters, self._buffers):
                for key, tensor in owned.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made or made[id(tensor)][2] is not fn:
                        moved: torch.Tensor = fn(tensor)
                        is_parameter = isinstance(tensor, torch.nn.Parameter) and moved is not tensor
                        moved = torch.nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
                        made[id(tensor)] = (tensor, moved, fn)
                    owned[key] = made[id(tensor)][1]
        return self

    patches.put(torch.nn.Module, "_apply", apply)


def _fake_device(world: World) -> Callable[[FakeTensor], torch.device]:
    real = FakeTensor.device.fget  # type: ignore[attr-defined]  # FakeTensor.device is a Python property

    def device(self: FakeTensor) -> torch.device:
        if asks_as_user(sys._getframe(1).f_code.co_filename):
            found = world.device_of(self)
            if found is not None:
                return found
        answer: torch.device = real(self)
        return answer

    return device
