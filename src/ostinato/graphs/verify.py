"""Replay verification: was what the replay wrote what eager would have written?

One implementation for ``capture``, for the checker's GPU pass and for its replay on the CPU. All of it works on tensors
of any device, and nothing here needs CUDA.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ostinato.graphs.tree import leaves, map_tensors, tensors

POISON_BYTE = 0xFF
"""A NaN in every floating-point format that has one, -1 in signed and the maximum in unsigned integers."""

REORDERED_TERMS = 1024
"""A replay launches the same kernels, so only sums whose order is not fixed (atomics, split-K) may differ. The default
tolerance allows for a sum of this many terms in another order, whose rounding errors walk at random: sqrt(1024) = 32
steps of float32 (in which narrower types are summed), and one step of the output's own type for its last rounding."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far replay and eager may differ: ``|actual - expected| <= atol + rtol * |expected|``, element by element."""

    rtol: float
    atol: float


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """The first output that differs.

    ``kind`` is ``structure``, ``shape``, ``dtype``, ``host_value``, ``not_written`` (the poison is still there),
    ``nan`` (NaN where eager has a number) or ``values``. ``max_abs`` and ``max_rel`` are over the elements that are
    finite on both sides, 0.0 where there are none.
    """

    path: str
    kind: str
    detail: str
    index: tuple[int, ...] | None = None
    num_wrong: int = 0
    num_elements: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0

    def __str__(self) -> str:
        where = self.path if self.index is None else f"{self.path} at {list(self.index)}"
        if self.num_elements == 0:
            return f"{where}: {self.detail}"
        count = f"{self.num_wrong} of {self.num_elements} elements"
        return f"{where}: {self.detail} ({count}, max abs error {self.max_abs:.3g}, max rel error {self.max_rel:.3g})"


def compare_outputs(
    expected: Any, actual: Any, *, rtol: float | None = None, atol: float | None = None, path: str = "output"
) -> Mismatch | None:
    """Compares two trees of tensors leaf by leaf and returns the first difference, or None.

    ``rtol`` / ``atol`` hold for floating-point tensors; without them each tensor gets :func:`default_tolerance`.
    Integers, booleans and host values must be equal. A NaN (or an infinity) equals the same one on the other side.
    """
    return compare_leaves(dict(leaves(expected, path)), dict(leaves(actual, path)), rtol=rtol, atol=atol)


def compare_leaves(
    expected: dict[str, Any], actual: dict[str, Any], *, rtol: float | None = None, atol: float | None = None
) -> Mismatch | None:
    """As :func:`compare_outputs`, for leaves that are already keyed by their path."""
    for where in expected:
        if where not in actual:
            return Mismatch(where, "structure", "eager returned it and the replay did not")
    for where in actual:
        if where not in expected:
            return Mismatch(where, "structure", "the replay returned it and eager did not")
    for where, want in expected.items():
        mismatch = _compare_leaf(where, want, actual[where], rtol, atol)
        if mismatch is not None:
            return mismatch
    return None


def default_tolerance(expected: torch.Tensor) -> Tolerance:
    """What a sum of REORDERED_TERMS terms in another order may change, relative to the largest finite magnitude."""
    if not expected.is_floating_point() and not expected.is_complex():
        return Tolerance(0.0, 0.0)
    own, summed_in = (
        torch.finfo(expected.dtype).eps,
        min(torch.finfo(torch.float32).eps, torch.finfo(expected.dtype).eps),
    )
    relative = REORDERED_TERMS**0.5 * summed_in + own
    magnitudes = _comparable(expected).abs()
    magnitudes = magnitudes[magnitudes.isfinite()]
    largest = float(magnitudes.max()) if magnitudes.numel() else 0.0
    return Tolerance(rtol=relative, atol=relative * largest)


