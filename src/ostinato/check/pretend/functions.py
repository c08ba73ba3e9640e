"""The function mode of the pretence: what Python asks of a tensor is answered as if it were on the GPU.

Device arguments are rewritten to the CPU and remembered, device getters answer with the pretended device, and the calls
that reach the host without passing the dispatcher (``tolist``, ``numpy``, formatting, ``.to``) are handled here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _device as default_device
from torch.utils._pytree import tree_map

from ostinato.check.finding import Severity
from ostinato.check.frames import caller_is_user
from ostinato.check.pretend.flatten import leaves as leaves_of
from ostinato.check.pretend.generator import PretendGenerator
from ostinato.check.pretend.transfer import report_transfer
from ostinato.check.pretend.world import Placing, World

Args = Sequence[Any]
Kwargs = Mapping[str, Any]
Handler = Callable[[World, Callable[..., Any], Args, dict[str, Any]], Any]
_HANDLERS: dict[Any, Handler] = {}
_T = torch.Tensor


def _handles(*functions: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for function in functions:
            _HANDLERS[function] = handler
        return handler

    return register


class PretendFunctions(TorchFunctionMode):
    """Sees every call of torch's Python interface."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        """Run the call; ``types`` is unused."""
        world = self._world
        kwargs = dict(kwargs or {})
        if world.muted:
            return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(world, func, args, kwargs)
            if result is not NotImplemented:
                return result
        return _general(world, func, args, kwargs)


