"""Fault 9: ``if tensor:`` and ``if offsets[0] != 0:`` on the host."""

import torch


def _model(device):
    return torch.nn.Linear(8, 8).to(device).requires_grad_(False)


def _calls(device):
    return [(torch.randn(4, 8, device=device), torch.tensor([o], device=device)) for o in (0, 2, 3)]


def planted(device):
    """Python decides."""
    model = _model(device)

    def step(x, offsets):
        if offsets[0] != 0:
            x = x.roll(1, 0)
        if x.isnan().any():
            x = x.nan_to_num()
        return model(x)

    return step, _calls(device)


def remedied(device):
    """The device decides."""
    model = _model(device)

    def step(x, offsets):
        x = torch.where(offsets != 0, x.roll(1, 0), x)
        return model(x.nan_to_num())

    return step, _calls(device)
