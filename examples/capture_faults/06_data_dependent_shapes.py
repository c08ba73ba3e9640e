"""Fault 6: ``bincount``, ``nonzero`` and boolean masks: shapes that depend on data."""

import torch


class Router(torch.nn.Module):
    """Counts how many tokens each of 4 experts gets, and sums what expert 0 gets."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(torch.randn(8, 4), requires_grad=False)

    def forward(self, x):
        """(6, 8) float32 → counts (4,), sum (8,)."""
        expert = (x @ self.gate).argmax(-1)
        counts = torch.bincount(expert, minlength=4)
        rows = (expert == 0).nonzero()[:, 0]
        return counts, x[rows].sum(0) + x[expert == 0].mean()


class FixedRouter(Router):
    """The same with fixed shapes."""

    def forward(self, x):
        """(6, 8) float32 → counts (4,), sum (8,)."""
        expert = (x @ self.gate).argmax(-1)
        counts = torch.zeros(4, dtype=torch.long, device=x.device).scatter_add_(0, expert, torch.ones_like(expert))
        chosen = (expert == 0).to(x.dtype)[:, None]
        total = (x * chosen).sum(0)
        return counts, total + total.sum() / (chosen.sum() * x.shape[1])


def _calls(device):
    return [(torch.randn(6, 8, device=device),) for _ in range(3)]


def planted(device):
    """Three waits."""
    return Router().to(device), _calls(device)


def remedied(device):
    """None."""
    return FixedRouter().to(device), _calls(device)
