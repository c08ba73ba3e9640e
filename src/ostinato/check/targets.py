"""What ``ostinato check TARGET`` may name: ``module:callable``, ``script.py`` or ``hf:DIR_OR_CONFIG``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ostinato.check.gpu import check_on_gpu
from ostinato.check.hf import check_hf
from ostinato.check.result import Report, with_gpu
from ostinato.check.script import check_script
from ostinato.check.session import Progress, Settings, check_subject
from ostinato.check.subject import Subject
from ostinato.errors import UsageError

_FACTORY = "a factory returns (callable, [argument sets]) or a Subject"


def run_target(
    target: str,
    settings: Settings,
    progress: Progress,
    *,
    arguments: list[str] | None = None,
    cache: str = "all",
    dtype: str | None = None,
    passes: str = "all",
) -> Report:
    """Check what ``target`` names.

    Args:
        target: see the module's text.
        settings: see ``Settings``.
        progress: filled while the check runs.
        arguments: ``sys.argv[1:]`` of a script.
        cache: for ``hf:`` targets, which kind of cache: ``static``, ``dynamic`` or ``all``.
        dtype: for ``hf:`` targets, the dtype's name; default what the config says.
        passes: ``cpu``, ``gpu``, or ``all``: the GPU too where there is one, for a callable.

    Raises UsageError for a target that names nothing, CheckError if its code fails before a region is reached.
    """
    if target.startswith("hf:"):
        return check_hf(target[3:], settings, progress, cache=cache, dtype=_dtype(dtype))
    path, separator, name = target.rpartition(":")
    if not separator or (os.name == "nt" and len(path) == 1):
        return _run_script(Path(target), arguments or [], settings, progress)
    wants_gpu = passes == "gpu" or (passes == "all" and torch.cuda.is_available() and not settings.meta)
    if passes == "gpu":
        return check_on_gpu(lambda: _built(path, name), target=target)
    report = check_subject(lambda: _built(path, name), settings, target=target, progress=progress)
    return with_gpu(report, check_on_gpu(lambda: _built(path, name), target=target)) if wants_gpu else report


def _dtype(name: str | None) -> torch.dtype | None:
    found = None if name is None else getattr(torch, name, None)
    if name is not None and not isinstance(found, torch.dtype):
        raise UsageError(f"no dtype {name!r}; for example bfloat16 or float32")
    return found


def _run_script(path: Path, arguments: list[str], settings: Settings, progress: Progress) -> Report:
    if not path.is_file():
        raise UsageError(f"no script {path}; a target is module:callable, script.py or hf:DIR_OR_CONFIG")
    return check_script(path, arguments, settings, progress)


def _import_target(name: str) -> ModuleType:
    """Import a module by name or by path. Raises UsageError if there is none; errors inside it pass through."""
    sys.path[:0] = [p for p in (os.getcwd(),) if p not in sys.path]
    if name.endswith(".py") or os.sep in name:
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"no file {name}")
        sys.path.insert(0, str(path.resolve().parent))
        spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
        if spec is None or spec.loader is None:
            raise UsageError(f"{name} cannot be imported as Python")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module
    try:
        found = importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError):
        found = None
    if found is None:
        raise UsageError(f"no module {name!r}; the directory it is looked up from is {os.getcwd()}")
    return importlib.import_module(name)


def _built(module_name: str, name: str) -> Subject:
    module = _import_target(module_name)
    factory: Any = module
    for part in name.split("."):
        if part not in dir(factory):
            public = ", ".join(n for n in dir(module) if not n.startswith("_") and callable(getattr(module, n)))
            raise UsageError(f"{module_name} has no {name!r}; it has {public or 'no callables'}")
        factory = getattr(factory, part)
    if isinstance(factory, Subject):
        return factory
    if not callable(factory):
        raise UsageError(f"{module_name}:{name} is a {type(factory).__name__}; {_FACTORY}")
    return subject_from(_call_factory(factory, f"{module_name}:{name}"), f"{module_name}:{name}")


def _call_factory(factory: Callable[..., Any], target: str) -> Any:
    """Call a factory; one that takes a single required argument is given the device."""
    try:
        parameters = list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError) as error:
        raise UsageError(f"the signature of {target} cannot be read: {error}") from error
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) > 1 or any(p.default is p.empty and p.kind is p.KEYWORD_ONLY for p in parameters):
        names = ", ".join(p.name for p in required)
        raise UsageError(f"{target} needs {names}: a factory takes nothing, or the device; {_FACTORY}")
    if required:
        return factory("cuda")
    if any(p.name in ("dev", "device") for p in parameters):
        return factory(**{next(p.name for p in parameters if p.name in ("dev", "device")): "cuda"})
    return factory()


def subject_from(made: Any, target: str) -> Subject:
    """What a factory returned, as a subject. Raises UsageError if it is none."""
    if isinstance(made, Subject):
        return made
    if (
        isinstance(made, tuple | list)
        and len(made) in (2, 3)
        and callable(made[0])
        and isinstance(made[1], list | tuple)
    ):
        return Subject.of(made[0], made[1], made[2] if len(made) == 3 else None)
    raise UsageError(f"{target} returned {type(made).__name__}: {_FACTORY}")
