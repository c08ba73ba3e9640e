"""Ostinato's own step, checked by its own checker: the whole of forward, sampling and the advance of the state."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from ostinato.check import Severity, check, to_text
from ostinato.engine.step import decode_step
from ostinato.models.interface import Model
from ostinato.sampling import SamplingParams
from tests.unit.engine.machine import make_runner, tiny_model
from tests.unit.models.tiny import build, save_hf
from tests.unit.models.tiny_qwen3_5 import SPECS, reference


@cache
def recurrent_model() -> Model:
    """Delta net, gated attention and experts."""
    with TemporaryDirectory() as directory:
        return build(save_hf(reference(SPECS[0]), Path(directory)))


@pytest.mark.parametrize("model", [tiny_model, recurrent_model], ids=["attention", "delta net and experts"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_decode_step_can_be_captured_and_replays_exactly(temperature, model):
    runner = make_runner(3, model=model())
    params = SamplingParams(temperature=temperature, max_tokens=30, ignore_eos=True, top_k=5, seed=7)
    for slot, prompt in enumerate(([1, 2, 3], [4, 5])):
        runner.admit(slot, params, prompt, (), 40)
        runner.prefill(slot, prompt, 0, draw=True, remaining=30)

    def step():
        decode_step(runner.model, runner.kv, runner.sampler, runner.buffers, 3)
        return runner.buffers.tokens

    report = check(step, calls=[()] * 6)
    assert not report.at_least(Severity.HAZARD), to_text(report)
    assert report.num_ops > 100
    assert any(p.name == "tape" and p.detail == "4 replays against eager" for p in report.passes)
