"""Fault 10: sharing by name that matched nothing, and said nothing."""

import torch

from ostinato.check import Subject


class Model(torch.nn.Module):
    """Two layers with a scale each, which are to be one buffer that the host refreshes between replays."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))
        for layer in self.layers:
            layer.register_buffer("scale", torch.ones(1))
        self.requires_grad_(False)

    def share_scale(self, scale, prefix: str) -> int:
        """Put ``scale`` into every layer whose name has the prefix; returns how many."""
        matched = [module for name, module in self.named_modules() if name.startswith(prefix)]
        for module in matched:
            module.scale = scale
        return len(matched)

    def forward(self, x):
        """(2, 8) float32 → (2, 8) float32."""
        for layer in self.layers:
            x = layer(x) * layer.scale
        return x


def _subject(device, prefix):
    model, scale = Model().to(device), torch.ones(1, device=device)
    model.share_scale(scale, prefix)
    return Subject.of(model, [(torch.randn(2, 8, device=device),) for _ in range(3)], {"the shared scale": scale})


def planted(device):
    """The layers are called "layers.0", not "blk.0"."""
    return _subject(device, "blk.")


def remedied(device):
    """The right prefix; a program should raise when ``share_scale`` returns 0."""
    return _subject(device, "layers.")
