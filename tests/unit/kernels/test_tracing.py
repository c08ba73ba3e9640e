"""The ops of the linear path are one node each for tracing, with the shapes and dtypes of their references."""

import pytest
import torch

from ostinato.kernels.block_linear import block_linear, int8_linear
from ostinato.kernels.dense_linear import dense_linear
from ostinato.kernels.embed import embed
from ostinato.kernels.gated import gated_activation
from ostinato.kernels.rms_norm import quantize_rows, rms_norm, rms_norm_quantize
from ostinato.quant.blocks import BlockWeight

from .block_weights import random_weight


def shapes(result: torch.Tensor | tuple[torch.Tensor, ...]) -> list[tuple[torch.Size, torch.dtype]]:
    results = (result,) if isinstance(result, torch.Tensor) else result
    return [(r.shape, r.dtype) for r in results]


def weight(kind: str, n: int, k: int, device: str) -> BlockWeight:
    return random_weight(kind, n, k, torch.device("cpu")).to(device)


CALLS = {
    "gated product": lambda d: block_linear(torch.ones(3, 64, device=d), weight("Q5_1", 10, 64, d), gated="silu"),
    "product with residual": lambda d: block_linear(
        torch.ones(3, 64, device=d).bfloat16(), weight("Q4_0", 10, 64, d), residual=torch.ones(3, 10, device=d)
    ),
    "product of int8 rows": lambda d: int8_linear(
        torch.ones(3, 64, dtype=torch.int8, device=d),
        torch.ones(3, 4, device=d),
        weight("Q4_0", 10, 64, d),
        squares=torch.ones(3, 1, 4, device=d),
        out_dtype=torch.bfloat16,
    ),
    "dense product": lambda d: dense_linear(torch.ones(2, 8, device=d), torch.ones(6, 8, device=d).half()),
    "embedding": lambda d: embed(torch.tensor([1, 2], device=d), weight("Q6_K", 4, 256, d)),
    "norm": lambda d: rms_norm(torch.ones(2, 8, device=d), torch.ones(8, device=d), 1e-5, torch.bfloat16),
    "quantized rows": lambda d: quantize_rows(torch.ones(2, 64, device=d)),
    "norm, quantized": lambda d: rms_norm_quantize(torch.ones(2, 64, device=d), torch.ones(64, device=d), 1e-5),
    "gated activation": lambda d: gated_activation(torch.ones(2, 64, device=d), "gelu_tanh"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_results_without_data_look_like_the_references(call):
    assert shapes(call("meta")) == shapes(call("cpu"))
