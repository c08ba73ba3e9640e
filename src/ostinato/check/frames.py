"""Which line of the checked code are we in? Torch's, Python's and the checker's own frames are folded away."""

from __future__ import annotations

import os
import sys
import sysconfig
from functools import cache
from types import FrameType, TracebackType

import torch

from ostinato.check.finding import NOWHERE, Frame

_CHECK_DIR = os.path.dirname(os.path.abspath(__file__)) + os.sep
_PACKAGE_DIR = os.path.dirname(_CHECK_DIR.rstrip(os.sep)) + os.sep
_TORCH_DIR = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_STDLIB_DIR = sysconfig.get_paths()["stdlib"] + os.sep
_FOLDED = (_TORCH_DIR, _CHECK_DIR, os.path.join(_PACKAGE_DIR, "graphs") + os.sep, os.path.join(_PACKAGE_DIR, "cli"))
_FOLDED_PACKAGES = ("numpy", "triton", "_pytest", "pluggy", "pytest", "typer", "click")
_MAX_FRAMES = 16


@cache
def is_folded(file: str) -> bool:
    """Whether frames of this file are left out of a stack: torch, the standard library, the checker itself."""
    if file.startswith("<") or file.startswith(_FOLDED):
        return True
    if file.startswith(_STDLIB_DIR):
        rest = file[len(_STDLIB_DIR) :]
        if not rest.startswith(("site-packages", "dist-packages")):
            return True
    parts = file.replace("\\", "/").split("/")
    return any(name in parts for name in _FOLDED_PACKAGES) and "site-packages" in parts


@cache
def in_torch(file: str) -> bool:
    """Whether a file belongs to torch."""
    return file.startswith(_TORCH_DIR)


@cache
def asks_as_user(file: str) -> bool:
    """Whether code of this file should be told of the pretended device: the user's, and those parts of torch's Python
    that run with the modes on (modules, optimizers). FakeTensor's own machinery must hear the truth."""
    if not in_torch(file):
        return True
    rest = file[len(_TORCH_DIR) :].replace(os.sep, "/")
    return rest.startswith(
        ("optim/", "nn/modules/", "nn/utils/", "nn/attention/", "nn/parallel/", "distributions/", "cuda/", "amp/")
    ) or (rest in ("utils/_foreach_utils.py", "accelerator/__init__.py"))


def _walk(frame: FrameType | None, limit: int) -> list[Frame]:
    found: list[Frame] = []
    while frame is not None and len(found) < limit:
        file = frame.f_code.co_filename
        if not is_folded(file):
            found.append(Frame(os.path.abspath(file), frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return found


def user_frame() -> Frame:
    """The innermost frame of the checked code, or ``NOWHERE``."""
    found = _walk(sys._getframe(1), 1)
    return found[0] if found else NOWHERE


def user_stack() -> tuple[Frame, ...]:
    """The frames of the checked code, innermost first, at most 16."""
    return tuple(_walk(sys._getframe(1), _MAX_FRAMES))


def caller_is_user() -> bool:
    """Whether the function that called the hook stands in the checked code (not in torch, not in the checker)."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_CHECK_DIR):
        frame = frame.f_back
    return frame is not None and not in_torch(frame.f_code.co_filename)


def raised_at(traceback: TracebackType | None) -> tuple[Frame, ...]:
    """The frames of the checked code in a traceback, innermost first."""
    found: list[Frame] = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if not is_folded(code.co_filename):
            found.append(Frame(os.path.abspath(code.co_filename), traceback.tb_lineno, code.co_name))
        traceback = traceback.tb_next
    return tuple(reversed(found[-_MAX_FRAMES:]))
