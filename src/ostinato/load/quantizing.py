"""A Hugging Face checkpoint seen through a quantization scheme: the reader gives block weights, made as they are read.

Only a few rows stand in floating point at a time, however large a tensor is. Checkpoints in fp8 with a scale for each
block of 128×128 (``NAME_scale_inv``) are read through their scales. Experts that the checkpoint holds one by one are
offered as one stack, as transformers has them in memory: ``experts.gate_up_proj`` [E, 2F, H], each expert's gate rows
over its up rows, and ``experts.down_proj`` [E, H, F].
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ostinato.errors import CheckpointError, ModelFileError, UsageError
from ostinato.load.gguf import GGUFFile
from ostinato.load.progress import Progress, SilentProgress
from ostinato.load.safetensors import HFCheckpoint, SafeTensor
from ostinato.load.source import TensorInfo
from ostinato.quant.blocks import BlockKind, BlockWeight, plane_columns
from ostinato.quant.int4 import quantize
from ostinato.quant.plan import Scheme, parse_scheme

SCALE_SUFFIX = "_scale_inv"
_FP8 = torch.float8_e4m3fn
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, _FP8)
_PIECE = 1 << 24  # weights that are read at a time: 64 MB in float32
_EXPERT = re.compile(r"(?P<stack>.*\.experts)\.(?P<number>\d+)\.(?P<part>gate|up|down)_proj\.weight")
_SKIPPED = re.compile(r"(model\.)?(visual|vision_tower|multi_modal_projector)\..*")
_TYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedTensor(TensorInfo):
    """A tensor as it will be. kind: None where it stays floating, or whatever it is, as ``dtype``.

    parts: the checkpoint's tensors whose rows lie under each other in it. source_bytes: of the parts in the file.
    """

    kind: BlockKind | None
    dtype: torch.dtype
    parts: tuple[str, ...]
    source_bytes: int


class QuantizingCheckpoint:
    """``source`` with the tensors and the types that ``scheme`` gives it.

    Raises UsageError where it is packed already, CheckpointError where it is quantized in a way that cannot be read.
    ``progress`` hears of the checkpoint's bytes from the first tensor that is read until ``close``.
    """

    def __init__(self, source: HFCheckpoint, scheme: Scheme, progress: Progress | None = None) -> None:
        if source.packed is not None:
            raise UsageError(
                f"{source.label} is packed already, as {source.packed.get('scheme')}: leave --quant out, or give the "
                "original"
            )
        self.source = source
        self.scheme = scheme
        self.directory: Path = source.directory
        self.config: dict[str, Any] = {k: v for k, v in source.config.items() if k != "quantization_config"}
        self._block = _fp8_block(source)
        self._tensors = MappingProxyType(self._plan())
        self._progress = SilentProgress() if progress is None else progress
        self._done = 0
        self._started = False

    @property
    def label(self) -> str:
        return self.source.label

    @property
    def tensors(self) -> Mapping[str, PlannedTensor]:
        """Every tensor by name, as it will be; stacks of experts in the place of their first one."""
        return self._tensors

    def read(self, name: str, device: torch.device | str = "cpu") -> BlockWeight | torch.Tensor:
        """A tensor quantized on ``device``; one of three dimensions with its matrices under each other.

        Raises CheckpointError where there is no such tensor or it cannot be quantized.
        """
        info = self._find(name)
        if info.kind is None:
            pieces = [piece for _, piece in self.float_pieces(name, device)]
            return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(info.shape)
        rows, columns = info.num_elements // info.shape[-1], info.shape[-1]
        planes = {
            plane: torch.empty(rows, wide, dtype=dtype, device=device)
            for plane, (wide, dtype) in plane_columns(info.kind, columns).items()
        }
        for start, piece in self.packed_pieces(name, device):
            for plane, values in piece.planes().items():
                planes[plane][start : start + len(values)] = values
        return BlockWeight(info.kind, (rows, columns), **planes)

    def packed_pieces(self, name: str, device: torch.device | str) -> Iterator[tuple[int, BlockWeight]]:
        """A tensor that has a kind, some rows at a time, each with its first row's number."""
        info = self._find(name)
        assert info.kind is not None
        for start, rows in self._rows(info, torch.float32, device):
            try:
                yield start, quantize(rows, info.kind)
            except ModelFileError as error:
                raise CheckpointError(f"{self.label}: tensor {name} cannot be quantized: {error}") from error

    def float_pieces(self, name: str, device: torch.device | str) -> Iterator[tuple[int, torch.Tensor]]:
        """The same for a tensor that stays as it is; vectors come as one piece."""
        info = self._find(name)
        assert info.kind is None
        yield from self._rows(info, info.dtype, device)

    def close(self) -> None:
        """End what ``progress`` shows."""
        if self._started:
            self._progress.stop()
            self._started = False

    def _find(self, name: str) -> PlannedTensor:
        info = self._tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.label} has no tensor {name!r}")
        return info

    def _rows(
        self, info: PlannedTensor, dtype: torch.dtype, device: torch.device | str
    ) -> Iterator[tuple[int, torch.Tensor]]:
        at = 0
        for part in info.parts:
            found = self.source.tensors[part]
            assert isinstance(found, SafeTensor)
            if len(found.shape) < 2:
                piece = self.source.read(part, device, dtype)
                assert isinstance(piece, torch.Tensor)
                yield at, piece
                at += len(piece) if piece.dim() else 1
                self._advance(found.num_bytes)
                continue
            rows = found.num_elements // max(found.shape[-1], 1)
            step = max(1, _PIECE // max(found.shape[-1], 1))
            for start in range(0, rows, step):
                stop = min(rows, start + step)
                values = self.source.read_rows(part, start, stop, device)
                self._advance(values.numel() * values.element_size())
                yield at + start, self._dequantized(found, values, start, dtype)
            at += rows

    def skip(self, num_bytes: int) -> None:
        """Count bytes of the checkpoint that need not be read."""
        self._advance(num_bytes)

    def _advance(self, num_bytes: int) -> None:
        if not self._started:
            self._progress.start(f"quantizing to {self.scheme}", sum(t.source_bytes for t in self._tensors.values()))
            self._started = True
        self._done += num_bytes
        self._progress.update(self._done)

    def _dequantized(self, info: SafeTensor, values: torch.Tensor, start: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows from ``start`` on as ``dtype``: fp8 times the scales of its blocks, what is not floating unchanged."""
        if info.dtype != _FP8:
            return values.to(dtype) if values.is_floating_point() else values
        height, width = self._block
        n, k = info.shape[-2:]
        scale = self.source.read(info.name + SCALE_SUFFIX, values.device, torch.float32)
        assert isinstance(scale, torch.Tensor)
        rows = torch.arange(start, start + len(values), device=values.device)
        of_row = rows // n * -(-n // height) + rows % n // height  # matrices of a stack begin with a block of their own
        factors = scale.view(-1, -(-k // width))[of_row].repeat_interleave(width, dim=1)[:, :k]
        return (values.float() * factors).to(dtype)

    # -- what becomes of each tensor ---------------------------------------------------------------------------------

    def _plan(self) -> dict[str, PlannedTensor]:
        stacks = self._stacks()
        planned: dict[str, PlannedTensor] = {}
        skipped = 0
        for name, info in self.source.tensors.items():
            assert isinstance(info, SafeTensor)
            base = name.removesuffix(SCALE_SUFFIX)
            if base != name and base in self.source.tensors:
                continue
            if _SKIPPED.fullmatch(name):
                skipped += 1
                continue
            match = _EXPERT.fullmatch(name)
            if match is None:
                planned[name] = self._planned(name, info.shape, (name,))
                continue
            stack = f"{match['stack']}.{'down' if match['part'] == 'down' else 'gate_up'}_proj"
            if stack not in planned:
                planned[stack] = self._planned(stack, *stacks[stack])
        if skipped:
            _LOG.info("%d tensors of the vision part are left out: only text is read", skipped)
        return planned

    def _planned(self, name: str, shape: tuple[int, ...], parts: tuple[str, ...]) -> PlannedTensor:
        infos = [self.source.tensors[part] for part in parts]
        dtypes = {info.dtype for info in infos if isinstance(info, SafeTensor)}
        if len(dtypes) != 1:
            raise CheckpointError(f"{self.label}: the parts of {name} are of several types")
        dtype = dtypes.pop()
        if dtype == _FP8:
            self._check_scales(parts)
        kind = self.scheme.kind_for(name, shape) if dtype in _FLOATS else None
        source_bytes = sum(info.num_bytes for info in infos)
        if dtype == _FP8:
            dtype = torch.bfloat16
        if kind is None:
            count = sum(info.num_elements for info in infos)
            type_name = _TYPE_NAMES.get(dtype, infos[0].type_name)
            return PlannedTensor(name, shape, type_name, count * dtype.itemsize, None, dtype, parts, source_bytes)
        columns = plane_columns(kind, shape[-1]).values()
        rows = torch.Size(shape[:-1]).numel()
        size = rows * sum(wide * plane.itemsize for wide, plane in columns)
        return PlannedTensor(name, shape, kind.name, size, kind, dtype, parts, source_bytes)

    def _check_scales(self, parts: tuple[str, ...]) -> None:
        height, width = self._block
        for part in parts:
            shape = self.source.tensors[part].shape
            scale = self.source.tensors.get(part + SCALE_SUFFIX)
            expected = (*shape[:-2], -(-shape[-2] // height), -(-shape[-1] // width)) if len(shape) > 1 else None
            if scale is None or scale.shape != expected:
                raise CheckpointError(
                    f"{self.label}: fp8 tensor {part} has no {part}{SCALE_SUFFIX} of shape {list(expected or ())}, a "
                    f"scale for each {height}×{width} weights; only such fp8 checkpoints are read"
                )

    def _stacks(self) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """Stack → its shape and its parts in order. Raises CheckpointError where an expert is missing or unlike."""
        found: dict[str, dict[int, set[str]]] = {}
        for name in self.source.tensors:
            match = _EXPERT.fullmatch(name)
            if match is not None and not _SKIPPED.fullmatch(name):
                found.setdefault(match["stack"], {}).setdefault(int(match["number"]), set()).add(match["part"])
        stacks: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
        for stack, experts in found.items():
            lacking = [
                f"{stack}.{e}.{part}_proj.weight"
                for e in range(max(experts) + 1)
                for part in ("gate", "up", "down")
                if part not in experts.get(e, ())
            ]
            if lacking:
                raise CheckpointError(f"{self.label} lacks {lacking[0]} ({len(lacking)} in all); download it again")
            for joined, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
                names = tuple(f"{stack}.{e}.{part}_proj.weight" for e in range(len(experts)) for part in parts)
                shapes = {self.source.tensors[name].shape for name in names}
                if len(shapes) > 1:
                    raise CheckpointError(f"{self.label}: the experts of {stack} differ in their shapes")
                rows, columns = shapes.pop()
                stacks[f"{stack}.{joined}"] = (len(experts), rows * len(parts), columns), names
        return stacks


def quantizing(
    opened: GGUFFile | HFCheckpoint, quant: str | None, progress: Progress | None = None
) -> GGUFFile | HFCheckpoint | QuantizingCheckpoint:
    """``opened`` as --quant asks for it; None leaves it as it is. Raises UsageError where it cannot be quantized."""
    if quant is None:
        return opened
    scheme = parse_scheme(quant)
    if isinstance(opened, GGUFFile):
        raise UsageError(f"{opened.label} is a GGUF file, quantized already: leave --quant out, or give the original")
    return QuantizingCheckpoint(opened, scheme, progress)


@contextmanager
def reading(opened: object) -> Iterator[None]:
    """While a model is being read: what a quantizing reader shows of its progress ends with it."""
    try:
        yield
    finally:
        if isinstance(opened, QuantizingCheckpoint):
            opened.close()


def _fp8_block(source: HFCheckpoint) -> tuple[int, int]:
    """Rows and columns of a block of fp8 weights. Raises CheckpointError for another quantization than that."""
    found = source.config.get("quantization_config")
    if found is None:
        return 128, 128
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method != "fp8":
        raise CheckpointError(f"{source.label} is quantized with {method!r}, which cannot be read; give the original")
    match found.get("weight_block_size", [128, 128]):
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
        case block:
            raise CheckpointError(f"{source.label}: weight_block_size {block} is not [rows, columns]")
