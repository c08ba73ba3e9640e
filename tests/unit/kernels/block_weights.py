"""Random block weights of every kind, with scales of the size that real ones have."""

import torch

from ostinato.quant.blocks import KINDS, BlockWeight


def random_weight(name: str, n: int, k: int, device: torch.device) -> BlockWeight:
    """N rows of K columns: random bits for quants, values of about ±0.05."""
    kind = KINDS[name]

    def bits(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)

    def small(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (n, k // kind.group), dtype=torch.int8, device=device)

    words = bits(n, k // (4 if kind.bits == 8 else 8))
    if name == "Q2_K":
        words &= 0x33333333
    if name == "Q3_K":
        words &= 0x77777777
    high = bits(n, k // (32 if kind.bits == 5 else 16)) if kind.bits in (5, 6) else None
    size = 0.05 / 2 ** (kind.bits - 1) / (16 if kind.has_sub else 1)

    def halves() -> torch.Tensor:
        return ((0.5 + torch.rand(n, k // kind.super_group, device=device)) * size).half()

    signed = name in ("Q3_K", "Q6_K")
    return BlockWeight(
        kind,
        (n, k),
        words,
        halves(),
        high,
        halves() if kind.min_sign else None,
        small(-32, 32) if signed else small(0, 64) if kind.has_sub else None,
        small(0, 64) if kind.has_sub and kind.min_sign else None,
    )


def columns(name: str, about: int) -> int:
    """The multiple of the kind's block nearest below ``about``, at least one block."""
    block = KINDS[name].block
    return max(1, about // block) * block


def operands(weight: BlockWeight) -> tuple[torch.Tensor | str | None, ...]:
    """The weight as the launchers of kernels take it."""
    w = weight
    return w.words, w.d, w.high, w.m, w.sub_d, w.sub_m, w.kind.name


def grid_rows(m: int, k: int, device: torch.device, group: int = 32) -> torch.Tensor:
    """Rows that int8 quantization keeps exactly: integers up to ±127, with a 127 in each four, times a power of two.

    The power changes from one ``group`` of columns to the next: no scale may be shared by more columns than that.

    They take rounding of x out of a comparison: what remains is float32 rounding of sums.
    """
    x = torch.randint(-126, 127, (m, k // group, group), device=device).float()
    x[:, :, 1::4] = 127
    return (x * torch.tensor([0.5, 0.25, 2.0], device=device)[torch.arange(k // group) % 3][None, :, None]).flatten(1)
