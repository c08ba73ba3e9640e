"""Linear layers: what joins, and that joining, norms, gates and residuals change no result."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from ostinato.kernels.rms_norm.ref import quantize_rows_ref
from ostinato.layers.linear import Linear, Norm, RoundedRow, Target, linear
from ostinato.quant.blocks import BlockWeight, dequantize
from ostinato.quant.gguf import GGUF_TYPES, pack
from ostinato.quant.gguf_encode import encode

CPU = torch.device("cpu")
EXACT, FAST = Target(CPU, torch.float32), Target(CPU, torch.bfloat16)
K = 64


def matrix(kind: str, n: int, seed: int) -> BlockWeight | torch.Tensor:
    values = torch.randn(n, K, generator=torch.Generator().manual_seed(seed)) * K**-0.5
    return pack(encode(values, GGUF_TYPES[kind]), GGUF_TYPES[kind], K)


def dense(weight: BlockWeight | torch.Tensor) -> torch.Tensor:
    return dequantize(weight) if isinstance(weight, BlockWeight) else weight.float()


def rows(m: int, seed: int = 9) -> torch.Tensor:
    return torch.randn(m, K, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("kinds", "parts"),
    [
        (("Q4_0", "Q4_0", "Q4_0"), [96]),
        (("Q4_0", "Q4_1", "Q4_1"), [48, 48]),
        (("Q4_0", "Q8_0", "Q4_0"), [48, 16, 32]),
        (("F32", "F32", "F16"), [64, 32]),
        (("BF16", "Q8_0", "Q8_0"), [48, 48]),
    ],
)
def test_only_neighbours_of_one_type_join(kinds: Sequence[str], parts: list[int]) -> None:
    weights = [matrix(kind, n, i) for i, (kind, n) in enumerate(zip(kinds, (48, 16, 32), strict=True))]
    for target in (EXACT, FAST):
        joined = Linear.join(weights, target)
        assert [part.shape[0] for part in joined.parts] == parts
    assert torch.equal(torch.cat([p for p in Linear.join(weights, EXACT).parts if isinstance(p, torch.Tensor)]),
                       torch.cat([dense(w) for w in weights]))  # fmt: skip


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("target", [EXACT, FAST], ids=["exact", "fast"])
@pytest.mark.parametrize("kinds", [("Q4_0",) * 3, ("Q8_0",) * 3, ("Q4_1", "Q8_0", "Q8_0"), ("BF16",) * 3], ids=str)
def test_joining_changes_no_result(kinds: Sequence[str], target: Target, m: int) -> None:
    """Every row is a sum of its own: equal bit for bit in the integer kernels, to rounding in PyTorch's float one,
    which splits a matrix among threads and tiles by its size."""
    weights = [matrix(kind, n, i) for i, (kind, n) in enumerate(zip(kinds, (48, 16, 32), strict=True))]
    x = rows(m)
    if not target.exact:
        x = x.bfloat16()
    apart = torch.cat([Linear.join([weight], target)(x) for weight in weights], dim=-1)
    together = Linear.join(weights, target)(x)
    if target.exact or kinds[0] == "BF16":
        torch.testing.assert_close(together, apart, rtol=2.0**-8 if x.dtype == torch.bfloat16 else 0, atol=K * 2.0**-23)
    else:
        assert torch.equal(together, apart)


@pytest.mark.parametrize("kinds", [("Q4_0", "Q4_0"), ("Q4_0", "Q4_1"), ("F32", "F32"), ("Q8_0", "F16")], ids=str)
@pytest.mark.parametrize("options", ["plain", "norm", "bias", "gated", "residual", "everything"])
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("target", [EXACT, FAST], ids=["exact", "fast"])
def test_options(kinds: Sequence[str], options: str, m: int, target: Target) -> None:
    """Joined or apart, packed or dense: the formula of ``linear`` in float64 on the dequantized matrices."""
    weights = [matrix(kind, 32, i) for i, kind in enumerate(kinds)]
    generator = torch.Generator().manual_seed(4)
    norm = Norm(1 + 0.3 * torch.randn(K, generator=generator), 1e-5) if options in ("norm", "everything") else None
    bias = torch.randn(64, generator=generator) if options in ("bias", "everything") else None
    residual = torch.randn(m, 64, generator=generator) if options == "residual" else None
    gated = "silu" if options in ("gated", "everything") else None
    x = rows(m)
    if norm is None and not target.exact:
        x = x.bfloat16()
    actual = Linear.join(weights, target, bias)(
        x, norm=norm, residual=residual, gated=gated, out_dtype=torch.float32 if residual is None else None
    )

    wide = x.double()
    if norm is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.double()
    y = wide @ torch.cat([dense(w) for w in weights]).double().T
    if bias is not None:
        y = y + bias.double()
    if gated is not None:
        gate, up = y.chunk(2, -1)
        y = torch.nn.functional.silu(gate) * up
    if residual is not None:
        y = y + residual.double()
    assert actual.dtype == torch.float32
    assert actual.shape == y.shape
    # Exact: K roundings of 2^-24 twice. Fast: input, weights (two roundings: scale and zero of up to 15 steps), result
    # and gate are each rounded to 2^-9 of sums whose absolute size is that of about sqrt(K) = 8 times their value.
    atol = 2 * K * 2.0**-24 * float(y.abs().max()) if target.exact else 8 * 2.0**-8 * float(y.abs().max())
    torch.testing.assert_close(actual.double(), y, rtol=0, atol=atol)


def test_bytes_are_those_that_a_product_reads() -> None:
    weights = [matrix("Q4_0", 32, 0), matrix("Q8_0", 16, 1)]
    assert Linear.join(weights, EXACT).num_bytes == 4 * 48 * K
    assert Linear.join(weights, FAST).num_bytes == 32 * K // 2 + 4 * 32 * K // 32 + 16 * K + 2 * 16


def test_a_float_matrix_goes_where_the_target_says() -> None:
    weight = torch.randn(16, K, dtype=torch.float16)
    assert EXACT.place(weight).dtype == torch.float32  # type: ignore[union-attr]  # a tensor stays a tensor
    placed = FAST.place(weight.T.contiguous().T)
    assert isinstance(placed, torch.Tensor)
    assert placed.dtype == torch.bfloat16
    assert placed.is_contiguous()
    x = rows(2)
    assert linear(x, placed).dtype == torch.float32


def test_small_matrices_lose_nothing_and_share_a_dtype() -> None:
    rounded, full = rows(3).bfloat16(), rows(4)
    for given, dtype in (((rounded, rounded.float()), torch.bfloat16), ((rounded, full), torch.float32)):
        placed = FAST.place_plain(*given)
        assert [t.dtype for t in placed] == [dtype] * 2
        assert all(torch.equal(t.float(), g.float()) for t, g in zip(placed, given, strict=True))
    assert EXACT.place_plain(rounded)[0].dtype == torch.float32


@pytest.mark.parametrize("group", [16, 32])
def test_rows_that_are_rounded_already(group: int) -> None:
    """Beside the product with the same values in float32: K roundings of 2^-24 on both sides."""
    weight = matrix("Q4_1", 48, 0)
    assert isinstance(weight, BlockWeight)
    product = Linear((weight,))
    x, scale = quantize_rows_ref(rows(1), group)
    residual = torch.randn(1, 48)
    squares = torch.full((1, 1, 4), K / 16.0)  # a mean square of 1/4
    found = product.of_rounded(RoundedRow(x, scale, squares, 0.0), residual=residual)
    wide = 2 * x.float() * scale.repeat_interleave(group, dim=1)
    expected = linear(wide, dequantize(weight), residual=residual)
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * K * 2.0**-24 * float(expected.abs().max()))
    assert product.of_rounded(RoundedRow(x, scale, None, 0.0), out_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_only_a_lone_matrix_of_blocks_is_handed_out() -> None:
    lone = matrix("Q4_0", 16, 0)
    assert Linear((lone,)).block_weight is lone
    assert Linear((lone,), torch.zeros(16)).block_weight is None
    assert Linear((lone, matrix("Q8_0", 16, 1))).block_weight is None
    assert Linear((torch.zeros(16, K),)).block_weight is None