def _general(world: World, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    """A call without a handler of its own: rewrite its device, let its factories inherit one."""
    leaves = leaves_of((args, kwargs))
    if any(isinstance(leaf, PretendGenerator) and not leaf.is_registered for leaf in leaves):
        world.report(
            "RNG_UNREGISTERED",
            Severity.ERROR,
            "this generator is not registered with the graph",
            getattr(func, "__name__", "generator"),
        )
    if any(isinstance(leaf, PretendGenerator) for leaf in leaves):
        # The numbers come from the default generator, whose state the checker controls.
        args, kwargs = tree_map(
            lambda leaf: None if isinstance(leaf, PretendGenerator) else leaf, (tuple(args), kwargs)
        )
    placing = _explicit_placing(world, func, kwargs)
    if placing is None:
        device = next((d for d in (world.device_of(t) for t in leaves if isinstance(t, _T)) if d is not None), None)
        placing = Placing(device, explicit=False)
    is_pinned = bool(kwargs.pop("pin_memory", False))
    with world.placed(placing):
        result = func(*args, **kwargs)
    if is_pinned and isinstance(result, _T):
        world.put(result, None, pinned=True)
    return result


def _explicit_placing(world: World, func: Callable[..., Any], kwargs: dict[str, Any]) -> Placing | None:
    """The device that the call names, or that ``torch.set_default_device`` names for it; None if neither does."""
    named = kwargs.get("device")
    if named is None:
        default = default_device.CURRENT_DEVICE
        if default is None or default.type != "cuda" or func not in default_device._device_constructors():
            return None
        named = default
    device = world.normalise(named)
    if device is None or device.type not in ("cuda", "cpu"):
        return Placing(None, explicit=True)
    kwargs["device"] = torch.device("cpu")
    return Placing(device if device.type == "cuda" else None, explicit=True)


# ---------------------------------------------------------------------- getters
@_handles(_T.device.__get__)
def _device(world: World, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    found = world.device_of(args[0])
    return func(*args, **kwargs) if found is None else found


@_handles(_T.is_cuda.__get__)  # type: ignore[attr-defined]  # a getset descriptor, which the stubs call a bool
def _is_cuda(world: World, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> bool:
    return world.on_device(args[0])


@_handles(_T.is_cpu.__get__)  # type: ignore[attr-defined]  # as above
def _is_cpu(world: World, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs) and not world.on_device(args[0])


@_handles(_T.get_device)
def _get_device(world: World, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> int:
    found = world.device_of(args[0])
    return -1 if found is None or found.index is None else found.index


@_handles(_T.is_pinned)
def _is_pinned(world: World, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> bool:
    return world.is_pinned(args[0])


@_handles(_T.pin_memory)
def _pin_memory(world: World, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> torch.Tensor:
    with world.mute():
        pinned: torch.Tensor = args[0].clone()
    return world.put(pinned, None, pinned=True)


@_handles(_T.data_ptr)
def _data_ptr(world: World, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    if world.on_device(args[0]) and caller_is_user():
        world.report(
            "DATA_PTR",
            Severity.HAZARD,
            "Python reads an address, and the graph keeps the one of the capture",
            "Tensor.data_ptr",
        )
    if world.is_meta:
        return world.entry(args[0]).serial * 4096 + args[0].storage_offset() * args[0].element_size()
    return func(*args, **kwargs)


@_handles(_T.record_stream)
def _record_stream(world: World, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> None:
    return None


# ---------------------------------------------------------------------- moves
def move(
    world: World,
    tensor: torch.Tensor,
    device: torch.device | None,
    op: str,
    *,
    non_blocking: bool = False,
    copy: bool = False,
) -> torch.Tensor:
    """``tensor.to(device)`` with its findings. ``device`` None or "cpu" is the host."""
    target = device if device is not None and device.type == "cuda" else None
    source = world.device_of(tensor)
    if source == target:
        return tensor.clone() if copy else tensor
    report_transfer(world, tensor, None, non_blocking, op, to=target)
    if source is not None and target is not None:
        with world.hush(), world.placed(Placing(target, explicit=True)):
            return tensor.clone()
    with world.mute():
        moved = tensor.clone()
    world.put(moved, target, pinned=target is None and non_blocking and source is not None)
    if world.watching and world.recorder is not None:
        world.recorder.transfer(op, tensor, moved)
    return moved


@_handles(_T.cpu)
def _cpu(world: World, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    return move(world, args[0], None, "Tensor.cpu")


@_handles(_T.cuda)
def _cuda(world: World, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    device = world.normalise(args[1] if len(args) > 1 else kwargs.get("device")) or world.current_device
    non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    return move(world, args[0], device, "Tensor.cuda", non_blocking=non_blocking)


@_handles(_T.to)
def _to(world: World, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    tensor = args[0]
    names_device = kwargs.get("device") is not None
    device = world.normalise(kwargs.get("device"))
    dtype = kwargs.get("dtype")
    flags: list[bool] = []
    for value in [*args[1:], kwargs.get("other")]:
        if isinstance(value, _T):
            device, dtype, names_device = world.device_of(value) or torch.device("cpu"), value.dtype, True
        elif isinstance(value, bool):
            flags.append(value)
        elif isinstance(value, torch.device | str | int):
            device, names_device = world.normalise(value), True
        elif isinstance(value, torch.dtype):
            dtype = value
    if names_device and device is not None and device.type not in ("cpu", "cuda"):
        return NotImplemented
    non_blocking = bool(kwargs.get("non_blocking", flags[0] if flags else False))
    copy = bool(kwargs.get("copy", flags[1] if len(flags) > 1 else False))
    result = move(world, tensor, device, "Tensor.to", non_blocking=non_blocking, copy=copy) if names_device else tensor
    extra = {k: kwargs[k] for k in ("memory_format",) if kwargs.get(k) is not None}
    if (dtype is not None and dtype != result.dtype) or (copy and result is tensor) or extra:
        with world.placed(Placing(world.device_of(result), explicit=False)):
            result = func(result, dtype=dtype or result.dtype, copy=copy and result is tensor, **extra)
    return result


@_handles(_T.type_as)
def _type_as(world: World, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    return _to(world, _T.to, (args[0], args[1]), {})


@_handles(_T.__deepcopy__)
def _deepcopy(world: World, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    tensor, memo = args
    if id(tensor) in memo:
        return memo[id(tensor)]
    device = world.device_of(tensor)
    if world.watching and device is not None and type(tensor) in (torch.Tensor, torch.nn.Parameter):
        copied = tensor.detach().clone()  # an operation of the region, where the real one is a copy on the device
        if isinstance(tensor, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, tensor.requires_grad)
        memo[id(tensor)] = copied
        return copied
    with world.mute():
        copied = func(*args, **kwargs)
    return world.put(copied, device)


@_handles(torch._C._nn._parse_to)
def _parse_to(world: World, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)  # Module.to: its device is for the parameters, which pass through _to


# ---------------------------------------------------------------------- reads by the host
def _host_read(message: str) -> Handler:
    def handler(world: World, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
        if any(isinstance(a, _T) and world.on_device(a) for a in args):
            world.report("D2H_SYNC", Severity.ERROR, message, f"Tensor.{getattr(func, '__name__', '?')}")
        with world.mute():
            return func(*args, **kwargs)

    return handler


_handles(_T.tolist)(_host_read("tolist() copies the tensor to the host"))
_handles(_T.numpy, _T.__array__)(_host_read("numpy cannot read device memory: this raises TypeError"))
_handles(_T.__repr__, _T.__str__, _T.__format__)(_host_read("formatting copies the values to the host"))
_handles(torch.allclose, _T.allclose)(_host_read("the answer is a Python bool"))
_handles(_T.__reduce_ex__)(_host_read("pickling copies the values to the host"))


@_handles(torch.tensor, torch.as_tensor, torch.asarray, _T.new_tensor, torch.from_numpy)
def _from_data(world: World, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    is_new_tensor = func is _T.new_tensor
    placing = _explicit_placing(world, func, kwargs)
    device = placing.device if placing is not None else None
    if is_new_tensor and placing is None:
        device = world.device_of(args[0])
    position = 1 if is_new_tensor else 0
    data = args[position] if len(args) > position else kwargs.get("data", kwargs.get("obj"))
    name = f"torch.{getattr(func, '__name__', 'tensor')}"
    if isinstance(data, _T):
        if placing is None and not is_new_tensor:
            device = world.device_of(data)
        is_copy = func is torch.tensor or is_new_tensor
        moved = move(world, data.detach() if is_copy else data, device, name, copy=is_copy)
        dtype = kwargs.get("dtype")
        result = moved if dtype in (None, moved.dtype) else moved.to(dtype)
        return result.requires_grad_(True) if kwargs.get("requires_grad") else result
    pinned = bool(kwargs.pop("pin_memory", False))
    tensors = [leaf for leaf in leaves_of(data) if isinstance(leaf, _T)]
    if any(map(world.on_device, tensors)):
        world.report("D2H_SYNC", Severity.ERROR, "device tensors in a Python list are read one by one", name)
    with world.mute():
        if tensors and world.is_meta:
            made = torch.stack(tensors) if len(tensors) > 1 else tensors[0].clone()
        else:
            made = func(*args, **kwargs)
    world.put(made, None, pinned=pinned)
    if device is None:
        return made
    report_transfer(world, made, None, False, name, to=device)
    return world.put(made, device)


# ---------------------------------------------------------------------- checks that only the CPU makes
@_handles(torch.nn.functional.one_hot)
def _one_hot(world: World, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    num_classes = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
    if world.on_device(args[0]) and num_classes == -1:
        world.report("D2H_SYNC", Severity.ERROR, "without num_classes the maximum is read by the host", "one_hot")
    with world.hush():
        return _general(world, func, args, kwargs)


@_handles(torch.quantile, torch.nanquantile, _T.quantile, _T.nanquantile)
def _cpu_checks(world: World, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    with world.hush():
        return _general(world, func, args, kwargs)
