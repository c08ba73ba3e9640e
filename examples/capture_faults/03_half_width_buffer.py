"""Fault 3: an output buffer half as wide as the result."""

import torch


class Projection(torch.nn.Module):
    """Writes into a buffer that is made once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 16), requires_grad=False)
        self.register_buffer("out", torch.empty(4, width))

    def forward(self, x):
        """(4, 8) float32 → (4, 16) float32."""
        return torch.mm(x, self.weight, out=self.out)


def _calls(device):
    return [(torch.randn(4, 8, device=device),) for _ in range(3)]


def planted(device):
    """The width of one of two fused halves."""
    return Projection(width=8).to(device), _calls(device)


def remedied(device):
    """The width of the result."""
    return Projection(width=16).to(device), _calls(device)
