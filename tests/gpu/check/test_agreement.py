"""The gpu pass against the acceptance suite: it must call the same cases faulty as the pretended device does."""

from __future__ import annotations

import pytest
import torch

from ostinato.check import Subject
from ostinato.check.gpu import check_on_gpu, root_cause
from tests.gpu.check.agreement import compare
from tests.unit.check.cases import CASES

# What a capture on a GPU cannot show: eager has the same fault, or it depends on what the allocator has cached.
UNSEEN_ON_GPU = {"frozen_scale", "empty_cache"}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_gpu_agrees_with_pretend(case):
    if case.name == "other_device" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    row = compare(case)
    if case.name not in UNSEEN_ON_GPU:
        assert row.agrees, f"pretend says {row.pretend}, the GPU {row.gpu}: {row.detail}"


@pytest.mark.gpu
def test_all_waits_are_named_in_one_run():
    def fn(x):
        a = x.sum().item()
        b = (x > 0).nonzero()
        return x * a + b.sum()

    x = torch.linspace(-1, 1, 7, device="cuda")
    report = check_on_gpu(lambda: Subject.of(fn, [(x,), (x * 2,)]))
    assert {f.rule.name for f in report.findings} >= {"D2H_SYNC", "DYNAMIC_SHAPE"}
    assert len({f.where.line for f in report.findings}) == 2


@pytest.mark.gpu
def test_bisection_names_the_operation_and_its_module():
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator(device="cuda")

        def forward(self, x):
            return x + torch.rand(x.shape, device="cuda", generator=self.generator)

    model = torch.nn.Sequential(torch.nn.Linear(5, 5), Noisy()).cuda()
    x = torch.ones(3, 5, device="cuda")
    report = check_on_gpu(lambda: Subject.of(model, [(x,), (x * 2,)]))
    (found,) = [f for f in report.findings if f.severity.label == "error"]
    assert "aten.rand.generator in Sequential.Noisy" in found.message


@pytest.mark.gpu
def test_freed_input_is_found_without_torch_213():
    held = [torch.full((1 << 20,), 3.0, device="cuda")]

    def fn(x):
        weight = held[0]
        if torch.cuda.is_current_stream_capturing():
            held.clear()
            held.append(torch.zeros(1 << 20, device="cuda"))
        return x * weight

    x = torch.ones(1 << 20, device="cuda")
    report = check_on_gpu(lambda: Subject.of(fn, [(x,), (x * 2,)]))
    assert "FREED_INPUT" in {f.rule.name for f in report.findings}


def test_root_cause_is_the_first_exception_of_the_chain():
    first = RuntimeError("operation not permitted when stream is capturing")
    second = RuntimeError("operation failed due to a previous error during capture")
    second.__context__ = first
    assert root_cause(second) is first
