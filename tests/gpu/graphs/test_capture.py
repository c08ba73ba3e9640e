"""Capture and replay on a GPU: right results, an empty hot path, owned memory, a clean end."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from torch import nn

from ostinato.errors import CaptureError, ReplayMismatchError, StaleInputError
from ostinato.graphs import (
    Breaks,
    Buckets,
    CapturedCallable,
    CaptureStream,
    EagerCallable,
    GraphPool,
    StaticBuffers,
    Tolerance,
    capture,
)

DEVICES = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
CUDA = torch.device("cuda", 0)


@dataclasses.dataclass(frozen=True, eq=False)
class StepBuffers(StaticBuffers):
    tokens: torch.Tensor
    positions: torch.Tensor
    logits: torch.Tensor


class Decoder(nn.Module):
    """A stand-in for a decode step: reads a token, writes a cache at the position, picks the next token."""

    def __init__(self, slots: int, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.embedding = nn.Embedding(64, 32, device=device)
        self.layers = nn.Sequential(*(nn.Linear(32, 32, device=device) for _ in range(3)))
        self.register_buffer("cache", torch.zeros(slots, 16, 32, device=device))

    def forward(self, buffers: StepBuffers) -> torch.Tensor:
        x = self.layers(self.embedding(buffers.tokens))
        index = buffers.positions.view(-1, 1, 1).expand(-1, 1, 32)
        self.cache.scatter_(1, index, x.unsqueeze(1))
        pooled = self.cache.sum(1)
        buffers.store("logits", pooled @ self.embedding.weight.t())
        buffers.tokens.copy_(buffers.logits.argmax(-1))
        buffers.positions.copy_((buffers.positions + 1) % self.cache.shape[1])
        return buffers.logits


def _buffers(slots: int, device: torch.device = CUDA) -> StepBuffers:
    return StepBuffers(
        tokens=torch.arange(slots, device=device) + 1,
        positions=torch.zeros(slots, dtype=torch.int64, device=device),
        logits=torch.zeros(slots, 64, device=device),
    )


def _captured_decoder(slots: int, pool: GraphPool | None = None) -> tuple[CapturedCallable, Decoder, StepBuffers]:
    decoder, buffers = Decoder(slots, CUDA).requires_grad_(False), _buffers(slots)
    return capture(decoder, (buffers,), pool=pool, state=decoder.cache, name=f"decode {slots}"), decoder, buffers


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_replay_equals_eager_whatever_device_and_stream_are_current(device: torch.device) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(17, 33), nn.GELU(), nn.Linear(33, 5)).to(device).requires_grad_(False)
    step = capture(model, (torch.randn(3, 17, device=device),))
    for stream in (torch.cuda.default_stream(device), torch.cuda.Stream(device)):
        with torch.cuda.device(0), torch.cuda.stream(stream):
            for _ in range(5):
                x = torch.randn(3, 17, device=device)
                torch.testing.assert_close(step(x), model(x))
    assert step.num_replays == 10
    step.close()


def test_a_stateful_step_generates_what_eager_generates() -> None:
    step, decoder, buffers = _captured_decoder(3)
    reference, eager_buffers = Decoder(3, CUDA).requires_grad_(False), _buffers(3)
    assert decoder.cache.eq(0).all(), "capture left its own values in the state"
    assert buffers.positions.eq(0).all()
    assert buffers.tokens.tolist() == [1, 2, 3]
    for _ in range(12):
        step.replay()
        reference(eager_buffers)
        assert torch.equal(buffers.tokens, eager_buffers.tokens)
    torch.testing.assert_close(decoder.cache, reference.cache)
    report = step.report()
    assert report.num_replays_verified == 2
    assert report.num_nodes > 5
    assert report.num_state == 1
    assert report.num_inputs == 3
    assert report.num_constants == 1 + 3 * 2
    assert "equal eager" in str(report)
    step.close()


def test_replays_neither_allocate_nor_synchronize() -> None:
    step, _, _ = _captured_decoder(2)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats(CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with step.stream:
            for _ in range(300):
                step.replay()
        for _ in range(300):
            step.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats(CUDA)
    assert after["allocation.all.allocated"] == before["allocation.all.allocated"]
    assert after["reserved_bytes.all.current"] == before["reserved_bytes.all.current"]
    assert step.num_replays == 600
    step.close()


def test_fill_on_any_stream_reaches_the_next_replay_and_not_the_last() -> None:
    buffers = _buffers(4)

    def spin(b: StepBuffers) -> torch.Tensor:
        for _ in range(50):
            b.logits.add_(b.tokens.unsqueeze(1))
        return b.logits

    step = capture(spin, (buffers,))
    buffers.logits.zero_()
    for value in range(1, 21):
        buffers.fill("tokens", [value] * 4)
        step.replay()
    assert buffers.logits.eq(50.0 * sum(range(1, 21))).all()
    step.close()


def test_stale_inputs_are_refused() -> None:
    step = capture(lambda x: x * 2, (torch.ones(4, device=CUDA),))
    for bad in (torch.ones(3, device=CUDA), torch.ones(4, device=CUDA, dtype=torch.float64), torch.ones(4)):
        with pytest.raises(StaleInputError):
            step(bad)
    buffers = _buffers(2)
    in_place = capture(lambda b: b.logits + 1, (buffers,))
    with pytest.raises(StaleInputError, match="address"):
        in_place(_buffers(2))
    step.close()
    in_place.close()


def test_closing_frees_the_pool_and_forbids_use() -> None:
    pool = GraphPool(CUDA)

    def use_and_close() -> None:
        x = torch.randn(1024, 1024, device=CUDA)
        with capture(lambda t: (t @ t).relu() @ t, (x,), pool=pool, name="big") as step:
            step.replay()
            assert step.memory_bytes >= 4 * 1024 * 1024
        for use in (step.replay, step.launch, lambda: step.outputs, lambda: step(1)):
            with pytest.raises(CaptureError, match="big was closed"):
                use()
        step.close()

    def reserved_bytes() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(CUDA)

    use_and_close()  # the first use also makes cuBLAS's workspace for the pool's stream, which stays
    before = reserved_bytes()
    use_and_close()
    assert reserved_bytes() <= before


def test_every_replay_draws_new_numbers_and_a_seed_repeats_them() -> None:
    generator = torch.Generator(CUDA)

    def draw(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + torch.rand(64, device=CUDA), torch.empty(64, device=CUDA).exponential_(generator=generator)

    step = capture(draw, (torch.zeros(64, device=CUDA),), rng=(generator,))
    seen = []
    for _ in range(2):
        torch.manual_seed(5)
        generator.manual_seed(6)
        for _ in range(3):
            step.replay()
            seen.append([tensor.clone() for tensor in step.outputs])
    for one, two in ((0, 1), (1, 2), (0, 2)):
        assert not torch.equal(seen[one][0], seen[two][0])
        assert not torch.equal(seen[one][1], seen[two][1])
    for index in range(3):
        assert torch.equal(seen[index][0], seen[index + 3][0])
        assert torch.equal(seen[index][1], seen[index + 3][1])
    torch.manual_seed(5)
    generator.manual_seed(6)
    eager = draw(torch.zeros(64, device=CUDA))
    assert torch.equal(eager[0], seen[0][0])
    assert torch.equal(eager[1], seen[0][1])
    step.close()


def test_capture_leaves_the_random_state_of_the_caller_alone() -> None:
    torch.manual_seed(3)
    before = torch.cuda.get_rng_state(CUDA)
    capture(lambda x: x + torch.rand_like(x), (torch.zeros(8, device=CUDA),)).close()
    assert torch.equal(torch.cuda.get_rng_state(CUDA), before)


def test_buckets_share_one_pool_and_agree_with_eager() -> None:
    pool = GraphPool(CUDA)
    model = nn.Sequential(nn.Linear(256, 1024, device=CUDA), nn.ReLU(), nn.Linear(1024, 256, device=CUDA))
    model.requires_grad_(False)

    def build(size: int) -> CapturedCallable:
        return capture(model, (torch.randn(size, 256, device=CUDA),), pool=pool, name=f"bucket {size}")

    with Buckets([1, 8, 64], build) as buckets:
        buckets.capture_all()
        assert [graph.stream for graph in buckets] == [pool.stream] * 3
        for rows in (64, 3, 1, 17, 8):
            graph = buckets.graph_for(rows)
            x = torch.randn(buckets.bucket_for(rows), 256, device=CUDA)
            torch.testing.assert_close(graph(x), model(x))
        assert buckets.memory_bytes <= pool.memory_bytes


def test_an_eager_break_runs_between_its_graphs_in_order() -> None:
    shared = _buffers(3)
    side = CaptureStream(CUDA)

    def before(b: StepBuffers) -> None:
        for _ in range(40):
            b.logits.add_(1.0)

    def between() -> None:
        # Depends on data: it could not be captured.
        rows = shared.logits.sum(1).nonzero().flatten()
        shared.logits[rows] *= 2.0

    def after(b: StepBuffers) -> None:
        b.logits.add_(3.0)

    first = capture(before, (shared,), name="before", outputs=None)
    second = capture(after, (shared,), name="after")
    shared.logits.zero_()
    with Breaks("step") as step:
        step.captured(first).eager("double", between, stream=side, reason="rows are found by nonzero").captured(second)
        with pytest.raises(CaptureError, match="already"):
            step.captured(second)
        with pytest.raises(CaptureError, match="no reason"):
            step.eager("other", between, stream=side, reason="")
        expected = 0.0
        for _ in range(4):
            step.replay()
            expected = (expected + 40.0) * 2.0 + 3.0
            assert shared.logits.eq(expected).all()
        assert [segment.name for segment in step.segments] == ["before", "double", "after"]
        assert step.num_replays == 4
    assert first.is_closed


def test_the_eager_twin_has_the_same_results() -> None:
    decoder, buffers = Decoder(2, CUDA).requires_grad_(False), _buffers(2)
    eager = EagerCallable(decoder, (buffers,))
    step, _, graph_buffers = _captured_decoder(2)
    for _ in range(6):
        eager.replay()
        step.replay()
    assert torch.equal(buffers.tokens, graph_buffers.tokens)
    step.close()


def test_pinned_host_memory_can_be_written_by_the_step() -> None:
    ring = torch.zeros(4, dtype=torch.int64).pin_memory()

    def step(b: StepBuffers) -> None:
        b.tokens.add_(1)
        ring.copy_(b.tokens, non_blocking=True)

    buffers = _buffers(4)
    graph = capture(step, (buffers,), state=ring)
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    assert ring.tolist() == [3, 4, 5, 6]
    graph.close()


def test_declared_outputs_are_written_by_the_graph() -> None:
    out = torch.empty(3, 4, device=CUDA)
    step = capture(lambda x: x + 1, (torch.zeros(3, 4, device=CUDA),), outputs=out)
    assert step(torch.full((3, 4), 2.0, device=CUDA)) is out
    assert out.eq(3.0).all()
    step.close()


def test_only_a_slice_of_large_state_need_be_verified() -> None:
    cache = torch.zeros(1024, 16, device=CUDA)

    def step(x: torch.Tensor) -> torch.Tensor:
        cache[0].copy_(x)
        return cache[0] * 2

    graph = capture(step, (torch.ones(16, device=CUDA),), state=cache[:4])
    assert cache.eq(0).all()
    assert graph(torch.full((16,), 5.0, device=CUDA)).eq(10.0).all()
    graph.close()


def test_a_tolerance_of_zero_holds_for_deterministic_kernels_and_is_used() -> None:
    capture(lambda x: x.softmax(-1), (torch.randn(7, 13, device=CUDA),), tolerance=Tolerance(0.0, 0.0)).close()

    def drifting(x: torch.Tensor) -> torch.Tensor:
        return x.softmax(-1) if not torch.cuda.is_current_stream_capturing() else x.mul(1.0001).softmax(-1)

    with pytest.raises(ReplayMismatchError, match=r"The captured call did other work than warm-up: aten.mul"):
        capture(drifting, (torch.randn(7, 13, device=CUDA),), tolerance=Tolerance(0.0, 0.0))
    capture(drifting, (torch.randn(7, 13, device=CUDA),), tolerance=Tolerance(0.1, 0.1)).close()
