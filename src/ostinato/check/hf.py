"""A decode step of a ``transformers`` model, built from its config alone, with random weights and its own caches.

``transformers`` is optional: it is imported when an ``hf:`` target is checked. No rule here names a model.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ostinato.check.result import Report, merged
from ostinato.check.session import Progress, Settings, check_subject, describe
from ostinato.check.subject import Call, Subject
from ostinato.errors import CheckError, UsageError

_PROMPT = 5
_NUM_STEPS = 5
_NUM_META_STEPS = 4
_MARGIN = 16
_MAX_WINDOW = 512
_MAX_META_WINDOW = 8192
_MAX_WEIGHT_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to decode: the kind of cache (``static``, ``dynamic``, or ``own``: the one that the model makes), and how
    long the prompt before the steps is."""

    name: str
    kind: str
    prompt_length: int


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError(f"hf: targets need the package transformers ({error}): pip install transformers") from error


def load_config(where: str) -> Any:
    """The config at a path: a directory with ``config.json``, a JSON file, or the name of a model type.

    Raises UsageError if it is none of these, or if transformers does not know it.
    """
    transformers = _transformers()
    path = Path(where)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        if where in transformers.CONFIG_MAPPING:
            return transformers.CONFIG_MAPPING[where]()
        raise UsageError(f"no config at {where}: give a directory with config.json, a JSON file, or a model type")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    kind = data.get("model_type") if isinstance(data, dict) else None
    if kind not in transformers.CONFIG_MAPPING:
        raise UsageError(f"{path} has model_type {kind!r}, which transformers {transformers.__version__} does not know")
    return transformers.CONFIG_MAPPING[kind].from_dict(data)


def _model_class(config: Any) -> Any:
    transformers = _transformers()
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None and issubclass(found, transformers.GenerationMixin):
            return found
    mapping = transformers.AutoModelForCausalLM._model_mapping
    if type(config) in mapping:
        return mapping[type(config)]
    raise UsageError(
        f"transformers has no causal language model for {type(config).__name__}: set architectures in the config"
    )


def wanted_dtype(config: Any, dtype: torch.dtype | None, *, is_meta: bool) -> torch.dtype:
    """The dtype asked for, else the config's, else what transformers takes (float32), else bfloat16 at full size."""
    found = dtype or getattr(config, "dtype", None) or (torch.bfloat16 if is_meta else torch.float32)
    if isinstance(found, str):
        found = getattr(torch, found)
    assert isinstance(found, torch.dtype)
    return found


def build_model(config: Any, dtype: torch.dtype | None, *, is_meta: bool) -> torch.nn.Module:
    """The model on the (pretended) device, in eval mode, with random weights."""
    made_for = _model_class(config)
    wanted = wanted_dtype(config, dtype, is_meta=is_meta)
    before = torch.get_default_dtype()
    torch.set_default_dtype(wanted)
    try:
        if is_meta:
            with importlib.import_module("transformers.initialization").no_init_weights():
                model = made_for(config)
        else:
            model = made_for(config)
    finally:
        torch.set_default_dtype(before)
    built: torch.nn.Module = model.to(device="cuda", dtype=wanted).eval()
    return built


def refuse_if_large(config: Any, dtype: torch.dtype) -> None:
    """Raise UsageError if the weights would need more than 4 GiB: that is what ``--meta`` is for."""
    with torch.device("meta"), importlib.import_module("transformers.initialization").no_init_weights():
        model = _model_class(config)(config)
    num_bytes = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    if num_bytes > _MAX_WEIGHT_BYTES:
        raise UsageError(
            f"random weights of this config need {num_bytes / (1 << 30):.1f} GiB as {dtype}: "
            "check it with --meta, or make the config smaller"
        )


