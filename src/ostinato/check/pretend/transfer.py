"""Copies between the host and the pretended device."""

from __future__ import annotations

import torch

from ostinato.check.finding import Severity
from ostinato.check.pretend.world import World


def report_transfer(
    world: World,
    source: torch.Tensor,
    target: torch.Tensor | None,
    non_blocking: bool,
    op: str,
    *,
    to: torch.device | None = None,
) -> None:
    """Report what a copy does to a capture.

    Args:
        source: the tensor that is read.
        target: the tensor that is written; None if it is new, and then ``to`` says where (None: pageable host memory,
            or pinned memory where PyTorch makes it pinned, which it does for a non-blocking copy to the host).
        non_blocking: as in ``copy_``.
        op: the operation's name.
    """
    source_device = world.device_of(source)
    target_device = world.device_of(target) if target is not None else to
    if source_device == target_device:
        return
    if source_device is not None and target_device is not None:
        world.report(
            "WRONG_DEVICE",
            Severity.HAZARD,
            f"a copy from {source_device} to {target_device} leaves the captured stream",
            op,
        )
        return
    if source.numel() == 0:
        return
    if target_device is not None:
        if not world.is_pinned(source):
            world.report("H2D_PAGEABLE", Severity.ERROR, "a copy from pageable host memory", op)
        elif not non_blocking:
            world.report("H2D_BLOCKING", Severity.ERROR, "a blocking copy from pinned memory waits for the stream", op)
        else:
            world.report(
                "H2D_PINNED",
                Severity.HAZARD,
                "every replay reads this host buffer again: keep it alive and current",
                op,
            )
        return
    is_pinned = world.is_pinned(target) if target is not None else non_blocking
    if is_pinned and non_blocking:
        world.report(
            "D2H_PINNED", Severity.HAZARD, "every replay writes this host buffer: read it only after the replay", op
        )
    else:
        world.report("D2H_SYNC", Severity.ERROR, "a copy from the device to the host waits for the stream", op)
