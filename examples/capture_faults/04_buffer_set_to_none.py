"""Fault 4: a buffer is allocated, then overwritten with None, and the captured path silently is another."""

import torch


class Planted(torch.nn.Module):
    """Falls back without a word."""

    def __init__(self, device) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 8, device=device), requires_grad=False)
        self.scratch = torch.empty(4, 8, device=device)

    def finish_loading(self):
        """Meant to free what only loading needs."""
        self.scratch = None

    def forward(self, x):
        """(4, 8) float32 → (4, 8) float32."""
        if self.scratch is not None:
            return torch.mm(x, self.weight, out=self.scratch)
        return torch.stack([row @ self.weight for row in x.unbind()])


class Remedied(Planted):
    """Says so."""

    def finish_loading(self):
        """The step's buffer stays."""

    def forward(self, x):
        """(4, 8) float32 → (4, 8) float32."""
        if self.scratch is None:
            raise RuntimeError("the scratch buffer was released: call allocate() before the capture")
        return torch.mm(x, self.weight, out=self.scratch)


def _subject(model, device):
    model.finish_loading()
    return model, [(torch.randn(4, 8, device=device),) for _ in range(3)]


def planted(device):
    """The slow path, unnoticed."""
    return _subject(Planted(device), device)


def remedied(device):
    """The path that was meant, or an error."""
    return _subject(Remedied(device), device)
