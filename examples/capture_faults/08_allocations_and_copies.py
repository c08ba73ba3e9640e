"""Fault 8: large fills in each step, a full-size ``repeat_interleave``, a ``.to(other_device)`` in the region."""

import torch
import torch.nn.functional as F


class Attention(torch.nn.Module):
    """One query against a cache of 512 slots, 4 query heads to each of 2 key heads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.randn(1, 2, 512, 32))
        self.register_buffer("values", torch.randn(1, 2, 512, 32))


class Planted(Attention):
    """Repeats the cache, allocates a big result, and hands it to another device."""

    def forward(self, query):
        """(1, 8, 1, 32) float32 → (1, 8, 1, 32) float32."""
        out = torch.zeros(1, 8, 512, 32, device=query.device)
        keys, values = self.keys.repeat_interleave(4, 1), self.values.repeat_interleave(4, 1)
        out[:, :, :1] = F.scaled_dot_product_attention(query, keys, values)
        return out.to("cuda:1")[:, :, :1]


class Remedied(Attention):
    """Grouped attention reads the cache as it is; what another device needs is sent after the replay."""

    def forward(self, query):
        """(1, 8, 1, 32) float32 → (1, 8, 1, 32) float32."""
        return F.scaled_dot_product_attention(query, self.keys, self.values, enable_gqa=True)


def _calls(device):
    return [(torch.randn(1, 8, 1, 32, device=device),) for _ in range(3)]


def planted(device):
    """Slow, and on the wrong device."""
    return Planted().to(device), _calls(device)


def remedied(device):
    """Neither."""
    return Remedied().to(device), _calls(device)
