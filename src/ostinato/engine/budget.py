"""One memory budget, worked out before anything is loaded: weights, KV, sampler and scratch against what is free."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ostinato.errors import MemoryBudgetError
from ostinato.load.source import TensorInfo
from ostinato.models.interface import Family
from ostinato.quant.blocks import KINDS
from ostinato.quant.cpu import packed_bytes

_MiB = 1 << 20
_SCRATCH_BYTES = 128 * _MiB  # graph pools, the CUDA libraries' workspaces
_SCRATCH_BYTES_PER_TOKEN = 256 * 1024  # of a prefill chunk: activations of the widest layer, a few at a time
_MAX_DEFAULT_CONTEXT = 32768
_VERIFICATION_COPIES = 3  # of recurrent state: as it was, after eager, after the replay


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that a model needs on its device.

    free_bytes: what was free there before loading. page_size: tokens of a KV page. num_dummies: pages of no sequence.
    state_bytes: of recurrent layers, for all slots and what the verification of a graph keeps of them beside.
    """

    weight_bytes: int
    kv_bytes_per_token: int
    sampler_bytes: int
    scratch_bytes: int
    free_bytes: int
    context: int
    num_slots: int
    page_size: int
    num_dummies: int
    state_bytes: int = 0

    @property
    def kv_bytes(self) -> int:
        """Whole pages for every slot, and the dummy pages."""
        pages = self.num_dummies + self.num_slots * -(-self.context // self.page_size)
        return self.kv_bytes_per_token * self.page_size * pages

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.state_bytes + self.sampler_bytes + self.scratch_bytes

    def __str__(self) -> str:
        state = f"recurrent state {_size(self.state_bytes)}, " if self.state_bytes else ""
        return (
            f"weights {_size(self.weight_bytes)}, KV {_size(self.kv_bytes)} for {self.num_slots} × {self.context} "
            f"tokens, {state}sampler and scratch {_size(self.sampler_bytes + self.scratch_bytes)}, "
            f"{_size(self.free_bytes)} free"
        )


def plan_memory(
    family: Family,
    tensors: Mapping[str, TensorInfo],
    *,
    activation: torch.dtype,
    kv_dtype: torch.dtype,
    context: int | None,
    num_slots: int,
    free_bytes: int,
    page_size: int | None,
    state_dtype: torch.dtype = torch.float32,
    chunk: int = 512,
) -> MemoryBudget:
    """The budget of a model at ``context`` tokens a slot; without one, at its own, up to 32768 and to what fits.

    page_size: tokens of a KV page, None where a page is a slot's whole context, as on the CPU.

    Raises MemoryBudgetError, which names the largest context or batch that would fit.
    """
    weights = sum(device_bytes(info, activation, on_cpu=page_size is None) for info in tensors.values())
    if page_size is not None and activation != torch.float32:
        weights += family.made_bytes
    per_token = sum(spec.bytes_per_token(kv_dtype) for spec in family.kv_specs)
    copies = 1 if page_size is None else 1 + _VERIFICATION_COPIES
    state = copies * num_slots * sum(spec.bytes_per_slot(state_dtype) for spec in family.kv_specs)
    scratch = _SCRATCH_BYTES + _SCRATCH_BYTES_PER_TOKEN * chunk
    sampler = 8 * family.vocab_size * num_slots
    room = free_bytes - weights - sampler - state - scratch
    tokens = max(room, 0) // max(per_token, 1)
    dummies = 1 if page_size is None else num_slots
    if page_size is None:
        fits = tokens // (num_slots + dummies)
    else:
        fits = max(tokens // page_size - dummies, 0) // num_slots * page_size
    wanted = context if context is not None else min(family.max_context, _MAX_DEFAULT_CONTEXT, fits)
    budget = MemoryBudget(
        weights,
        per_token,
        sampler,
        scratch,
        free_bytes,
        wanted,
        num_slots,
        page_size or max(wanted, 1),
        dummies,
        state,
    )
    if room <= 0 and weights + scratch < free_bytes:
        raise MemoryBudgetError(
            f"the state of {num_slots} sequences needs {_size(sampler + state)} beside {_size(weights)} of weights, "
            f"and {_size(free_bytes)} are free; use a smaller batch"
        )
    if room <= 0:
        raise MemoryBudgetError(
            f"the weights need {_size(weights + scratch)} with scratch and {_size(free_bytes)} are free; use a "
            "smaller or more strongly quantized model"
        )
    if budget.total_bytes > free_bytes or wanted < 2:
        smaller = f"a smaller batch than {num_slots}" if num_slots > 1 else "a smaller model"
        remedy = f"--context {fits} would fit, or {smaller}" if fits >= 2 else f"use {smaller}"
        raise MemoryBudgetError(
            f"a context of {max(wanted, 2)} for {num_slots} sequence(s) does not fit: {budget}; {remedy}"
        )
    return budget


def device_bytes(info: TensorInfo, activation: torch.dtype, *, on_cpu: bool) -> int:
    """Bytes of a stored tensor once it is in the form that products read."""
    kind = KINDS.get(info.type_name)
    count = info.num_elements
    if kind is None or activation == torch.float32:
        return count * (4 if len(info.shape) < 2 else activation.itemsize)
    if on_cpu:
        return packed_bytes(kind, count)
    planes = 1 if kind.min_sign == 0 else 2
    sub = planes * count // kind.group if kind.has_sub else 0
    return count * kind.bits // 8 + 2 * planes * count // kind.super_group + sub


def free_memory(device: torch.device) -> int:
    """Bytes that a program may still take on ``device``."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _size(num_bytes: int) -> str:
    gib = num_bytes / (1 << 30)
    return f"{gib:.2f} GiB" if gib >= 1 else f"{num_bytes / _MiB:.0f} MiB"
