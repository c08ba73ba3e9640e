"""Fault 11: a scale that is computed on step 0 and should follow the data."""

import torch


class Planted(torch.nn.Module):
    """Keeps the first call's scale."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8).requires_grad_(False)
        self.scale = None

    def forward(self, x):
        """(2, 8) float32 → (2, 8) float32."""
        if self.scale is None:
            self.scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-6)
        return self.linear(x / self.scale)


class Remedied(Planted):
    """Computes it in each step: a kernel, not a cache."""

    def forward(self, x):
        """(2, 8) float32 → (2, 8) float32."""
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-6)
        return self.linear(x / scale)


def _calls(device):
    return [(torch.randn(2, 8, device=device) * (i + 1),) for i in range(3)]


def planted(device):
    """Right once."""
    return Planted().to(device), _calls(device)


def remedied(device):
    """Right always."""
    return Remedied().to(device), _calls(device)