def _compare_leaf(path: str, want: Any, got: Any, rtol: float | None, atol: float | None) -> Mismatch | None:
    if not isinstance(want, torch.Tensor) or not isinstance(got, torch.Tensor):
        if isinstance(want, torch.Tensor) != isinstance(got, torch.Tensor):
            return Mismatch(path, "structure", f"eager gives {type(want).__name__}, the replay {type(got).__name__}")
        if want == got:
            return None
        return Mismatch(path, "host_value", f"eager gives {want!r}, the replay {got!r}: it was frozen at capture")
    if want.shape != got.shape:
        return Mismatch(path, "shape", f"eager gives shape {list(want.shape)}, the replay {list(got.shape)}")
    if want.dtype != got.dtype:
        return Mismatch(path, "dtype", f"eager gives {want.dtype}, the replay {got.dtype}")
    if want.numel() == 0:
        return None
    want, got = want.detach(), got.detach().to(want.device)
    if _has_float_values(want.dtype):
        return _compare_floats(path, want, got, rtol, atol)
    wrong = _bits(want) != _bits(got)
    if not bool(wrong.any()):
        return None
    left = wrong & is_poison(got)
    if bool(left.any()):
        return _mismatch(path, "not_written", want, got, left)
    return _mismatch(path, "values", want, got, wrong)


def _compare_floats(
    path: str, want: torch.Tensor, got: torch.Tensor, rtol: float | None, atol: float | None
) -> Mismatch | None:
    if rtol is None or atol is None:
        default = default_tolerance(want)
        rtol, atol = default.rtol if rtol is None else rtol, default.atol if atol is None else atol
    wide_want, wide_got = _comparable(want), _comparable(got)
    both_finite = wide_want.isfinite() & wide_got.isfinite()
    same_special = (wide_want == wide_got) | (wide_want.isnan() & wide_got.isnan())
    close = (wide_got - wide_want).abs() <= atol + rtol * wide_want.abs()
    wrong = ~torch.where(both_finite, close, same_special)
    if not bool(wrong.any()):
        return None
    left = wrong & (is_poison(got) if not got.is_complex() else torch.zeros_like(wrong))
    if bool(left.any()):
        return _mismatch(path, "not_written", want, got, left)
    new_nan = wrong & wide_got.isnan()
    if bool(new_nan.any()):
        return _mismatch(path, "nan", want, got, new_nan)
    return _mismatch(path, "values", want, got, wrong)


def _mismatch(path: str, kind: str, want: torch.Tensor, got: torch.Tensor, wrong: torch.Tensor) -> Mismatch:
    """Describes the first wrong element; the errors are over all of the tensor."""
    index = tuple(int(i) for i in wrong.nonzero()[0].tolist())
    wide_want, wide_got = _comparable(want), _comparable(got)
    error = (wide_got - wide_want).abs()
    finite = error.isfinite()
    error = error[finite]
    relative = error / wide_want.abs()[finite].clamp_min(torch.finfo(torch.float64).tiny)
    eager_value, replay_value = wide_want[index].item(), wide_got[index].item()
    detail = {
        "not_written": f"eager gives {eager_value:.6g} and the replay wrote nothing there (the poison is still there)",
        "nan": f"eager gives {eager_value:.6g} and the replay NaN",
        "values": f"eager gives {eager_value:.6g} and the replay {replay_value:.6g}",
    }[kind]
    return Mismatch(
        path,
        kind,
        detail,
        index,
        int(wrong.sum()),
        wrong.numel(),
        float(error.max()) if error.numel() else 0.0,
        float(relative.max()) if relative.numel() else 0.0,
    )


def _has_float_values(dtype: torch.dtype) -> bool:
    return (dtype.is_floating_point or dtype.is_complex) and dtype != torch.float4_e2m1fn_x2


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    """The values in double precision; complex numbers stay complex; packed 4-bit pairs are read as their bytes."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    if tensor.dtype == torch.float4_e2m1fn_x2:
        tensor = tensor.view(torch.uint8)
    return tensor.to(torch.float64)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements as signed integers (or bytes), since booleans with poison in them do not compare as values."""
    return tensor.view(_BITS[tensor.element_size()])


