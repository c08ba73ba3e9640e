"""Checking from Python: ``check(fn, args, calls=[…])`` and ``check_factory(make)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ostinato.check.gpu import check_on_gpu
from ostinato.check.pretend.flatten import tensors
from ostinato.check.result import Report, with_gpu
from ostinato.check.session import Settings, check_subject
from ostinato.check.subject import Subject
from ostinato.check.targets import subject_from
from ostinato.errors import UsageError


def check(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    *,
    calls: Sequence[Any] | None = None,
    static: Mapping[str, torch.Tensor] | None = None,
    settings: Settings | None = None,
) -> Report:
    """Everything that would break or falsify a capture of ``fn``, in this process.

    Args:
        fn: the region that would be captured.
        args: the arguments of a call; tensors are static inputs.
        calls: the arguments of successive calls instead; three or more show what changes from call to call.
        static: further tensors that the host refreshes between replays, by name; the region must read each.
        settings: see ``Settings``.

    Objects made on the CPU are taken to be on the device: arguments, parameters, buffers, tensors in attributes and
    closures (free 0-dim tensors are left on the host). To say it exactly, write a factory and use ``check_factory``.
    With CUDA tensors, ``fn`` is checked on the GPU instead.

    Raises UsageError if there are no arguments to call with.
    """
    if calls is not None and args:
        raise UsageError("give args or calls, not both")
    subject = Subject.of(fn, [tuple(args)] if calls is None else calls, static)
    name = getattr(fn, "__qualname__", type(fn).__name__)
    if any(t.is_cuda for call in subject.calls for t in tensors((call.args, dict(call.kwargs)))):
        return check_on_gpu(lambda: subject, target=name)
    return check_subject(lambda: subject, settings, target=name, adopts=True)


def check_factory(make: Callable[..., Any], *, settings: Settings | None = None, gpu: bool | None = None) -> Report:
    """Check what a factory makes: ``make("cuda")`` returns (callable, [argument sets]) or a ``Subject``.

    The factory runs with a pretended GPU, so that what it leaves on the host stays there. ``gpu`` True adds the pass on
    the real one, None adds it where there is one; there the factory is called once more.
    """
    name = getattr(make, "__qualname__", type(make).__name__)
    report = check_subject(lambda: subject_from(make("cuda"), name), settings, target=name)
    if gpu or (gpu is None and torch.cuda.is_available()):
        return with_gpu(report, check_on_gpu(lambda: subject_from(make("cuda"), name), target=name))
    return report