def _window(config: Any) -> int | None:
    window = getattr(config.get_text_config(), "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else None


def _variants(config: Any, settings: Settings, cache: str) -> list[Variant]:
    found: list[Variant] = []
    if cache in ("all", "static"):
        found.append(Variant("static cache", "static", _PROMPT))
        window = _window(config)
        if window is not None and window <= (_MAX_META_WINDOW if settings.meta else _MAX_WINDOW):
            found.append(Variant("static cache, window full", "static", window + 1))
    if cache in ("all", "dynamic"):
        found.append(Variant("dynamic cache", "dynamic", _PROMPT))
    if not found:
        raise UsageError(f"cache {cache!r}: use static, dynamic or all")
    return found


def _make_cache(config: Any, variant: Variant) -> Any:
    transformers = _transformers()
    if variant.kind == "static":
        return transformers.StaticCache(config=config, max_cache_len=variant.prompt_length + _NUM_STEPS + _MARGIN)
    return transformers.DynamicCache(config=config) if variant.kind == "dynamic" else None


def _after_prompt(model: torch.nn.Module, config: Any, variant: Variant, name: str) -> Any:
    """Run the prompt and return the cache that it filled. ``name`` is the cache's name in the model's forward."""
    prompt = (torch.arange(variant.prompt_length, device="cuda") % config.get_text_config().vocab_size)[None]
    past = _make_cache(config, variant)
    with torch.no_grad():
        output = model(input_ids=prompt, use_cache=True, **({} if past is None else {name: past}))
    past = output.get(name) if past is None else past
    if past is None:
        raise ValueError(f"its output has no {name}")
    return past


def decode_subject(config: Any, dtype: torch.dtype | None, variant: Variant, *, is_meta: bool) -> Subject:
    """A model after its prompt, and decode steps with one new token each. Token and position are device tensors.

    Raises CheckError if the prompt cannot be run: that is not what is checked.
    """
    model = build_model(config, dtype, is_meta=is_meta)
    vocabulary = config.get_text_config().vocab_size
    parameters = inspect.signature(model.forward).parameters
    cache_name = "cache_params" if "cache_params" in parameters else "past_key_values"
    takes_positions = "position_ids" in parameters
    try:
        past = _after_prompt(model, config, variant, cache_name)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError, KeyError) as error:
        raise CheckError(f"the prompt does not run with a {variant.name}: {describe(error)}") from error

    def decode(input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        with torch.no_grad():
            positions = {"position_ids": position_ids} if takes_positions else {}
            return model(input_ids=input_ids, use_cache=True, **positions, **{cache_name: past}).logits

    calls = []
    for step in range(_NUM_META_STEPS if is_meta else _NUM_STEPS):
        token = torch.full((1, 1), (step * 7 + 3) % vocabulary, dtype=torch.long, device="cuda")
        position = torch.full((1, 1), variant.prompt_length + step, dtype=torch.long, device="cuda")
        calls.append(Call((token, position)))
    return Subject(decode, tuple(calls))


def _maker(config: Any, dtype: torch.dtype | None, variant: Variant, is_meta: bool) -> Callable[[], Subject]:
    return lambda: decode_subject(config, dtype, variant, is_meta=is_meta)


def check_hf(
    where: str, settings: Settings, progress: Progress, *, cache: str = "all", dtype: torch.dtype | None = None
) -> Report:
    """Check decode steps of the model that a config describes, with each of its caches.

    A kind of cache that the model does not run with becomes a note. Raises CheckError if none runs.
    """
    config = load_config(where)
    if not settings.meta:
        refuse_if_large(config, wanted_dtype(config, dtype, is_meta=False))
    reports: list[tuple[str, Report]] = []
    refused: list[str] = []
    variants = _variants(config, settings, cache)
    for variant in [*variants, Variant("own cache", "own", _PROMPT)]:
        if variant.kind == "own" and (reports or cache != "all"):
            continue
        try:
            reports.append(
                (
                    variant.name,
                    check_subject(
                        _maker(config, dtype, variant, settings.meta), settings, target=f"hf:{where}", progress=progress
                    ),
                )
            )
        except CheckError as error:
            refused.append(str(error))
    if not reports:
        raise CheckError("; ".join(refused))
    report = merged(reports, f"hf:{where}")
    kind = str(wanted_dtype(config, dtype, is_meta=settings.meta)).removeprefix("torch.")
    return replace(
        report, notes=(*report.notes, *refused), assumptions=(*report.assumptions, f"dtype {kind}", "batch 1")
    )
