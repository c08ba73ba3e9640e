"""Products with float matrices on a GPU."""

import pytest
import torch

from ostinato.kernels.dense_linear import dense_linear
from ostinato.kernels.dense_linear.ref import dense_linear_ref


@pytest.mark.parametrize("m", [1, 3, 8, 9, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(576, 576), (1001, 2080), (64, 9000)])
def test_products_agree(n, k, dtype, m):
    torch.manual_seed(2)
    x = torch.randn(m, k, device="cuda")
    weight = (torch.randn(n, k, device="cuda") * 0.05).to(dtype)
    norm = torch.rand(k, device="cuda") + 0.5
    residual = torch.randn(m, n, device="cuda")
    found = dense_linear(x, weight, norm=norm, eps=1e-6, residual=residual)
    expected = dense_linear_ref(x, weight, norm=norm, eps=1e-6, residual=residual)
    # beyond eight rows 16-bit products are rounded once more, and the reference rounds x as they do
    limit = 2e-5 if dtype == torch.float32 else 6e-3
    assert float((found - expected).norm() / expected.norm()) < limit
