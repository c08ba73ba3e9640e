"""The quantizers write the bytes that the gguf package writes."""

import gguf
import numpy as np
import pytest
import torch

from ostinato.errors import KernelError
from ostinato.quant.blocks import dequantize
from ostinato.quant.gguf import GGUF_TYPES, pack
from ostinato.quant.gguf_encode import ENCODABLE, encode


@pytest.mark.parametrize("name", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1"])
def test_bytes_equal_those_of_the_gguf_package(name):
    x = torch.randn(11, 160, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 11)[:, None]
    x[3, 32:64] = 0  # a block without a scale
    x[4, :32] = 0.75  # a block of one value
    want = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(encode(x, GGUF_TYPES[name]).numpy(), want.view(np.uint8).reshape(11, -1))


def test_bfloat16_is_rounded_to_nearest():
    x = torch.randn(3, 7)
    assert torch.equal(encode(x, GGUF_TYPES["BF16"]).view(torch.bfloat16), x.bfloat16())


@pytest.mark.parametrize(("name", "steps"), [("Q8_0", 127), ("Q4_0", 8), ("Q4_1", 7.5)])
def test_what_is_written_comes_back(name, steps):
    """Within half a step, or one at the end of Q4_0's range that has no +8; plus the float16 scale's own rounding."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    got = dequantize(pack(encode(x, GGUF_TYPES[name]), GGUF_TYPES[name], 64))
    blocks = x.view(5, 2, 32)
    # Q4_1 spans max - min in 15 steps; the others span the largest magnitude.
    span = (blocks.amax(-1) - blocks.amin(-1)) / 2 if name == "Q4_1" else blocks.abs().amax(-1)
    bound = span / steps * (1.0 if name == "Q4_0" else 0.5) + blocks.abs().amax(-1) * 2**-9
    assert ((got - x).view(5, 2, 32).abs() <= bound[..., None]).all()


def test_other_types_are_refused():
    with pytest.raises(KernelError, match=r"cannot encode Q6_K; these can be: F32, F16, BF16, Q4_0, Q4_1, Q8_0"):
        encode(torch.zeros(1, 256), GGUF_TYPES["Q6_K"])
    assert "Q8_0" in ENCODABLE
    with pytest.raises(KernelError, match="multiple of 32"):
        encode(torch.zeros(1, 33), GGUF_TYPES["Q8_0"])
    with pytest.raises(KernelError, match="floating"):
        encode(torch.zeros(1, 32, dtype=torch.int32), GGUF_TYPES["Q8_0"])
