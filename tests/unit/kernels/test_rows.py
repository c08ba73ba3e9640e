"""rms_norm, its quantizing forms, gated_activation, embed and dense_linear against plain PyTorch."""

import pytest
import torch

from ostinato.errors import KernelError
from ostinato.kernels.dense_linear import dense_linear
from ostinato.kernels.dense_linear.ref import dense_linear_ref
from ostinato.kernels.embed import embed, embed_rounded
from ostinato.kernels.embed.ref import embed_ref, embed_rounded_ref
from ostinato.kernels.gated import gated_activation
from ostinato.kernels.gated.ref import gated_activation_ref
from ostinato.kernels.registry import load
from ostinato.kernels.rms_norm import quantize_rows, rms_norm
from ostinato.kernels.rms_norm.ref import quantize_rows_ref, rms_norm_quantize_ref, rms_norm_ref
from ostinato.quant.blocks import KINDS

from .block_weights import columns, operands, random_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [5, 96, 576])
def test_rms_norm(k, dtype, device):
    x = (torch.randn(3, k + 7, device=device) * 4).to(dtype)[:, 7:]
    weight = torch.randn(k, device=device)
    kernel = load("ostinato.kernels.rms_norm.triton:rms_norm")
    expected = rms_norm_ref(x, weight, 1e-5, torch.float32)
    torch.testing.assert_close(kernel(x, weight, 1e-5, torch.float32), expected, rtol=1e-5, atol=1e-6)
    found = kernel(x, weight, 1e-5, torch.bfloat16)
    torch.testing.assert_close(found, expected.bfloat16(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("normed", [False, True])
def test_quantized_rows_are_within_a_step_of_the_reference(normed, device):
    x = torch.randn(3, 160, device=device) * 2
    x[1, 32:64] = 0
    weight = torch.rand(160, device=device) + 0.5 if normed else None
    kernel = load("ostinato.kernels.rms_norm.triton:rms_norm_quantize")
    found, scales = kernel(x, weight, 1e-5)
    expected, expected_scales = rms_norm_quantize_ref(x, weight, 1e-5) if normed else quantize_rows_ref(x)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= 1  # a value on a tie may round either way
    assert (difference != 0).sum() <= 2
    assert not found[1, 32:64].any()


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_activation(kind, device):
    gate_up = torch.randn(3, 2 * 37, device=device) * 6
    kernel = load("ostinato.kernels.gated.triton:gated_activation")
    found = kernel(gate_up, kind, torch.float32)
    torch.testing.assert_close(found, gated_activation_ref(gate_up, kind, torch.float32), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_embedding_of_blocks_is_exact(kind, device):
    table = random_weight(kind, 11, columns(kind, 96), device)
    tokens = torch.tensor([10, 0, 3, 3], device=device, dtype=torch.int32)
    kernel = load("ostinato.kernels.embed.triton:embed")
    found = kernel(tokens, *operands(table), table.shape[1], torch.float32, 1.0)
    torch.testing.assert_close(found, embed_ref(tokens, table, torch.float32, 1.0), rtol=2**-22, atol=1e-8)


@pytest.mark.parametrize("kind", ["Q8_0", "I6_64", "Q4_K", "Q5_1"])
def test_the_embedding_of_one_token_is_rounded_for_the_first_layer(kind, device):
    k = columns(kind, 320)
    table, norm = random_weight(kind, 5, k, device), torch.randn(k, device=device)
    tokens = torch.tensor([3], dtype=torch.int32, device=device)
    launch = load("ostinato.kernels.embed.triton:embed_rounded")
    found, x, scale, squares = launch(tokens, *operands(table), k, norm)
    expected = embed_rounded_ref(tokens, table, norm)
    torch.testing.assert_close(found, expected[0], rtol=2**-22, atol=1e-8)
    torch.testing.assert_close(scale, expected[2], rtol=1e-5, atol=0)
    torch.testing.assert_close(squares, expected[3], rtol=1e-5, atol=0)
    assert int((x.int() - expected[1].int()).abs().max()) <= 1  # a tie may go another way
    assert float((x != expected[1]).double().mean()) < 0.01
    torch.testing.assert_close(embed_rounded(tokens, table, norm)[0], expected[0], rtol=2**-22, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_of_floats_is_exact(dtype, device):
    table = torch.randn(9, 45, device=device).to(dtype)
    tokens = torch.tensor([8, 0, 5], device=device)
    kernel = load("ostinato.kernels.embed.triton:embed")
    found = kernel(tokens, table, None, None, None, None, None, None, 45, torch.float32, 3.0)
    assert torch.equal(found, embed_ref(tokens, table, torch.float32, 3.0))


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [None, "silu"])
def test_dense_matvec(m, dtype, gated, device):
    x = torch.randn(m, 1100, device=device)
    weight = (torch.randn(6, 1100, device=device) * 0.1).to(dtype)
    norm = torch.rand(1100, device=device)
    bias = torch.randn(6, device=device)
    residual = torch.randn(m, 6, device=device) if gated is None else None
    kernel = load("ostinato.kernels.dense_linear.triton:dense_linear")
    found = kernel(x, weight, norm, 1e-6, bias, residual, gated, torch.float32)
    normed = rms_norm_ref(x, norm, 1e-6, torch.float32)  # the kernel does not round it to the weight's dtype
    expected = dense_linear_ref(normed, weight.float(), bias=bias, residual=residual, gated=gated)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_misfits_are_refused(device):
    x = torch.randn(2, 48, device=device)
    with pytest.raises(KernelError, match="groups of 32"):
        quantize_rows(x)
    with pytest.raises(KernelError, match=r"float32 weight \[48\]"):
        rms_norm(x, torch.ones(47, device=device), 1e-5)
    with pytest.raises(KernelError, match="unknown gated activation"):
        gated_activation(x, "relu")
    with pytest.raises(KernelError, match="int32 or int64"):
        embed(torch.ones(2, device=device), x)
    table, token = random_weight("Q8_0", 5, 64, device), torch.zeros(1, dtype=torch.int32, device=device)
    with pytest.raises(KernelError, match=r"tokens \[1\]"):
        embed_rounded(token.repeat(2), table, torch.ones(64, device=device))
    with pytest.raises(KernelError, match=r"float32 norm \[64\]"):
        embed_rounded(token, table, torch.ones(63, device=device))
    with pytest.raises(KernelError, match="contiguous weight"):
        dense_linear(x, x[:, ::2])


def test_one_row_and_several_rows_have_the_same_norm() -> None:
    weight, x = 1 + 0.3 * torch.randn(96), torch.randn(5, 96)
    together = rms_norm(x, weight, 1e-6, torch.float32)
    for i in range(5):
        alone = rms_norm(x[i : i + 1], weight, 1e-6, torch.float32)
        torch.testing.assert_close(alone[0], together[i], rtol=2e-6, atol=0)