def is_poison(tensor: torch.Tensor) -> torch.Tensor:
    """bool, the shape of ``tensor``: elements all of whose bytes are POISON_BYTE. Not for complex numbers."""
    return _bits(tensor) == (POISON_BYTE if tensor.element_size() == 1 else -1)


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    """Fills the elements of ``tensor`` (any dtype, any strides) with 0xFF bytes, in place, and returns it."""
    with torch.no_grad():
        if tensor.is_complex():
            poison_(torch.view_as_real(tensor))
        else:
            _bits(tensor.detach()).fill_(POISON_BYTE if tensor.element_size() == 1 else -1)
    return tensor


class StateSnapshot:
    """A copy of the bytes that some tensors show, which can be written back to the same addresses.

    A tensor that is a view saves what the view covers and no more, so a slice of a large cache costs a slice. The
    tensors are kept alive. Copies live on the tensors' own device.
    """

    def __init__(self, tree: Any, name: str = "state") -> None:
        unique: dict[tuple[Any, ...], tuple[str, torch.Tensor]] = {}
        for path, tensor in tensors(tree, name):
            view = tensor.detach()
            key = (view.device, view.data_ptr(), view.dtype, tuple(view.shape), view.stride())
            unique.setdefault(key, (path, view))
        self._saved = [(path, view, view.clone()) for path, view in unique.values()]

    @property
    def num_bytes(self) -> int:
        """Bytes that the copies take."""
        return sum(copy.numel() * copy.element_size() for _, _, copy in self._saved)

    def restore(self) -> None:
        """Writes the saved bytes back, on the current stream of each tensor's device."""
        with torch.no_grad():
            for _, view, copy in self._saved:
                view.copy_(copy)

    def saved(self) -> dict[str, torch.Tensor]:
        """The copies by path, for a comparison: ``compare_outputs(a.saved(), b.saved())``."""
        return {path: copy for path, _, copy in self._saved}

    def changed(self) -> list[str]:
        """Paths of the tensors whose bytes are no longer what was saved."""
        return [path for path, view, copy in self._saved if not _same_bytes(view, copy)]


def _same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.is_complex():
        left, right = torch.view_as_real(left), torch.view_as_real(right)
    return bool((_bits(left) == _bits(right)).all())


def fresh_like(tree: Any, *, seed: int) -> Any:
    """A tree of new tensors like ``tree``: other values that are as valid as the examples, drawn from ``seed``.

    Floats: normal with the example's mean and deviation (not negative where no example is); a constant is scaled by
    0.5…1.5, all zeros become a standard normal. Integers and booleans: the example's elements in another order, so
    indices stay in range and a set stays a set. Host values are kept: they are frozen in a graph.
    """
    generator = torch.Generator().manual_seed(seed)
    return map_tensors(lambda tensor: _fresh_tensor(tensor, generator), tree)


def _fresh_tensor(example: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    host = example.detach().cpu()
    if host.numel() == 0:
        return example.detach().clone()
    if _has_float_values(host.dtype):
        drawn = _fresh_floats(host, generator)
    else:
        order = torch.randperm(host.numel(), generator=generator)
        drawn = _bits(host).reshape(-1)[order].reshape(host.shape).view(host.dtype)
    # empty_like keeps the example's strides (where they do not overlap): a kernel sees the layout it will replay on.
    return torch.empty_like(example, requires_grad=False).copy_(drawn)


def _fresh_floats(host: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if host.is_complex():
        parts = torch.view_as_real(host)
        return torch.view_as_complex(_fresh_floats(parts, generator).contiguous())
    values = host.to(torch.float64)
    finite = values[values.isfinite()]
    noise = torch.randn(host.shape, generator=generator, dtype=torch.float64)
    if finite.numel() == 0 or bool((finite == 0).all()):
        drawn = noise
    elif bool((finite == finite[0]).all()):
        drawn = finite[0] * (0.5 + torch.rand(host.shape, generator=generator, dtype=torch.float64))
    else:
        drawn = finite.mean() + finite.std() * noise
        if bool((finite >= 0).all()):
            drawn = drawn.abs()
    # A mask of -inf is a pattern, not a number: it stays where it is.
    return torch.where(values.isfinite(), drawn, values).to(host.dtype)
