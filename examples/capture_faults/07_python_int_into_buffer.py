"""Fault 7: ``buffer[0] = python_int`` for token and position: a copy from pageable memory in each step."""

import torch


class Step(torch.nn.Module):
    """Embeds a token and adds its position's vector."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 8)
        self.place = torch.nn.Embedding(32, 8)
        self.register_buffer("token", torch.zeros(1, dtype=torch.long))
        self.register_buffer("position", torch.zeros(1, dtype=torch.long))
        self.requires_grad_(False)


class PlantedStep(Step):
    """The host writes the buffers inside of the step."""

    def forward(self, token: int, position: int):
        """Two Python numbers → (1, 8) float32."""
        self.token[0] = token
        self.position[0] = position
        return self.embed(self.token) + self.place(self.position)


class RemediedStep(Step):
    """The buffers are static inputs: filled before the replay, with ``copy_(pinned, non_blocking=True)``."""

    def forward(self, token, position):
        """Two int64 tensors of one element → (1, 8) float32."""
        return self.embed(token) + self.place(position)


def planted(device):
    """Numbers from the host."""
    return PlantedStep().to(device), [(3, 0), (5, 1), (2, 2)]


def remedied(device):
    """Tensors on the device."""
    calls = [(torch.tensor([t], device=device), torch.tensor([p], device=device)) for t, p in [(3, 0), (5, 1), (2, 2)]]
    return RemediedStep().to(device), calls
