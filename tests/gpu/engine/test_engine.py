"""The captured step on a GPU: eager's tokens, one launch a token, no wait, flat memory, rows that do not meet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from ostinato.engine.request import Request
from ostinato.engine.runner import Runner, bucket_sizes
from ostinato.engine.scheduler import Scheduler
from ostinato.graphs import CapturedCallable
from ostinato.kv.paged import PagedKV
from ostinato.models.interface import Model
from ostinato.sampling import SamplingParams
from tests.gpu.models.checkpoints import CUDA, FAMILIES, VOCAB, Spec, build, random_ids

CONTEXT = 1024
FAST = Spec("llama", "llama", {"max_position_embeddings": CONTEXT}, "Q4_1")
EXACT = Spec("qwen3", "qwen3", {"head_dim": 64, "max_position_embeddings": CONTEXT})


@pytest.fixture(scope="module")
def fast() -> Model:
    """4-bit weights, bfloat16 between ops."""
    return build(FAST, CUDA, torch.bfloat16)


@pytest.fixture(scope="module")
def exact() -> Model:
    """float32 throughout: batches of different sizes differ by 2^-23 or so, which changes no token here."""
    return build(EXACT, CUDA, torch.float32)


@contextmanager
def runner_of(
    model: Model, num_slots: int = 1, *, graphs: bool = True, chunk: int = 512, capture_all: bool = True
) -> Iterator[Runner]:
    dtype = torch.float32 if model.activation == torch.float32 else torch.bfloat16  # type: ignore[attr-defined]  # Llama has it
    kv = PagedKV(model.kv_specs, num_slots=num_slots, context=CONTEXT, page_size=64, dtype=dtype, device=CUDA)
    runner = Runner(model, kv, num_slots=num_slots, device=CUDA, graphs=graphs, chunk=chunk)
    if capture_all:
        runner.capture_all()
    try:
        yield runner
    finally:
        runner.close()


def params(slot: int, **changes: object) -> SamplingParams:
    """Settings that differ from slot to slot."""
    kinds: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.2, "min_p": 0.02, "repetition_penalty": 1.2},
    ]
    settings = {"seed": slot, "max_tokens": 4000, "ignore_eos": True, **kinds[slot % 4], **changes}
    return SamplingParams(**settings)  # type: ignore[arg-type]  # by keyword


def start(runner: Runner, slot: int, length: int, remaining: int = 4000) -> list[int]:
    """Admit and prefill ``slot``; returns its first token."""
    prompt = random_ids(length, seed=slot)
    runner.admit(slot, params(slot), prompt, (), CONTEXT)
    runner.prefill(slot, prompt, 0, draw=True, remaining=remaining)
    token = runner.wait(slot).token
    assert token is not None
    return [token]


def write(runner: Runner, texts: dict[int, list[int]], steps: int, num_rows: int) -> None:
    """``steps`` steps of a bucket that holds ``num_rows``; the tokens go to ``texts``."""
    for _ in range(steps):
        runner.launch(num_rows)
        for slot, text in texts.items():
            token = runner.wait(slot).token
            assert token is not None
            text.append(token)


def length_of(slot: int) -> int:
    return 1 + (53 * slot) % 150


# -- graphs against eager --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8, 9, 16])
def test_a_graph_writes_what_eager_writes(fast: Model, batch: int) -> None:
    texts = []
    for graphs in (True, False):
        with runner_of(fast, batch, graphs=graphs) as runner:
            found = {slot: start(runner, slot, length_of(slot)) for slot in range(batch)}
            write(runner, found, 80, batch)
            texts.append(found)
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts[0].values()}) == batch


def test_every_bucket_is_captured_and_verified(fast: Model) -> None:
    with runner_of(fast, 16) as runner:
        graphs = list(runner._buckets)
        assert len(graphs) == len(bucket_sizes(16)) == len(runner.describe())
        for graph in graphs:
            assert isinstance(graph, CapturedCallable)
            graph.check()
        # Nothing of the captures is left in what requests start from.
        torch.cuda.synchronize()
        b = runner.sampler.buffers
        for tensor in (b.active, b.positions, b.step, b.counter, b.token_counts, b.ring):
            assert not tensor.any()
        assert torch.equal(runner.kv.page_table.cpu(), runner.kv.dummy_table())
        for layer in runner.kv.layers:
            assert not layer.k[runner.kv.num_dummies :].any()
            assert not layer.v[runner.kv.num_dummies :].any()


@pytest.mark.parametrize("slots", [2, 5])
def test_a_bucket_captured_beside_running_sequences_harms_none(fast: Model, slots: int) -> None:
    """Graphs made when first needed, in the middle of answers, against graphs made before the first."""
    texts = []
    for early in (True, False):
        with runner_of(fast, slots, capture_all=early) as runner:
            found: dict[int, list[int]] = {}
            for slot in range(slots):
                found[slot] = start(runner, slot, length_of(slot))
                write(runner, found, 20, slot + 1)
            texts.append(found)
    assert texts[0] == texts[1]


def test_a_capture_right_after_a_prompt_loses_no_token(fast: Model) -> None:
    """The first step's capture comes while the prompt's own sample may still be under way."""
    for seed in range(5):
        with runner_of(fast, 1, capture_all=False) as runner:
            scheduler = Scheduler(runner, CONTEXT)
            wanted = Request(tuple(random_ids(300, seed=seed)), params(0, max_tokens=5), frozenset())
            sequence = scheduler.add(wanted)
            while scheduler.has_work:
                scheduler.step()
            assert len(sequence.tokens) == 5


# -- the hot path ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
def test_512_steps_without_a_wait_in_flat_memory(fast: Model, batch: int) -> None:
    """Under ``set_sync_debug_mode("error")`` a call that waits for the device raises."""
    with runner_of(fast, batch) as runner:
        for slot in range(batch):
            start(runner, slot, 40)
        texts: dict[int, list[int]] = {slot: [] for slot in range(batch)}
        write(runner, texts, 4, batch)
        torch.cuda.synchronize()
        replays = runner.num_replays
        graphs = sum(graph.num_replays for graph in runner._buckets)
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            write(runner, texts, 512, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert runner.num_replays - replays == 512
        assert sum(graph.num_replays for graph in runner._buckets) - graphs == 512
        assert torch.cuda.memory_allocated() == allocated
        assert torch.cuda.memory_reserved() == reserved
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations
        assert all(len(text) == 516 for text in texts.values())


def test_the_scheduler_waits_for_nothing_either(fast: Model) -> None:
    """A whole answer, its admission and prompt included, once everything is compiled."""
    with runner_of(fast, 2) as runner:
        scheduler = Scheduler(runner, CONTEXT)
        answers = []
        for turn in range(2):
            torch.cuda.set_sync_debug_mode("error" if turn else "default")
            try:
                before = runner.num_replays
                wanted = Request(tuple(random_ids(60)), params(1, max_tokens=200), frozenset())
                sequence = scheduler.add(wanted)
                while scheduler.has_work:
                    scheduler.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            answers.append(sequence.tokens)
            assert runner.num_replays - before == 199  # the prompt's own sample is the first token
        assert answers[0] == answers[1]


# -- rows do not meet ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 4, 8, 16])
def test_a_seed_gives_the_same_tokens_alone_and_among_others(fast: Model, batch: int) -> None:
    """In one and the same bucket a row's numbers do not depend on the other rows at all."""
    chosen = batch - 1
    with runner_of(fast, batch) as runner:
        alone = {chosen: start(runner, chosen, length_of(chosen))}
        write(runner, alone, 60, batch)
        runner.stop(chosen)
        runner.release(chosen)
        together = {slot: start(runner, slot, length_of(slot)) for slot in range(batch)}
        write(runner, together, 60, batch)
    assert together[chosen] == alone[chosen]


