"""A tiny model behind a runner, and a runner whose device is late."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ostinato.engine.request import Request, TokenEvent
from ostinato.engine.request import Sequence as TokenSequence
from ostinato.engine.runner import Runner
from ostinato.engine.scheduler import Scheduler
from ostinato.kv.paged import PagedKV
from ostinato.kv.recurrent import RecurrentState
from ostinato.models.interface import Model
from ostinato.sampling import Published, SamplingParams
from tests.unit.models.tiny import CPU, FAMILIES, build, reference, save_hf

CONTEXT = 64
PAGE = 8


@cache
def tiny_model(index: int = 0) -> Model:
    """A random model of ``FAMILIES`` in float32."""
    with TemporaryDirectory() as directory:
        return build(save_hf(reference(FAMILIES[index]), Path(directory)))


def make_runner(
    num_slots: int = 4, *, context: int = CONTEXT, chunk: int = 512, page_size: int = PAGE, model: Model | None = None
) -> Runner:
    model = tiny_model() if model is None else model
    kv = _kv(model, num_slots, context, page_size)
    return Runner(model, kv, num_slots=num_slots, device=CPU, graphs=False, chunk=chunk)


def _kv(model: Model, num_slots: int, context: int, page_size: int) -> PagedKV:
    kv = PagedKV(
        model.kv_specs, num_slots=num_slots, context=context, page_size=page_size, dtype=torch.float32, device=CPU
    )
    for layer in kv.layers:
        # What nobody wrote must not be read; the dummy page is read by idle rows, whose results nobody reads.
        for tensor in layer.tensors():
            tensor[0 if isinstance(layer, RecurrentState) else 1 :] = float("nan")
    return kv


class LateRunner(Runner):
    """The host's side of a Runner over a device that runs what it is told in order, but some polls later.

    The host's bookkeeping is that of Runner itself, whose own tensors run at once and are not looked at; ``late`` is
    the device whose ring is read.
    """

    def __init__(self, late: Runner, *, chunk: int, seed: int) -> None:
        kv = _kv(late.model, late.num_slots, late.kv.context, late.kv.page_size)
        super().__init__(late.model, kv, num_slots=late.num_slots, device=CPU, graphs=False, chunk=chunk)
        self.late = late
        self.num_late = 0
        self._pending: deque[Callable[[], None]] = deque()
        self._random = random.Random(seed)

    @property
    def is_synchronous(self) -> bool:
        return False

    def admit(
        self, slot: int, params: SamplingParams, prompt: Sequence[int], stop_ids: Sequence[int], num_tokens: int
    ) -> None:
        super().admit(slot, params, prompt, stop_ids, num_tokens)
        self._pending.append(lambda: self.late.admit(slot, params, prompt, stop_ids, num_tokens))

    def prefill(self, slot: int, tokens: Sequence[int], start: int, *, draw: bool, remaining: int) -> None:
        super().prefill(slot, tokens, start, draw=draw, remaining=remaining)
        self._pending.append(lambda: self.late.prefill(slot, tokens, start, draw=draw, remaining=remaining))

    def stop(self, slot: int) -> None:
        super().stop(slot)
        self._pending.append(lambda: self.late.stop(slot))

    def release(self, slot: int) -> None:
        super().release(slot)
        self._pending.append(lambda: self.late.release(slot))

    def launch(self, num_rows: int) -> None:
        super().launch(num_rows)
        self._pending.append(lambda: self.late.launch(num_rows))
        self.num_late = max(self.num_late, len(self._pending))

    def poll(self, slot: int) -> Published | None:
        for _ in range(min(self._random.choice((0, 0, 1, 2)), len(self._pending))):
            self._pending.popleft()()
        own, self.sampler = self.sampler, self.late.sampler
        try:
            return super().poll(slot)
        finally:
            self.sampler = own


def make_late_runner(num_slots: int = 4, *, context: int = CONTEXT, chunk: int = 512, seed: int = 0) -> LateRunner:
    return LateRunner(make_runner(num_slots, context=context, chunk=chunk), chunk=chunk, seed=seed)


def request(prompt: Sequence[int], *, stop_ids: Sequence[int] = (), **params: object) -> Request:
    return Request(tuple(prompt), SamplingParams(**params), frozenset(stop_ids))  # type: ignore[arg-type]  # by keyword


def run_all(scheduler: Scheduler, sequences: Sequence[TokenSequence], *, max_steps: int = 10_000) -> list[TokenEvent]:
    """Step until every one of ``sequences`` has ended; checks the pages after each step."""
    events = []
    for _ in range(max_steps):
        if all(sequence.finish_reason is not None for sequence in sequences):
            return events
        events.extend(scheduler.step())
        check_pages(scheduler.runner.kv)
    raise AssertionError(f"not done after {max_steps} steps")


def alone(wanted: Request, *, context: int = CONTEXT) -> tuple[list[int], str]:
    """Tokens and finish reason of a request that has the whole engine to itself, its prompt in one piece."""
    scheduler = Scheduler(make_runner(1, context=context), context)
    sequence = scheduler.add(wanted)
    run_all(scheduler, [sequence])
    assert sequence.finish_reason is not None
    return sequence.tokens, sequence.finish_reason


def check_pages(kv: PagedKV) -> None:
    """Every page is free or owned by one slot, page 0 by none, and the tables say so."""
    owned = [page for pages in kv._owned for page in pages]
    assert 0 not in owned
    assert 0 not in kv._free
    assert sorted(owned + kv._free) == list(range(1, kv.num_pages))
    for slot, pages in enumerate(kv._owned):
        row = kv.page_table[slot].tolist()
        assert row[: len(pages)] == pages
        assert set(row[len(pages) :]) == {0}
