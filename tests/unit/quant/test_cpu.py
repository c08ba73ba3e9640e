"""Products with weights packed for PyTorch's own CPU kernels, against the matrix that the file's bytes mean."""

from __future__ import annotations

import pytest
import torch

from ostinato.quant.blocks import KINDS, BlockWeight, dequantize, scales
from ostinato.quant.cpu import CpuInt4Weight, CpuInt8Weight, pack_for_cpu
from ostinato.quant.gguf import GGUF_TYPES, pack
from ostinato.quant.gguf_encode import encode

INT4 = ("Q4_0", "Q4_1", "Q4_K", "I4_32", "I4_64", "I4_128")
INT8 = ("Q8_0", "I8_64")
BF16 = 2.0**-8  # one unit in the last place, relative: a rounding is off by at most half of it


def random_weight(name: str, n: int, k: int, seed: int = 0) -> BlockWeight:
    """Random quants with scales of about one size."""
    generator = torch.Generator().manual_seed(seed)
    if name in ("Q4_0", "Q4_1", "Q8_0"):
        weight = pack(encode(torch.randn(n, k, generator=generator), GGUF_TYPES[name]), GGUF_TYPES[name], k)
        assert isinstance(weight, BlockWeight)
        return weight
    kind = KINDS[name]

    def bits(columns: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, (n, columns), generator=generator, dtype=torch.int32)

    def halves() -> torch.Tensor:
        return (0.002 + 0.01 * torch.rand(n, k // kind.super_group, generator=generator)).half()

    def subs() -> torch.Tensor:
        return torch.randint(1, 64, (n, k // kind.group), generator=generator).to(torch.int8)

    words = bits(k // (4 if kind.bits == 8 else 8))
    if name == "Q2_K":
        words &= 0x33333333
    elif name == "Q3_K":
        words &= 0x77777777
    return BlockWeight(
        kind,
        (n, k),
        words,
        halves(),
        high={5: bits(k // 32), 6: bits(k // 16)}.get(kind.bits),
        m=halves() if kind.min_sign else None,
        sub_d=subs() if kind.has_sub else None,
        sub_m=subs() if kind.has_sub and kind.min_sign else None,
    )


def rows(m: int, k: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).bfloat16()


def weight_error(weight: BlockWeight, packed: CpuInt4Weight | CpuInt8Weight | torch.Tensor) -> torch.Tensor:
    """How far each packed weight may be from the file's, [n, k] float64; see ``ostinato.quant.cpu``."""
    exact = dequantize(weight).double().abs()
    if isinstance(packed, torch.Tensor):
        return exact * BF16 / 2
    if isinstance(packed, CpuInt8Weight):
        # Half a step of the row, whose scale is itself rounded (127 steps of it may be off by half a unit).
        return exact.amax(1, keepdim=True).expand_as(exact) * (0.5 / 127 + BF16 / 2 * 1.01)
    scale, minimum = (None if t is None else t.double() for t in scales(weight))
    assert scale is not None
    zero = (8 - weight.kind.offset) * scale + (0 if minimum is None else minimum)
    # (q - 8) * scale + zero with both rounded, |q - 8| at most 8.
    return ((8 * scale.abs() + zero.abs()) * BF16 / 2).repeat_interleave(weight.kind.group, 1)


@pytest.mark.parametrize("m", [1, 2, 5, 33])
@pytest.mark.parametrize(("n", "k"), [(16, 256), (80, 512), (1024, 256)])
@pytest.mark.parametrize("name", sorted(KINDS))
def test_products(name: str, n: int, k: int, m: int) -> None:
    """Within the packed weights' rounding, float32 sums of k products, and the result's rounding to bfloat16."""
    weight, x = random_weight(name, n, k), rows(m, k)
    packed = pack_for_cpu(weight)
    if isinstance(packed, torch.Tensor):
        assert packed.dtype == torch.bfloat16
        actual = torch.nn.functional.linear(x, packed)
    else:
        actual = packed.product(x)
    assert actual.dtype == torch.bfloat16
    exact = x.double() @ dequantize(weight).double().T
    size = x.double().abs() @ dequantize(weight).double().abs().T
    # The int4 kernel rounds each dequantized weight to bfloat16 as well.
    twice = 1 + (isinstance(packed, CpuInt4Weight))
    allowed = x.double().abs() @ weight_error(weight, packed).T * twice + size * k * 2.0**-24
    allowed += (exact.abs() + allowed) * BF16 / 2
    assert bool(((actual.double() - exact).abs() <= allowed).all())
    # Results in another order of rows are beyond the bound: it is one that wrong quants or scales would break.
    assert bool(((actual.double().roll(1, 1) - exact).abs() > allowed).any())


@pytest.mark.parametrize("name", sorted(KINDS))
def test_what_each_kind_becomes(name: str) -> None:
    packed = pack_for_cpu(random_weight(name, 32, 256))
    expected = CpuInt4Weight if name in INT4 else CpuInt8Weight if name in INT8 else torch.Tensor
    assert isinstance(packed, expected)
    assert tuple(packed.shape) == (32, 256)
    if not isinstance(packed, torch.Tensor):
        assert (
            packed.num_bytes
            == {CpuInt4Weight: 32 * 256 // 2 + 4 * 32 * 256 // KINDS[name].group, CpuInt8Weight: 32 * 258}[type(packed)]
        )


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q4_K", "Q8_0", "Q6_K", "I4_64", "I8_64"])
@pytest.mark.parametrize("n", [1, 7, 17, 33])
def test_rows_that_do_not_pack(name: str, n: int) -> None:
    """PyTorch's int4 kernel takes multiples of 16 rows; others stay dense, and are as right."""
    weight, x = random_weight(name, n, 256), rows(3, 256)
    packed = pack_for_cpu(weight)
    assert isinstance(packed, CpuInt8Weight if name in INT8 else torch.Tensor)
    actual = torch.nn.functional.linear(x, packed) if isinstance(packed, torch.Tensor) else packed.product(x)
    exact = x.double() @ dequantize(weight).double().T
    allowed = x.double().abs() @ weight_error(weight, packed).T
    size = x.double().abs() @ dequantize(weight).double().abs().T
    allowed += size * 256 * 2.0**-24 + (exact.abs() + allowed) * BF16 / 2
    assert bool(((actual.double() - exact).abs() <= allowed).all())


def test_int8_rows_are_rounded_row_by_row_in_any_portion() -> None:
    """A matrix of more rows than are packed at once, with rows of zeros and of very different sizes."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4100, 32, generator=generator) * torch.logspace(-4, 3, 4100)[:, None]
    x[5] = 0
    x[4099] = 0
    weight = pack(encode(x, GGUF_TYPES["Q8_0"]), GGUF_TYPES["Q8_0"], 32)
    assert isinstance(weight, BlockWeight)
    packed = pack_for_cpu(weight)
    assert isinstance(packed, CpuInt8Weight)
    exact = dequantize(weight)
    got = packed.q.float() * packed.scale.float()[:, None]
    assert bool(((got - exact).abs().double() <= weight_error(weight, packed) + 1e-12).all())
    assert not got[5].any()
    assert not got[4099].any()


def test_int4_weights_whose_roundings_are_exact_are_exact() -> None:
    """With scales that bfloat16 holds, packing loses nothing: unit rows read back every weight."""
    generator = torch.Generator().manual_seed(3)
    kind = KINDS["Q4_0"]
    weight = BlockWeight(
        kind,
        (16, 64),
        torch.randint(-(2**31), 2**31 - 1, (16, 8), generator=generator, dtype=torch.int32),
        2.0 ** torch.randint(-3, 4, (16, 2), generator=generator).half(),
    )
    packed = pack_for_cpu(weight)
    assert isinstance(packed, CpuInt4Weight)
    assert torch.equal(packed.product(torch.eye(64).bfloat16()).float(), dequantize(weight).T)
