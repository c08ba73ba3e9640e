"""Fault 5: ``.item()`` in a diagnostic, once per layer: 122 waits per token in one real model."""

import torch


class Stack(torch.nn.Module):
    """Layers that keep the largest activation, for a log."""

    def __init__(self, reads_on_host: bool) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))
        self.reads_on_host = reads_on_host
        self.largest = []
        self.register_buffer("largest_dev", torch.zeros(4))

    def forward(self, x):
        """(2, 8) float32 → (2, 8) float32."""
        for index, layer in enumerate(self.layers):
            x = torch.relu(layer(x))
            if self.reads_on_host:
                self.largest.append(x.abs().max().item())
            else:
                self.largest_dev[index : index + 1].copy_(x.abs().max().view(1))
        return x


def _calls(device):
    return [(torch.randn(2, 8, device=device),) for _ in range(3)]


def planted(device):
    """One wait per layer."""
    return Stack(reads_on_host=True).to(device).requires_grad_(False), _calls(device)


def remedied(device):
    """The log stays on the device and is read when somebody asks."""
    return Stack(reads_on_host=False).to(device).requires_grad_(False), _calls(device)
