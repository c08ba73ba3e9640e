"""A checkpoint of random weights in a well-known model's full-size shape: no download, made where it is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ostinato.errors import ModelNotFoundError
from ostinato.load.source import TensorInfo
from ostinato.models.interface import Checkpoint
from ostinato.models.presets import PRESETS
from ostinato.models.registry import family_of
from ostinato.quant.blocks import KINDS, BlockKind, BlockWeight

_STD = 0.02  # of the weights, as models are initialized
_HEADS = ("model.embed_tokens.weight", "lm_head.weight")


class RandomCheckpoint:
    """Tensors by Hugging Face names: matrices block-quantized, vectors ones. One ``seed`` always makes the same."""

    def __init__(self, name: str, seed: int = 0) -> None:
        if name not in PRESETS:
            raise ModelNotFoundError(f"--random {name} is not known; known are {', '.join(sorted(PRESETS))}")
        self.preset = PRESETS[name]
        self.config: Mapping[str, Any] = self.preset.config
        self.seed = seed
        shapes = family_of(Checkpoint("hf", self.config, _Names())).weight_shapes()
        self._tensors = {key: self._info(key, shape) for key, shape in shapes.items()}

    @property
    def label(self) -> str:
        return f"random {self.preset.name}"

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, device: torch.device | str = "cpu") -> BlockWeight | torch.Tensor:
        """The tensor ``name``, made on ``device``."""
        info = self._tensors[name]
        if info.type_name == "F32":
            # Norms keep what passes; a bias of ones would only shift.
            return torch.full(info.shape, 0.0 if name.endswith(".bias") else 1.0, device=device)
        generator = torch.Generator(device).manual_seed(self.seed + list(self._tensors).index(name))
        return random_block_weight(KINDS[info.type_name], (info.shape[0], info.shape[1]), device, generator)

    def _info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        count = 1
        for size in shape:
            count *= size
        if len(shape) < 2:
            return TensorInfo(name, shape, "F32", 4 * count)
        kind = self.preset.head if name in _HEADS else self.preset.quant
        return TensorInfo(name, shape, kind, count * KINDS[kind].bits // 8)


def random_block_weight(
    kind: BlockKind, shape: tuple[int, int], device: torch.device | str, generator: torch.Generator
) -> BlockWeight:
    """Random quants, with scales such that the weights have a mean near 0 and a deviation near 0.02."""
    n, k = shape

    def integers(low: int, high: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, (n, columns), dtype=dtype, device=device, generator=generator)

    per_word = 4 if kind.bits == 8 else 8
    words = integers(-(2**31), 2**31 - 1, k // per_word, torch.int32)
    high = None
    if kind.bits in (5, 6):
        high = integers(-(2**31), 2**31 - 1, k // (32 if kind.bits == 5 else 16), torch.int32)
    spread = 2**kind.bits / 12**0.5  # deviation of a uniform quant
    sub_d = integers(16, 33, k // kind.group, torch.int8) if kind.has_sub else None
    d = torch.full((n, k // kind.super_group), _STD / spread / (24 if kind.has_sub else 1), device=device)
    d = (d * (0.75 + 0.5 * torch.rand(d.shape, device=device, generator=generator))).half()
    m = sub_m = None
    if kind.min_sign:
        # The minimum that centres the quants: half of their range, with the scale's own sub-scale.
        m = (d.float() * (2**kind.bits - 1) / 2 * -kind.min_sign).half()
        sub_m = sub_d.clone() if sub_d is not None else None
    return BlockWeight(kind, shape, words, d, high, m, sub_d, sub_m)


class _Names:
    """Stands for a source where only names are asked for: the shapes of a preset depend on its config alone."""

    def __contains__(self, name: str) -> bool:
        return False

    def require(self, names: Iterable[str]) -> None:
        raise AssertionError("a preset's shapes are asked for, not its weights")

    def ignore(self, *patterns: str) -> int:
        raise AssertionError("a preset's shapes are asked for, not its weights")

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> BlockWeight | torch.Tensor:
        raise AssertionError("a preset's shapes are asked for, not its weights")
