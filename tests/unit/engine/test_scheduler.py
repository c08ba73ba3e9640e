"""Requests through few slots: every answer is the one that its request gets alone."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ostinato.engine.request import Request, Sequence
from ostinato.engine.runner import Runner, bucket_sizes
from ostinato.engine.scheduler import RUN_AHEAD, Scheduler
from ostinato.errors import ContextLengthError, OstinatoError, SamplingError, UsageError
from ostinato.sampling import SamplingParams
from tests.unit.engine.machine import (
    CONTEXT,
    PAGE,
    LateRunner,
    alone,
    check_pages,
    make_late_runner,
    make_runner,
    request,
    run_all,
)
from tests.unit.models.tiny import VOCAB, random_ids

Make = Callable[..., Runner]


@pytest.fixture(params=[make_runner, make_late_runner], ids=["prompt", "late"])
def make(request: pytest.FixtureRequest) -> Make:
    """Runners whose steps are over when launched, and runners whose device is late."""
    chosen: Make = request.param
    return chosen


def mixed_requests(count: int, seed: int = 0) -> list[Request]:
    """Different lengths, temperatures, filters, penalties, seeds, stop ids and answers."""
    choose = random.Random(seed)
    requests = []
    for i in range(count):
        params = {
            "temperature": choose.choice((0.0, 0.7, 1.3)),
            "top_k": choose.choice((0, 5)),
            "top_p": choose.choice((1.0, 0.8)),
            "min_p": choose.choice((0.0, 0.05)),
            "repetition_penalty": choose.choice((1.0, 1.3)),
            "presence_penalty": choose.choice((0.0, 0.5)),
            "seed": 100 + i,
            "max_tokens": choose.randint(1, 20),
            "ignore_eos": choose.random() < 0.2,
            "logit_bias": choose.choice(({}, {7: 3.0})),
        }
        prompt = random_ids(choose.randint(1, 30), seed=seed * 1000 + i)
        requests.append(request(prompt, stop_ids=choose.sample(range(VOCAB), 6), **params))
    return requests


@pytest.mark.parametrize("num_slots", [1, 3, 4])
@pytest.mark.parametrize("chunk", [5, 512])
def test_every_answer_is_the_one_it_gets_alone(make: Make, num_slots: int, chunk: int) -> None:
    scheduler = Scheduler(make(num_slots, chunk=chunk), CONTEXT)
    requests = mixed_requests(14)
    sequences = [scheduler.add(wanted) for wanted in requests]
    events = run_all(scheduler, sequences)
    for wanted, sequence in zip(requests, sequences, strict=True):
        assert (sequence.tokens, sequence.finish_reason) == alone(wanted)
        mine = [event for event in events if event.sequence is sequence]
        assert [event.token for event in mine] == sequence.tokens
        assert [event.finish_reason for event in mine] == [None] * (len(mine) - 1) + [sequence.finish_reason]
    assert not scheduler.has_work
    assert scheduler.runner.kv.num_free_pages == scheduler.runner.kv.num_pages - 1


def test_the_requests_of_these_tests_end_in_both_ways() -> None:
    reasons = [alone(wanted)[1] for wanted in mixed_requests(14)]
    assert {"stop", "length"} <= set(reasons)


def test_requests_that_come_while_others_run(make: Make) -> None:
    scheduler = Scheduler(make(2, chunk=4), CONTEXT)
    requests = mixed_requests(8, seed=2)
    sequences = []
    for wanted in requests:
        sequences.append(scheduler.add(wanted))
        for _ in range(3):
            scheduler.step()
    run_all(scheduler, sequences)
    assert [(s.tokens, s.finish_reason) for s in sequences] == [alone(wanted) for wanted in requests]


def test_a_long_prompt_in_chunks_beside_sequences_that_write(make: Make) -> None:
    """Steps of others run between its chunks, with its row in their bucket: that row must not spoil what stands."""
    scheduler = Scheduler(make(4, chunk=6), CONTEXT)
    writing = [request(random_ids(4, seed=i), max_tokens=40, seed=i, temperature=1.0) for i in range(3)]
    first = [scheduler.add(wanted) for wanted in writing]
    for _ in range(6):
        scheduler.step()
    long = request(random_ids(50, seed=9), max_tokens=10, temperature=0.0)
    sequence = scheduler.add(long)
    run_all(scheduler, [*first, sequence])
    assert sequence.tokens == alone(long)[0]
    assert [s.tokens for s in first] == [alone(wanted)[0] for wanted in writing]


def test_a_slot_that_is_used_again_has_a_clean_row(make: Make) -> None:
    """Penalties, bias, filters and the random counter of one request do nothing to the next in its slot."""
    scheduler = Scheduler(make(1), CONTEXT)
    heavy = request(
        random_ids(20),
        repetition_penalty=1.8,
        frequency_penalty=1.0,
        logit_bias={3: 5.0},
        top_k=3,
        seed=1,
        max_tokens=12,
    )
    plain = request(random_ids(7, seed=1), seed=1, max_tokens=12)
    for wanted in (plain, heavy, plain, heavy):
        sequence = scheduler.add(wanted)
        run_all(scheduler, [sequence])
        assert sequence.tokens == alone(wanted)[0]


# -- ends ------------------------------------------------------------------------------------------------------------


def test_max_tokens_stop_ids_and_ignore_eos(make: Make) -> None:
    prompt = random_ids(9, seed=5)
    free, _ = alone(request(prompt, temperature=0.0, max_tokens=20))
    stop = free[6]
    cut = free[: free.index(stop) + 1]

    def ends(wanted: Request) -> tuple[list[int], str | None]:
        scheduler = Scheduler(make(2), CONTEXT)
        sequence = scheduler.add(wanted)
        run_all(scheduler, [sequence])
        return sequence.tokens, sequence.finish_reason

    assert ends(request(prompt, temperature=0.0, max_tokens=1)) == (free[:1], "length")
    assert ends(request(prompt, temperature=0.0, max_tokens=20, stop_ids=[stop])) == (cut, "stop")
    assert ends(request(prompt, temperature=0.0, max_tokens=len(cut), stop_ids=[stop])) == (cut, "stop")
    assert ends(request(prompt, temperature=0.0, max_tokens=20, stop_ids=[stop], ignore_eos=True)) == (free, "length")


def test_the_first_token_may_be_the_last(make: Make) -> None:
    prompt = random_ids(9, seed=5)
    first = alone(request(prompt, temperature=0.0, max_tokens=1))[0][0]
    scheduler = Scheduler(make(1), CONTEXT)
    sequence = scheduler.add(request(prompt, temperature=0.0, stop_ids=[first]))
    run_all(scheduler, [sequence])
    assert (sequence.tokens, sequence.finish_reason) == ([first], "stop")


@pytest.mark.parametrize("length", [CONTEXT - 1, CONTEXT - 2, CONTEXT - PAGE, CONTEXT - PAGE - 1])
def test_an_answer_fills_the_context_to_its_last_place(make: Make, length: int) -> None:
    scheduler = Scheduler(make(2), CONTEXT)
    wanted = request(random_ids(length), temperature=0.0, max_tokens=500)
    sequence = scheduler.add(wanted)
    run_all(scheduler, [sequence])
    assert len(sequence.tokens) == CONTEXT - length
    assert sequence.finish_reason == "length"
    roomy = request(random_ids(length), temperature=0.0, max_tokens=CONTEXT - length)
    assert sequence.tokens == alone(roomy, context=2 * CONTEXT)[0]


def test_requests_that_cannot_be_met_are_refused_at_once(make: Make) -> None:
    scheduler = Scheduler(make(1), CONTEXT)
    with pytest.raises(ContextLengthError, match=rf"{CONTEXT} tokens and the context {CONTEXT}.*--context"):
        scheduler.add(request(random_ids(CONTEXT)))
    with pytest.raises(SamplingError, match="empty"):
        scheduler.add(request([]))
    with pytest.raises(SamplingError, match="16 stop token ids, got 17"):
        scheduler.add(request([1], stop_ids=range(17)))
    with pytest.raises(SamplingError, match=f"beyond the vocabulary of {VOCAB}"):
        scheduler.add(request([1], logit_bias={VOCAB: 1.0}))
    with pytest.raises(UsageError, match=f"token id {VOCAB}"):
        scheduler.add(request([1, VOCAB, 2]))
    assert not scheduler.has_work


# -- cancelling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 2, 5, 9])
def test_cancelling_frees_the_slot_and_harms_nobody(make: Make, after: int) -> None:
    scheduler = Scheduler(make(2, chunk=4), CONTEXT)
    requests = [request(random_ids(18, seed=i), max_tokens=24, seed=i) for i in range(4)]
    sequences = [scheduler.add(wanted) for wanted in requests]
    for _ in range(after):
        scheduler.step()
    scheduler.cancel(sequences[0])
    scheduler.cancel(sequences[3])  # still queued
    scheduler.cancel(sequences[0])  # again does nothing
    held = list(sequences[0].tokens)
    late = scheduler.add(requests[3])
    run_all(scheduler, [*sequences, late])
    assert sequences[0].finish_reason == sequences[3].finish_reason == "cancelled"
    assert sequences[0].tokens == held
    assert sequences[3].tokens == []
    assert [s.tokens for s in (*sequences[1:3], late)] == [alone(wanted)[0] for wanted in requests[1:]]
    assert scheduler.runner.kv.num_free_pages == scheduler.runner.kv.num_pages - 1


# -- kept slots ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [0, 2])
def test_a_kept_slot_continues_where_it_was(make: Make, others: int) -> None:
    """A second turn that reuses what stands equals one that runs the whole text anew, with others writing meanwhile."""
    scheduler = Scheduler(make(3, chunk=5), CONTEXT)
    beside = [scheduler.add(request(random_ids(5, seed=20 + i), max_tokens=50, seed=i)) for i in range(others)]
    first = scheduler.add(request(random_ids(12), max_tokens=6, temperature=0.0))
    scheduler.keep(first)
    run_all(scheduler, [first])
    for _ in range(5):
        scheduler.step()
    text = [*first.request.prompt, *first.tokens]
    for turn, cut in enumerate((len(text) - 1, 9)):  # everything stands; then all but the first 9 is another text
        follow = request([*text[:cut], *random_ids(17, seed=30 + turn)], max_tokens=6, temperature=0.0)
        second = scheduler.add(follow, slot=first.slot, num_cached=cut)
        scheduler.keep(second)
        run_all(scheduler, [second])
        assert second.slot == first.slot
        assert second.tokens == alone(follow)[0]
        text = [*follow.prompt, *second.tokens]
    run_all(scheduler, beside)
    assert [s.tokens for s in beside] == [alone(s.request)[0] for s in beside]
    scheduler.free(first.slot)
    scheduler.free(first.slot)  # again does nothing
    assert scheduler.runner.kv.num_free_pages == scheduler.runner.kv.num_pages - 1


def test_when_all_slots_are_kept_a_new_request_is_an_error_not_a_hang() -> None:
    scheduler = Scheduler(make_runner(1), CONTEXT)
    first = scheduler.add(request(random_ids(3), max_tokens=2))
    scheduler.keep(first)
    run_all(scheduler, [first])
    second = scheduler.add(request(random_ids(3), max_tokens=2))
    with pytest.raises(OstinatoError, match="kept"):
        run_all(scheduler, [second], max_steps=10)
    scheduler.free(first.slot)
    run_all(scheduler, [second])


def test_a_slot_that_is_answering_cannot_take_a_second_request() -> None:
    scheduler = Scheduler(make_runner(2), CONTEXT)
    first = scheduler.add(request(random_ids(3), max_tokens=20))
    scheduler.keep(first)
    scheduler.step()
    with pytest.raises(OstinatoError, match="slot"):
        scheduler.add(request(random_ids(5)), slot=first.slot, num_cached=2)


# -- the late device -------------------------------------------------------------------------------------------------


def test_the_device_is_never_more_than_the_run_ahead_behind() -> None:
    scheduler = Scheduler(make_late_runner(1, seed=3), CONTEXT)
    sequence = scheduler.add(request(random_ids(4), max_tokens=50, ignore_eos=True))
    seen = 0
    while sequence.finish_reason is None:
        scheduler.step()
        seen = max(seen, sequence.launched - len(sequence.tokens))
        assert sequence.launched - len(sequence.tokens) <= RUN_AHEAD
    assert seen == RUN_AHEAD  # it did run ahead
    assert sequence.launched == 50  # and asked for no step that nobody needs


def test_slots_are_used_again_while_steps_are_in_flight() -> None:
    """Short answers that end early, on a device that is always behind: every slot is taken again many times."""
    runner = make_late_runner(3, seed=11, chunk=7)
    scheduler = Scheduler(runner, CONTEXT)
    requests = [
        request(random_ids(1 + i % 17, seed=i), max_tokens=1 + i % 9, seed=i, stop_ids=range(i, i + 16))
        for i in range(40)
    ]
    sequences = [scheduler.add(wanted) for wanted in requests]
    run_all(scheduler, sequences)
    assert runner.num_late > 2
    assert [(s.tokens, s.finish_reason) for s in sequences] == [alone(wanted) for wanted in requests]


def test_many_more_steps_than_the_ring_holds(make: Make) -> None:
    scheduler = Scheduler(make(2, context=400), 400)
    busy = scheduler.add(request(random_ids(3), max_tokens=300, ignore_eos=True, seed=1))
    short = []
    while busy.finish_reason is None:
        if all(s.finish_reason for s in short) and len(short) < 8:
            short.append(scheduler.add(request(random_ids(4, seed=len(short)), max_tokens=10, seed=2)))
        scheduler.step()
    run_all(scheduler, short)
    assert busy.tokens == alone(busy.request, context=400)[0]
    assert [s.tokens for s in short] == [alone(s.request)[0] for s in short]


# -- random schedules ------------------------------------------------------------------------------------------------

_ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 11)),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("turn"), st.integers(0, 30)),
        st.tuples(st.just("free"), st.integers(0, 30)),
    ),
    max_size=30,
)
_REQUESTS = mixed_requests(12, seed=4)
_ANSWERS: dict[Request, tuple[list[int], str]] = {}


def answer(wanted: Request) -> tuple[list[int], str]:
    if wanted not in _ANSWERS:
        _ANSWERS[wanted] = alone(wanted)
    return _ANSWERS[wanted]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(actions=_ACTIONS, num_slots=st.integers(1, 4), chunk=st.sampled_from((3, 8, 512)), late=st.integers(0, 5))
def test_any_schedule(actions: list[tuple[str, int]], num_slots: int, chunk: int, late: int) -> None:
    """Requests come, go, are cancelled and continued in any order: no page is lost and no answer changes."""
    runner: Runner = (
        make_late_runner(num_slots, chunk=chunk, seed=late) if late else make_runner(num_slots, chunk=chunk)
    )
    scheduler = Scheduler(runner, CONTEXT)
    sequences = []
    kept = {}  # slot → the sequence whose KV it holds
    for name, number in actions:
        if name == "add" and len(kept) < num_slots:
            sequences.append(scheduler.add(_REQUESTS[number]))
        elif name == "step":
            for _ in range(number):
                scheduler.step()
                check_pages(runner.kv)
        elif name == "cancel" and sequences:
            scheduler.cancel(sequences[number % len(sequences)])
        elif name == "turn" and sequences:
            chosen = sequences[number % len(sequences)]
            if chosen.finish_reason is None and chosen.slot < 0:
                scheduler.keep(chosen)
                run_all(scheduler, [chosen])
                kept[chosen.slot] = chosen
        elif name == "free" and kept:
            slot = sorted(kept)[number % len(kept)]
            before = kept.pop(slot)
            text = [*before.request.prompt, *before.tokens]
            if len(text) + 8 < CONTEXT and number % 2:
                follow = request([*text, 5, 6, 7], max_tokens=4, temperature=0.0)
                after = scheduler.add(follow, slot=slot, num_cached=len(text) - 1)
                run_all(scheduler, [after])
                assert after.tokens == alone(follow)[0]
            else:
                scheduler.free(slot)
    for slot in kept:
        scheduler.free(slot)
    run_all(scheduler, sequences)
    for sequence in sequences:
        tokens, reason = answer(sequence.request)
        if sequence.finish_reason == "cancelled":
            assert sequence.tokens == tokens[: len(sequence.tokens)]
        else:
            assert (sequence.tokens, sequence.finish_reason) == (tokens, reason)
    assert runner.kv.num_free_pages == runner.kv.num_pages - 1


# -- buckets ---------------------------------------------------------------------------------------------------------


def test_buckets_hold_every_batch_and_waste_little() -> None:
    for slots in range(1, 130):
        sizes = bucket_sizes(slots)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == slots
        for rows in range(1, slots + 1):
            bucket = next(size for size in sizes if size >= rows)
            assert bucket < rows + max(rows, 16)


def test_a_late_runner_is_late() -> None:
    """The tests above would show nothing if its device ran at once."""
    runner = make_late_runner(1, seed=0)
    assert isinstance(runner, LateRunner)
    runner.admit(0, request([1]).params, (1,), (), 8)
    runner.prefill(0, (1, 2), 0, draw=True, remaining=5)
    assert runner.late.launched == [0]
    assert runner.wait(0).token is not None


@pytest.mark.parametrize(
    ("launched", "drawn", "reason", "ended"),
    [(5, 5, "stop", True), (7, 5, "stop", True), (5, 5, "length", True), (5, 5, None, True), (7, 5, None, False),
     (7, 5, "cancelled", False), (0, 0, None, True)],
)  # fmt: skip
def test_a_sequence_knows_whether_later_tokens_were_run(
    launched: int, drawn: int, reason: str | None, ended: bool
) -> None:
    request = Request((1, 2, 3), SamplingParams(), frozenset())
    sequence = Sequence(request, launched=launched, tokens=list(range(drawn)), finish_reason=reason)
    assert sequence.ended_in_step == ended