def mixed_requests(count: int) -> list[Request]:
    return [
        Request(
            tuple(random_ids(1 + (29 * i) % 200, seed=i)),
            params(i, max_tokens=1 + (17 * i) % 60, ignore_eos=i % 5 == 0),
            frozenset(range(i, VOCAB, 37)) if i % 3 == 0 else frozenset(),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("num_slots", [1, 3, 8])
def test_every_answer_is_the_one_its_request_gets_alone(exact: Model, num_slots: int) -> None:
    """Admission, chunked prompts, run-ahead and retirement with a device that really is late."""
    requests = mixed_requests(24)
    answers = []
    with runner_of(exact, 1) as runner:
        scheduler = Scheduler(runner, CONTEXT)
        for wanted in requests:
            sequence = scheduler.add(wanted)
            while scheduler.has_work:
                scheduler.step()
            answers.append((sequence.tokens, sequence.finish_reason))
    with runner_of(exact, num_slots, chunk=64, capture_all=False) as runner:
        scheduler = Scheduler(runner, CONTEXT)
        sequences = [scheduler.add(wanted) for wanted in requests]
        while scheduler.has_work:
            scheduler.step()
        assert runner.kv.num_free_pages == runner.kv.num_pages - runner.kv.num_dummies
    assert [(s.tokens, s.finish_reason) for s in sequences] == answers


def test_cancelling_and_continuing(exact: Model) -> None:
    def whole(wanted: Request) -> list[int]:
        with runner_of(exact, 1) as runner:
            scheduler = Scheduler(runner, CONTEXT)
            sequence = scheduler.add(wanted)
            while scheduler.has_work:
                scheduler.step()
            return sequence.tokens

    with runner_of(exact, 3, chunk=64) as runner:
        scheduler = Scheduler(runner, CONTEXT)
        beside = scheduler.add(Request(tuple(random_ids(20)), params(1, max_tokens=300), frozenset()))
        broken = scheduler.add(Request(tuple(random_ids(150, seed=1)), params(2, max_tokens=300), frozenset()))
        kept = scheduler.add(Request(tuple(random_ids(90, seed=2)), params(0, max_tokens=20), frozenset()))
        scheduler.keep(kept)
        while kept.finish_reason is None:
            scheduler.step()
        scheduler.cancel(broken)
        text = [*kept.request.prompt, *kept.tokens]
        follow = Request((*text, *random_ids(130, seed=3)), params(0, max_tokens=20), frozenset())
        second = scheduler.add(follow, slot=kept.slot, num_cached=len(text) - 1)
        while scheduler.has_work:
            scheduler.step()
        assert second.tokens == whole(follow)
        assert beside.tokens == whole(beside.request)
        assert runner.kv.num_free_pages == runner.kv.num_pages - runner.kv.num_dummies


@pytest.mark.parametrize("spec", FAMILIES, ids=str)
def test_every_family_is_captured(spec: Spec) -> None:
    """Windows, biases, head norms and odd heads in one graph each, against eager."""
    model = build(spec, CUDA, torch.bfloat16)
    texts = []
    for graphs in (True, False):
        kv = PagedKV(model.kv_specs, num_slots=2, context=256, page_size=64, dtype=torch.bfloat16, device=CUDA)
        runner = Runner(model, kv, num_slots=2, device=CUDA, graphs=graphs, chunk=512)
        found: dict[int, list[int]] = {}
        for slot in range(2):
            prompt = random_ids(30 + slot, seed=slot)
            runner.admit(slot, params(slot), prompt, (), 256)
            runner.prefill(slot, prompt, 0, draw=True, remaining=1000)
            first = runner.wait(slot).token
            assert first is not None
            found[slot] = [first]
        write(runner, found, 100, 2)
        texts.append(found)
        runner.close()
    assert texts[0] == texts[1]


def test_closing_gives_the_memory_back(fast: Model) -> None:
    def used() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    with runner_of(fast, 4) as runner:
        start(runner, 0, 20)
    del runner
    before = used()
    for _ in range(3):
        with runner_of(fast, 4) as runner:
            start(runner, 0, 20)
        del runner
        assert used() == before
