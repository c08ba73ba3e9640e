"""A checkpoint of random weights in a well-known model's full-size shape: no download, made where it is used."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ostinato.errors import ModelNotFoundError
from ostinato.load.source import TensorInfo
from ostinato.models.interface import Checkpoint
from ostinato.models.presets import PRESETS
from ostinato.models.registry import family_of
from ostinato.quant.blocks import KINDS, BlockKind, BlockWeight
from ostinato.quant.plan import Scheme

_STD = 0.02  # of the weights, as models are initialized
_ROUTER_SPREAD = 1.5  # deviation of router logits: tokens choose different experts, none of them certainly
_HEADS = ("model.embed_tokens.weight", "lm_head.weight")


class RandomCheckpoint:
    """Tensors by Hugging Face names: matrices block-quantized but for those that ``ostinato convert`` keeps as well.

    Norms pass what they get, routers spread over the experts, gates of a delta rule decay as in fresh models. One
    ``seed`` always makes the same. num_layers: the model's first layers alone; None for all.
    """

    def __init__(self, name: str, seed: int = 0, num_layers: int | None = None) -> None:
        if name not in PRESETS:
            raise ModelNotFoundError(f"--random {name} is not known; known are {', '.join(sorted(PRESETS))}")
        self.preset = PRESETS[name]
        self.config: Mapping[str, Any] = self.preset.config
        if num_layers is not None:
            self.config = {**self.config, "num_hidden_layers": num_layers}
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
        generator = torch.Generator(device).manual_seed(self.seed + list(self._tensors).index(name))
        if info.type_name in KINDS:
            rows, columns = math.prod(info.shape[:-1]), info.shape[-1]
            return random_block_weight(KINDS[info.type_name], (rows, columns), device, generator)
        return self._floats(name, info.shape, device, generator).to(_DTYPES[info.type_name])

    def _floats(
        self, name: str, shape: tuple[int, ...], device: torch.device | str, generator: torch.Generator
    ) -> torch.Tensor:
        def normal(deviation: float) -> torch.Tensor:
            return deviation * torch.randn(shape, device=device, generator=generator)

        def uniform(low: float, high: float) -> torch.Tensor:
            return low + (high - low) * torch.rand(shape, device=device, generator=generator)

        if name.endswith(".bias"):
            return torch.zeros(shape, device=device)
        if name.endswith("norm.weight"):
            one = not self.preset.zero_centred or name.endswith("linear_attn.norm.weight")
            return torch.full(shape, float(one), device=device)
        if name.endswith("A_log"):
            return uniform(1.0, 16.0).log()
        if name.endswith("dt_bias"):
            return uniform(math.log(0.001), math.log(0.1)).exp().expm1().log()  # softplus of it: the step sizes
        if name.endswith("conv1d.weight"):
            return normal(shape[-1] ** -0.5)
        if name.endswith("mlp.gate.weight"):
            return normal(_ROUTER_SPREAD * shape[-1] ** -0.5)
        return normal(_STD)

    def _info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        count = math.prod(shape)
        if len(shape) < 2 or name.endswith("conv1d.weight"):
            return TensorInfo(name, shape, "F32", 4 * count)
        if Scheme().kind_for(name, shape) is None:
            return TensorInfo(name, shape, "BF16", 2 * count)
        kind = self.preset.head if name in _HEADS else self.preset.quant
        return TensorInfo(name, shape, kind, count * KINDS[kind].bits // 8)


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


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
