"""What runs on the device: prefill of a chunk, one replay per decode step, and the ring that brings tokens back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch

from ostinato.engine.step import StepBuffers, decode_step
from ostinato.errors import OstinatoError
from ostinato.graphs import Buckets, CapturedCallable, EagerCallable, GraphPool, capture
from ostinato.graphs.verify import Tolerance
from ostinato.kv.paged import PagedKV
from ostinato.layers.batch import Batch
from ostinato.models.interface import Model
from ostinato.sampling import Published, SamplerState, SamplingParams

_POLL_SECONDS = 20e-6
_HANG_SECONDS = 60.0


class Runner:
    """A model on its device with everything that its steps read and write. Knows slots, not requests.

    Rows 0 … num_slots - 1 of all buffers belong to slots. A decode step runs rows 0 … n - 1 for the smallest bucket n
    that holds the highest busy slot; idle rows in it compute on the dummy page.
    """

    def __init__(
        self,
        model: Model,
        kv: PagedKV,
        *,
        num_slots: int,
        device: torch.device,
        graphs: bool,
        chunk: int,
    ) -> None:
        self.model = model
        self.kv = kv
        self.device = device
        self.num_slots = num_slots
        self.chunk = chunk
        self.uses_graphs = graphs and device.type == "cuda"
        self.sampler = SamplerState.allocate(num_slots, model.vocab_size, device)
        self.buffers = StepBuffers.of(self.sampler, kv)
        self.launched = [0] * num_slots
        self._read = [0] * num_slots
        self._pool = GraphPool(device) if device.type == "cuda" else None
        self._buckets: Buckets[CapturedCallable | EagerCallable] = Buckets(bucket_sizes(num_slots), self._build)
        self.num_replays = 0

    @property
    def is_synchronous(self) -> bool:
        """Whether a step is over when its launch returns."""
        return self.device.type == "cpu"

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Everything of this runner happens on one stream, in order, without gradients."""
        with torch.inference_mode(), self._pool.stream if self._pool is not None else contextlib.nullcontext():
            yield

    def capture_all(self) -> None:
        """Capture every bucket now, so that no request waits for it."""
        with self.on_stream():
            self._buckets.capture_all()

    def _build(self, size: int) -> CapturedCallable | EagerCallable:
        def step(buffers: StepBuffers) -> None:
            decode_step(self.model, self.kv, self.sampler, buffers, size)

        if not self.uses_graphs:
            return EagerCallable(step, self.buffers, name=f"decode step of {size}")
        assert self._pool is not None
        # Capture saves and restores all that a step writes, the ring in host memory too: no step may be in flight.
        self._pool.stream.synchronize()
        return capture(
            step,
            self.buffers,
            pool=self._pool,
            state=[*self.kv.written_by_verification(size), *self.sampler.buffers.tensors()],
            fresh_inputs=self._fresh_inputs,
            tolerance=Tolerance(rtol=0.0, atol=0.0),
            name=f"decode step of {size}",
        )

    # -- one slot ----------------------------------------------------------------------------------------------------

    def admit(
        self, slot: int, params: SamplingParams, prompt: Sequence[int], stop_ids: Sequence[int], num_tokens: int
    ) -> None:
        """Give ``slot`` its pages for ``num_tokens`` positions and its row of the sampler; no step runs it yet."""
        with self.on_stream():
            self.kv.reserve(slot, num_tokens)
            self.sampler.set_row(slot, params, prompt, stop_ids)

    def prefill(self, slot: int, tokens: Sequence[int], start: int, *, draw: bool, remaining: int) -> None:
        """Run ``tokens`` at positions start … through the model; with ``draw`` also sample the token after the last.

        The slot is then active and may draw ``remaining`` tokens, this one included.
        """
        count = len(tokens)
        with self.on_stream():
            batch = self._chunk(slot, tokens, start)
            last = torch.full((1,), count - 1, dtype=torch.int64, device=self.device)
            logits = self.model.forward(batch, self.kv.layers, last)
            if draw:
                self.sampler.activate(slot, tokens[-1], start + count - 1, remaining)
                self.sampler.step(logits, self.buffers.slots[slot : slot + 1])
                self._read[slot] = self.launched[slot]  # steps of other slots meanwhile published nothing for it
                self.launched[slot] += 1
            else:
                # Steps of other slots may run before the next chunk, with this row idle in their bucket: what it then
                # writes must go where that chunk will write over it.
                self.buffers.positions[slot : slot + 1].fill_(start + count)

    def logits(self, slot: int, tokens: Sequence[int], start: int) -> torch.Tensor:
        """Logits after each of ``tokens``, float32 [n, vocab]: teacher forcing through the prefill path."""
        with self.on_stream():
            return self.model.forward(self._chunk(slot, tokens, start), self.kv.layers)

    def stop(self, slot: int) -> None:
        """From the next step on ``slot`` computes nothing that counts."""
        with self.on_stream():
            self.sampler.deactivate(slot)

    def release(self, slot: int) -> None:
        """Take the pages of ``slot`` back."""
        with self.on_stream():
            self.kv.release(slot)
            self.buffers.positions[slot : slot + 1].zero_()

    # -- steps -------------------------------------------------------------------------------------------------------

    def launch(self, num_rows: int) -> None:
        """Queue one step of the bucket that holds ``num_rows`` rows; returns at once on a GPU."""
        size = self._buckets.bucket_for(num_rows)
        with self.on_stream():
            self._buckets.graph_for(size).replay()
        for slot in range(size):
            self.launched[slot] += 1
        self.num_replays += 1

    def in_flight(self, slot: int) -> int:
        """Steps of ``slot`` that were launched and not read."""
        return self.launched[slot] - self._read[slot]

    def poll(self, slot: int) -> Published | None:
        """The next token of ``slot`` if it has come back; makes no call to the device."""
        if self.in_flight(slot) == 0:
            return None
        drawn = self.sampler.read(slot, self._read[slot])
        if drawn is not None:
            self._read[slot] += 1
        return drawn

    def wait(self, slot: int) -> Published:
        """The next token of ``slot``; waits for it in memory."""
        deadline = time.monotonic() + _HANG_SECONDS
        while (drawn := self.poll(slot)) is None:
            if time.monotonic() > deadline:
                raise OstinatoError(f"the device answered nothing for {_HANG_SECONDS:.0f} s; see its log for errors")
            time.sleep(_POLL_SECONDS)
        return drawn

    def describe(self) -> list[str]:
        """One line per captured graph."""
        return [str(graph.report()) for graph in self._buckets if isinstance(graph, CapturedCallable)]

    def close(self) -> None:
        """Free graphs and their pool."""
        self._buckets.close()

    def _chunk(self, slot: int, tokens: Sequence[int], start: int) -> Batch:
        """``tokens`` of ``slot`` at positions start …, brought to the device without a wait."""
        count = len(tokens)
        host = torch.tensor(tokens, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        return Batch(
            tokens=host.to(self.device, non_blocking=True),
            positions=torch.arange(start, start + count, dtype=torch.int32, device=self.device),
            slots=torch.full((count,), slot, dtype=torch.int32, device=self.device),
            decode=False,
        )

    def _fresh_inputs(self, index: int) -> None:
        """Active rows with other tokens, positions and random numbers for verification replay ``index``.

        Every row gets its dummy page, since the others may hold the KV of running sequences; recurrent state, which has
        no dummy, is saved and restored by the capture.
        """
        generator = torch.Generator().manual_seed(index)
        slots = torch.arange(self.num_slots, dtype=torch.int32)
        tokens = torch.randint(self.model.vocab_size, (self.num_slots,), generator=generator, dtype=torch.int32)
        self.buffers.fill("tokens", tokens)
        self.buffers.fill("positions", (5 * index + 3 + slots) % self.kv.page_size)
        self.buffers.fill("page_table", self.kv.dummy_table())
        self.buffers.fill("active", 1)
        self.buffers.fill("remaining", 1000)


def bucket_sizes(num_slots: int) -> list[int]:
    """1, 2, 4, 8, then every eighth up to 64, then every sixteenth; the last one is ``num_slots``."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, num_slots + 16, 16)]
    return [size for size in sizes if size < num_slots] + [num_slots]
