"""The measuring core of ``ostinato bench``: decode and prefill through the scheduler, as requests meet them."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from ostinato.engine.loading import Loaded
from ostinato.engine.request import Request
from ostinato.engine.runner import Runner
from ostinato.engine.scheduler import Scheduler
from ostinato.errors import ContextLengthError, UsageError
from ostinato.sampling import SamplingParams

_BANDWIDTH_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class DecodePoint:
    """Decoding at one depth and batch.

    tokens_per_s: of the whole batch. bytes_per_step: weights and KV that a step must read. bandwidth_fraction: these
    bytes per second over the read bandwidth measured in the same run.
    """

    context: int
    batch: int
    graph: bool
    tokens_per_s: Spread
    ms_per_step: float
    bytes_per_step: int
    bandwidth_fraction: float
    memory_bytes: int


@dataclass(frozen=True)
class PrefillPoint:
    """A prompt of ``tokens`` tokens from nothing to its first drawn token."""

    tokens: int
    tokens_per_s: Spread
    first_token_ms: float


def read_bandwidth(device: torch.device, repeats: int = 10) -> float:
    """Bytes per second of a long read, the best of ``repeats``: the limit that decoding is held against."""
    num_bytes = _BANDWIDTH_BYTES[device.type]
    data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(repeats + 1):
        _wait(device)
        started = time.perf_counter()
        data.amax()
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return num_bytes / best


def measure_decode(
    loaded: Loaded,
    *,
    context: int,
    batch: int,
    new_tokens: int,
    repeats: int,
    bandwidth: float,
    graph: bool = True,
    temperature: float = 0.8,
) -> DecodePoint:
    """Decode ``new_tokens`` tokens for ``batch`` sequences that already hold ``context`` tokens.

    What the KV holds does not change the time, so it is not computed: the sequences start with their pages as they are.
    Raises UsageError for a batch larger than the loaded one, ContextLengthError where the KV is too short.
    """
    runner = loaded.runner if graph else eager_twin(loaded)
    if batch > runner.num_slots:
        raise UsageError(f"a batch of {batch} was asked for and {runner.num_slots} loaded; load with a larger batch")
    if context + new_tokens >= loaded.budget.context:
        raise ContextLengthError(
            f"{context} + {new_tokens} tokens do not fit a context of {loaded.budget.context}; load with more"
        )
    rates = [_decode_once(runner, loaded, context, batch, new_tokens, temperature) for _ in range(repeats + 1)][1:]
    spread = Spread.of(rates)
    per_token = loaded.budget.kv_bytes_per_token
    state = 2 * sum(spec.bytes_per_slot(loaded.state_dtype) for spec in loaded.model.kv_specs)  # read and written
    step_bytes = loaded.model.bytes_per_step(batch) + batch * (state + per_token * (context + new_tokens // 2))
    steps_per_s = spread.median / batch
    return DecodePoint(
        context=context,
        batch=batch,
        graph=graph,
        tokens_per_s=spread,
        ms_per_step=1e3 / steps_per_s,
        bytes_per_step=step_bytes,
        bandwidth_fraction=step_bytes * steps_per_s / bandwidth,
        memory_bytes=memory_bytes(loaded.device),
    )


def measure_prefill(loaded: Loaded, *, tokens: int, repeats: int) -> PrefillPoint:
    """Prefill a prompt of ``tokens`` random tokens and draw one."""
    if tokens + 1 >= loaded.budget.context:
        raise ContextLengthError(f"a prompt of {tokens} does not fit a context of {loaded.budget.context}")
    times = []
    for index in range(repeats + 1):
        scheduler = Scheduler(loaded.runner, loaded.budget.context)
        prompt = _random_prompt(loaded, tokens, index)
        scheduler.add(Request(prompt, SamplingParams(temperature=0.0, max_tokens=1), frozenset()))
        _wait(loaded.device)
        started = time.perf_counter()
        while scheduler.has_work:
            scheduler.step()
        times.append(time.perf_counter() - started)
    times = times[1:]
    return PrefillPoint(tokens, Spread.of([tokens / t for t in times]), 1e3 * statistics.median(times))


def eager_twin(loaded: Loaded) -> Runner:
    """A runner over the same model and KV that runs every step without a graph."""
    runner = loaded.runner
    return Runner(
        runner.model, runner.kv, num_slots=runner.num_slots, device=runner.device, graphs=False, chunk=runner.chunk
    )


def memory_bytes(device: torch.device) -> int:
    """Bytes that this process holds on a GPU; 0 for the CPU, where the operating system decides what counts."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def _decode_once(
    runner: Runner, loaded: Loaded, context: int, batch: int, new_tokens: int, temperature: float
) -> float:
    scheduler = Scheduler(runner, loaded.budget.context)
    # Sequences are admitted one after the other between steps: when the last one starts, the first has drawn ``batch``.
    start = max(context - batch, 1)
    params = SamplingParams(temperature=temperature, max_tokens=context + new_tokens - start, seed=1, ignore_eos=True)
    sequences = [
        scheduler.add(Request(_random_prompt(loaded, start, row), params, frozenset()), num_cached=start - 1)
        for row in range(batch)
    ]
    while not all(s.tokens for s in sequences):
        scheduler.step()
    _wait(loaded.device)
    # From here until the first sequence ends every step serves the whole batch.
    done = sum(len(s.tokens) for s in sequences)
    started = time.perf_counter()
    while all(s.finish_reason is None for s in sequences):
        scheduler.step()
    seconds = time.perf_counter() - started
    rate = (sum(len(s.tokens) for s in sequences) - done) / seconds
    while scheduler.has_work:
        scheduler.step()
    return rate


def _random_prompt(loaded: Loaded, tokens: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(loaded.model.vocab_size, (tokens,), generator=generator).tolist())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
