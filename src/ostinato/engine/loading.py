"""From a model's files to a runner on a device."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch

from ostinato.engine.budget import MemoryBudget, free_memory, plan_memory
from ostinato.engine.runner import Runner
from ostinato.errors import ContextLengthError, DeviceError, UsageError
from ostinato.kv.paged import FP8, PagedKV
from ostinato.layers.linear import Target
from ostinato.load.gguf import GGUFFile
from ostinato.load.quantizing import QuantizingCheckpoint
from ostinato.load.random import RandomCheckpoint
from ostinato.load.safetensors import HFCheckpoint
from ostinato.load.source import WeightReader
from ostinato.models.interface import Checkpoint, Family, Model
from ostinato.models.registry import family_of

Openable = GGUFFile | HFCheckpoint | QuantizingCheckpoint | RandomCheckpoint

_LOG = logging.getLogger(__name__)
_GPU_PAGE_SIZE = 64
_MIN_CAPABILITY = (8, 0)  # bfloat16 products
DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}
KV_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "fp8": FP8}
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_GPU_CHUNK, _CPU_CHUNK = 4096, 512


@dataclass(frozen=True)
class EngineConfig:
    """How a model is run.

    device: ``cuda``, ``cuda:1``, ``cpu``; None for a GPU if there is one. dtype: ``auto`` and ``bfloat16`` multiply by
    the weights as they are stored; ``float32`` dequantizes them exactly. kv: dtype of keys and values, ``auto`` for
    that of the activations. context: tokens a sequence may have. num_slots: sequences at a time. chunk: tokens of a
    prompt that run at once. graphs: False runs every step eagerly.
    """

    device: str | None = None
    dtype: str = "auto"
    kv: str = "auto"
    context: int | None = None
    num_slots: int = 1
    chunk: int | None = None
    graphs: bool = True
    state: str = "float32"


@dataclass(frozen=True)
class Loaded:
    """A model that is ready. state_dtype: of recurrent state. seconds: how long loading took."""

    runner: Runner
    model: Model
    budget: MemoryBudget
    device: torch.device
    state_dtype: torch.dtype
    seconds: float


def pick_device(name: str | None) -> torch.device:
    """The device that ``name`` means. Raises DeviceError where it is not there or too old."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device '{name}' is not known; use cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise DeviceError(f"device '{name}' is not supported; use cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise DeviceError("there is no CUDA device, or this PyTorch is a CPU build; use --device cpu")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise DeviceError(f"there is no cuda:{index}; this machine has {torch.cuda.device_count()} CUDA device(s)")
    capability = torch.cuda.get_device_capability(index)
    if capability < _MIN_CAPABILITY:
        found = ".".join(map(str, capability))
        raise DeviceError(f"cuda:{index} has compute capability {found}; 8.0 (Ampere) or later is needed")
    return torch.device("cuda", index)


def pick_dtypes(config: EngineConfig) -> tuple[torch.dtype, torch.dtype]:
    """(activation, KV). Raises UsageError for a name that is not known."""
    if config.dtype not in DTYPES:
        raise UsageError(f"--dtype {config.dtype} is not known; use {', '.join(DTYPES)}")
    activation = DTYPES[config.dtype]
    if config.kv == "auto":
        return activation, activation
    if config.kv not in KV_DTYPES:
        raise UsageError(f"--kv {config.kv} is not known; use auto, {', '.join(KV_DTYPES)}")
    return activation, KV_DTYPES[config.kv]


def pick_state_dtype(config: EngineConfig) -> torch.dtype:
    """Of recurrent state. Raises UsageError for a name that is not known."""
    if config.state not in STATE_DTYPES:
        raise UsageError(f"--state {config.state} is not known; use {', '.join(STATE_DTYPES)}")
    return STATE_DTYPES[config.state]


def pick_chunk(config: EngineConfig, device: torch.device) -> int:
    """Tokens of a prompt that run at once."""
    if config.chunk is not None:
        return config.chunk
    return _GPU_CHUNK if device.type == "cuda" else _CPU_CHUNK


def open_checkpoint(opened: Openable, device: torch.device) -> tuple[Checkpoint, WeightReader]:
    """What the model families read from, and the reader that knows which tensors were used."""
    # The CPU packs weights anew; a GPU takes the file's bytes as they are and unpacks them itself.
    reader = WeightReader(opened, device)
    if isinstance(opened, GGUFFile):
        return Checkpoint("gguf", opened.metadata, reader), reader
    return Checkpoint("hf", opened.config, reader), reader


def check_architecture(opened: Openable) -> None:
    """Raise UnsupportedModelError where no family implements the model, before anything else of it is read."""
    family_of(open_checkpoint(opened, torch.device("cpu"))[0])


def load_engine(opened: Openable, config: EngineConfig) -> Loaded:
    """Read the weights, allocate the KV, and make the runner; graphs are captured when first used, or by the caller.

    Raises the errors of files, models, devices and budgets; ContextLengthError for a context that the model was not
    made for.
    """
    started = time.perf_counter()
    device = pick_device(config.device)
    checkpoint, reader = open_checkpoint(opened, device)
    family = family_of(checkpoint)
    activation, kv_dtype = pick_dtypes(config)
    state_dtype = pick_state_dtype(config)
    check_context(family, config.context)
    budget = plan_memory(
        family,
        opened.tensors,
        activation=activation,
        kv_dtype=kv_dtype,
        context=config.context,
        num_slots=config.num_slots,
        free_bytes=free_memory(device),
        page_size=_GPU_PAGE_SIZE if device.type == "cuda" else None,
        state_dtype=state_dtype,
        chunk=pick_chunk(config, device),
    )
    with torch.inference_mode():
        model = family.build(checkpoint, Target(device, activation), budget.context)
        reader.finish()
        runner = make_runner(model, budget, kv_dtype, device, config)
    seconds = time.perf_counter() - started
    _LOG.info("loaded in %.2f s: %s", seconds, budget)
    return Loaded(runner, model, budget, device, state_dtype, seconds)


def make_runner(
    model: Model, budget: MemoryBudget, kv_dtype: torch.dtype, device: torch.device, config: EngineConfig
) -> Runner:
    """A runner with its KV for a model that stands on ``device``."""
    kv = PagedKV(
        model.kv_specs,
        num_slots=budget.num_slots,
        context=budget.context,
        page_size=budget.page_size,
        dtype=kv_dtype,
        device=device,
        state_dtype=pick_state_dtype(config),
    )
    chunk = pick_chunk(config, device)
    return Runner(model, kv, num_slots=budget.num_slots, device=device, graphs=config.graphs, chunk=chunk)


def check_context(family: Family, context: int | None) -> None:
    """Raise ContextLengthError for a context that is no length, or longer than the model was made for."""
    if context is None:
        return
    if context < 2:
        raise ContextLengthError(f"--context {context} leaves no room for a prompt and an answer; use at least 2")
    if context > family.max_context:
        raise ContextLengthError(
            f"--context {context} is more than the {family.max_context} positions that this model was made for"
        )
