"""Slots on a device: what is published, what is lost when nobody reads, what idle rows may do."""

from __future__ import annotations

import pytest
import torch

from ostinato.engine import runner as runner_module
from ostinato.engine.runner import Runner
from ostinato.errors import CaptureError, OstinatoError, SamplingError
from ostinato.kernels.sample.buffers import RING_STEPS
from ostinato.sampling import SamplingParams
from tests.unit.engine.machine import CONTEXT, PAGE, make_runner
from tests.unit.models.tiny import random_ids

GREEDY = SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True)


def begin(runner: Runner, slot: int, prompt: list[int], remaining: int = 1000) -> int:
    runner.admit(slot, GREEDY, prompt, (), runner.kv.context)
    runner.prefill(slot, prompt, 0, draw=True, remaining=remaining)
    token = runner.wait(slot).token
    assert token is not None
    return token


def test_steps_that_nobody_read_are_an_error_not_other_tokens() -> None:
    runner = make_runner(2, context=2 * RING_STEPS)
    begin(runner, 0, [1, 2, 3])
    for _ in range(RING_STEPS):
        runner.launch(1)
    assert runner.poll(0) is not None  # the oldest that the ring still has
    runner.launch(1)
    runner.launch(1)
    with pytest.raises(SamplingError, match="was overwritten by step"):
        runner.poll(0)


def test_a_device_that_answers_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "_HANG_SECONDS", 0.02)
    runner = make_runner(1)
    begin(runner, 0, [1])
    with pytest.raises(OstinatoError, match="answered nothing"):
        runner.wait(0)


def test_only_active_rows_publish_a_token() -> None:
    runner = make_runner(4)
    begin(runner, 2, [5, 6], remaining=3)
    for _ in range(4):
        runner.launch(3)  # a bucket of 4
    assert [runner.in_flight(slot) for slot in range(4)] == [4] * 4
    for slot in (0, 1, 3):
        assert [runner.poll(slot).token for _ in range(4)] == [None] * 4  # type: ignore[union-attr]  # all are there
        assert runner.poll(slot) is None
    drawn = [runner.poll(2).token for _ in range(4)]  # type: ignore[union-attr]
    assert None not in drawn[:2]
    assert drawn[2:] == [None, None]  # three tokens were allowed, the prompt's own sample among them


def test_idle_rows_write_to_the_dummy_page_alone() -> None:
    runner = make_runner(3)
    begin(runner, 0, random_ids(5))
    runner.admit(1, GREEDY, random_ids(20), (), CONTEXT)
    before = [(layer.k.clone(), layer.v.clone()) for layer in runner.kv.layers]
    runner.release(0)
    for _ in range(3):
        runner.launch(3)
    own = runner.kv.page_table[1, 0]
    for layer, (k, v) in zip(runner.kv.layers, before, strict=True):
        for now, then in ((layer.k, k), (layer.v, v)):
            changed = [
                page
                for page in range(1, len(now))
                if not torch.equal(now[page].nan_to_num(7), then[page].nan_to_num(7))
            ]
            # The row that waits for its prompt may write where the prompt's first token will stand, and nowhere else.
            assert changed in ([], [int(own)])
            assert torch.equal(now[own, :, 1:].nan_to_num(7), then[own, :, 1:].nan_to_num(7))


def test_idle_rows_stay_within_what_is_prefilled_next() -> None:
    runner = make_runner(2)
    prompt = random_ids(30)
    runner.admit(1, GREEDY, prompt, (), CONTEXT)
    for stop in (7, 19):
        runner.prefill(1, prompt[:stop], 0, draw=False, remaining=0)
        stands = _kept(runner, 1, stop)
        runner.launch(2)
        assert all(torch.equal(a, b) for a, b in zip(_kept(runner, 1, stop), stands, strict=True))


def _kept(runner: Runner, slot: int, tokens: int) -> list[torch.Tensor]:
    """Keys and values of the first ``tokens`` positions of ``slot``."""
    pages = runner.kv.page_table[slot, : -(-tokens // PAGE)].long()
    return [
        t[pages].transpose(0, 1).flatten(1, 2)[:, :tokens].clone()
        for layer in runner.kv.layers
        for t in (layer.k, layer.v)
    ]


def test_teacher_forcing_gives_the_logits_that_decode_saw() -> None:
    runner = make_runner(2)
    prompt = random_ids(11)
    text = [*prompt, begin(runner, 0, prompt)]
    for _ in range(10):
        runner.launch(1)
        text.append(runner.wait(0).token or 0)
    runner.admit(1, GREEDY, text, (), CONTEXT)
    logits = runner.logits(1, text[:-1], 0)
    assert logits.argmax(-1)[len(prompt) - 1 :].tolist() == text[len(prompt) :]


def test_a_closed_runner_says_so() -> None:
    runner = make_runner(1)
    begin(runner, 0, [1])
    runner.close()
    runner.close()
    with pytest.raises(CaptureError, match="closed"):
        runner.launch(1)
    assert runner.describe() == []
