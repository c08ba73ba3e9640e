"""The inputs of a captured callable, at the addresses that the graph reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ostinato.errors import CaptureError, StaleInputError
from ostinato.graphs.static import StaticBuffers, TensorSignature
from ostinato.graphs.tree import leaves, map_tensors, tensors


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One captured input tensor. ``is_in_place``: it belongs to the caller's StaticBuffers."""

    path: str
    buffer: torch.Tensor
    signature: TensorSignature
    is_in_place: bool


class StaticInputs:
    """A tree like the example's whose tensors stay where they are: copies of the examples, except for the tensors of a
    :class:`StaticBuffers`, which are read in place.

    ``device`` is where all of them must be; without it, where the first tensor is.
    """

    def __init__(self, example: Any, device: torch.device | None = None) -> None:
        for path, tensor in tensors(example, "input"):
            device = tensor.device if device is None else device
            if tensor.device != device:
                raise CaptureError(f"{path} is on {tensor.device} and the capture on {device}: move it there first")
        if device is None:
            raise CaptureError("the example inputs hold no tensor: name the device")
        for buffers in _static_buffers(example):
            buffers.check()
        self.device: torch.device = device
        self.tree = map_tensors(lambda tensor: tensor.detach().clone(), example, keep=StaticBuffers)
        in_place = {id(t) for buffers in _static_buffers(example) for t in buffers.tensors().values()}
        self._leaves = [
            _Leaf(path, buffer, TensorSignature.of(buffer), id(buffer) in in_place)
            for path, buffer in tensors(self.tree, "input")
        ]
        self._host_values = {
            path: leaf for path, leaf in leaves(self.tree, "input") if not isinstance(leaf, torch.Tensor)
        }

    def call(self, function: Any) -> Any:
        """Calls ``function`` on the static inputs: a tuple by position, a dict by keyword, all else as one argument."""
        if type(self.tree) is tuple:
            return function(*self.tree)
        if type(self.tree) is dict:
            return function(**self.tree)
        return function(self.tree)

    def tree_of_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments of such a call as one tree."""
        if type(self.tree) is dict:
            if args:
                raise StaleInputError(f"the captured inputs have names: give {sorted(self.tree)} as keywords")
            return kwargs
        if kwargs:
            raise StaleInputError("the captured inputs have no names: give them in order, without keywords")
        if type(self.tree) is not tuple and len(args) != 1:
            raise StaleInputError(f"the graph takes one input, not {len(args)}")
        return args if type(self.tree) is tuple else args[0]

    def storages(self) -> frozenset[int]:
        """``_cdata`` of every input's storage."""
        return frozenset(leaf.buffer.untyped_storage()._cdata for leaf in self._leaves)

    def check(self) -> None:
        """Raises StaleInputError when a buffer that is read in place was rebound."""
        for buffers in _static_buffers(self.tree):
            buffers.check()

    def load(self, tree: Any) -> None:
        """Brings new inputs to where the graph reads: copies, on the device's current stream.

        Shapes, dtypes, devices and host values must be the captured ones, and StaticBuffers the captured buffers.
        Raises StaleInputError before anything is copied.
        """
        for leaf, value in self._matched(tree):
            difference = (
                leaf.signature.difference(TensorSignature.of(value))
                if leaf.is_in_place
                else leaf.signature.layout_difference(TensorSignature.of(value))
            )
            if difference is not None:
                raise StaleInputError(f"{leaf.path} has {difference}: the replay would not read it")
        self.check()
        self._copy(tree)

    def overwrite(self, tree: Any) -> None:
        """Copies new values into every buffer, those of the caller's StaticBuffers too."""
        for leaf, value in self._matched(tree):
            # Fresh values may come from the host: the copy below brings them over.
            signature = dataclasses.replace(TensorSignature.of(value), device=leaf.signature.device)
            if (difference := leaf.signature.layout_difference(signature)) is not None:
                raise StaleInputError(f"fresh {leaf.path} has {difference}")
        self._copy(tree)

    def _matched(self, tree: Any) -> list[tuple[_Leaf, torch.Tensor]]:
        given = dict(leaves(tree, "input"))
        for path, frozen in self._host_values.items():
            if path not in given:
                raise StaleInputError(f"{path} is missing: it was {frozen!r} at capture")
            if given[path] != frozen:
                raise StaleInputError(
                    f"{path} is {given[path]!r} and was frozen at capture as {frozen!r}: use a tensor"
                )
        matched = []
        for leaf in self._leaves:
            value = given.get(leaf.path)
            if not isinstance(value, torch.Tensor):
                raise StaleInputError(f"{leaf.path} is {value!r} where the graph reads a tensor")
            matched.append((leaf, value))
        if extra := given.keys() - self._host_values.keys() - {leaf.path for leaf in self._leaves}:
            raise StaleInputError(f"{min(extra)} was not there at capture: the graph would not read it")
        return matched

    def _copy(self, tree: Any) -> None:
        with torch.no_grad():
            for leaf, value in self._matched(tree):
                if value.data_ptr() != leaf.signature.address:
                    leaf.buffer.copy_(value, non_blocking=True)


def _static_buffers(tree: Any) -> list[StaticBuffers]:
    """Every StaticBuffers in a tree; they are leaves of ``map_tensors`` by ``keep`` and dataclasses to ``leaves``."""
    if isinstance(tree, StaticBuffers):
        return [tree]
    if isinstance(tree, list | tuple):
        return [found for item in tree for found in _static_buffers(item)]
    if isinstance(tree, dict):
        return [found for item in tree.values() for found in _static_buffers(item)]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [found for f in dataclasses.fields(tree) for found in _static_buffers(getattr(tree, f.name))]
    return []
