"""Trace, tape, coverage, suppressions and the table of operations, each by itself."""

from __future__ import annotations

import pytest
import torch

from ostinato.check import Call, Settings, Severity, Subject, check, check_factory, declare_op
from ostinato.check.op_table import load_table, table_versions
from ostinato.check.pretend import pretence
from ostinato.check.record import Recorder
from ostinato.check.session import check_subject
from ostinato.check.suppress import apply_baseline, read_baseline, write_baseline
from ostinato.check.tape import Tape, compare_with_eager
from ostinato.check.targets import subject_from
from ostinato.check.trace import compare_calls
from ostinato.errors import CheckError, UsageError


def names(report, at_least=Severity.HAZARD):
    return {f.rule.name for f in report.findings if f.severity >= at_least}


def test_pretended_tensors_say_they_are_on_the_device():
    with pretence() as world:
        x = torch.ones(3, 5, device="cuda")
        view = x.T[1:]
        host = torch.ones(3)
        assert view.is_cuda
        assert not host.is_cuda
        assert str(view.device) == "cuda:0"
        assert view.get_device() == 0
        assert host.get_device() == -1
        assert (x + 1).is_cuda
        assert torch.zeros_like(x).is_cuda
        assert x.to("cpu").device.type == "cpu"
        assert torch.nn.Linear(3, 2).to("cuda").weight.is_cuda
        with torch.device("cuda:1"):
            assert torch.zeros(2).device.index == 1
        assert torch.cuda.is_available()
        assert not torch.cuda.is_current_stream_capturing()
        with world.region():
            assert torch.cuda.is_current_stream_capturing()
    assert not world.findings
    assert x.device.type == "cpu"  # nothing of it outlives the pretence


def test_pretence_is_undone_after_an_error():
    before = torch.cuda.is_available, torch.Generator, torch.manual_seed
    with pytest.raises(ZeroDivisionError), pretence():
        raise ZeroDivisionError
    assert (torch.cuda.is_available, torch.Generator, torch.manual_seed) == before


def recorded(world, fn, args, *, keep=False):
    recorder = Recorder(world, args, keep=keep)
    world.call += 1
    world.recorder = recorder
    with world.region():
        result = fn(*args)
    world.recorder = None
    return recorder, result


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_tape_replays_fresh_values_exactly(rows):
    with pretence() as world:
        torch.default_generator.manual_seed(rows)
        weight, state = torch.randn(7, 5, device="cuda"), torch.zeros(rows, 5, device="cuda")

        def fn(x):
            state.mul_(0.5).add_(x @ weight)
            noise = torch.rand(rows, 5, device="cuda")
            return (state + noise).softmax(-1), state[:, 1:]

        arguments = [torch.randn(rows, 7, device="cuda")]
        recorder, result = recorded(world, fn, arguments, keep=True)
        tape = Tape(world, recorder, arguments, result)
        for call in range(3):
            fresh = [torch.randn(rows, 7, device="cuda")]
            before = tape.save()
            torch.default_generator.manual_seed(call)
            _, eager = recorded(world, fn, fresh)
            assert compare_with_eager(tape, eager, before, fresh, call, call) is None


def test_tape_finds_memory_that_is_read_before_it_is_written():
    with pretence() as world:

        def fn(x):
            buffer = torch.empty(4, device="cuda")
            buffer[:2].copy_(x[:2])
            return buffer * 1.0

        arguments = [torch.ones(4, device="cuda")]
        recorder, result = recorded(world, fn, arguments, keep=True)
        tape = Tape(world, recorder, arguments, result)
        tape.replay()
        with world.mute():
            assert tape.outputs[0][:2].tolist() == [1.0, 1.0]
            assert tape.outputs[0][2:].isnan().all()


def test_trace_names_the_inserted_operation():
    with pretence() as world:

        def fn(x, flag):
            if flag:
                x = x.neg()
            return x + 1

        x = torch.ones(3, device="cuda")
        first, _ = recorded(world, lambda x: fn(x, False), [x])
        second, _ = recorded(world, lambda x: fn(x, True), [x])
        (difference,) = compare_calls(first, second)
        assert difference.rule == "CONTROL_FLOW"
        assert difference.op == "aten.neg.default"


def test_trace_reports_roots_only():
    with pretence() as world:

        def fn(x, n):
            y = x[:n]
            return (y * 2 + 1).sum()

        x = torch.ones(5, device="cuda")
        first, _ = recorded(world, lambda x: fn(x, 2), [x])
        second, _ = recorded(world, lambda x: fn(x, 3), [x])
        assert len(compare_calls(first, second)) == 1


def test_differences_that_follow_from_a_host_read_are_held_back():
    def fn(x):
        return x * x.sum().item()

    report = check_factory(lambda dev: (fn, [(torch.ones(3, device=dev) * i,) for i in range(3)]), gpu=False)
    assert names(report) == {"D2H_SYNC"}
    assert any("may follow from the capture errors" in note for note in report.notes)


def test_differences_beside_an_upload_are_reported():
    state = {"n": 0}

    def fn(x):
        state["n"] += 1
        return x * torch.tensor([2.0], device="cuda") + state["n"]

    report = check_factory(lambda dev: (fn, [(torch.ones(3, device=dev),)]), gpu=False)
    assert names(report) == {"H2D_PAGEABLE", "BAKED_SCALAR"}


def test_check_takes_objects_made_on_the_cpu_to_the_device():
    model = torch.nn.Linear(5, 3)
    calls = [(torch.randn(2, 5),), (torch.randn(2, 5),)]
    report = check(model, calls=calls)
    assert report.exit_code() == 0
    assert any("taken to be on the device" in note for note in report.notes)
    assert names(check(lambda x: model(x).sum().item(), calls=calls)) == {"D2H_SYNC"}


def test_check_refuses_what_it_cannot_mean():
    with pytest.raises(UsageError, match="no argument sets"):
        check(lambda: None, calls=[])
    with pytest.raises(UsageError, match="cannot be called"):
        Subject.of(3, [()])
    with pytest.raises(CheckError, match="building what should be checked failed: KeyError"):
        check_factory(lambda dev: {}["missing"], gpu=False)


def test_keyword_calls_and_mappings():
    report = check(
        lambda x, y=None: x + y,
        calls=[{"x": torch.ones(2), "y": torch.ones(2)}, Call((torch.ones(2),), {"y": torch.ones(2)})],
    )
    assert report.exit_code() == 0


def test_report_never_says_safe_and_names_branches_not_reached():
    def fn(x, flag):
        if flag:
            return x.nonzero()
        return x + 1

    report = check_factory(lambda dev: (fn, [(torch.ones(2, device=dev), False)]), gpu=False)
    assert report.exit_code() == 0
    assert "branches not reached" in report.summary()
    assert "safe" not in report.summary()
    (found,) = [f for f in report.findings if f.severity is Severity.WARNING]
    assert found.rule.name == "DYNAMIC_SHAPE"
    assert found.certainty == "suspect"


def test_error_in_the_region_is_a_finding_and_partial():
    def fn(x):
        raise ValueError("odd")

    report = check_factory(lambda dev: (fn, [(torch.ones(2, device=dev),)]), gpu=False)
    assert names(report) == {"RAISED"}
    assert report.exit_code() == 3


def test_first_call_only_is_a_warning():
    cache = {}

    def fn(x):
        if not cache:
            cache["n"] = x.sum().item()
        return x + 1

    report = check_factory(lambda dev: (fn, [(torch.ones(2, device=dev),)]), gpu=False)
    assert names(report) == set()
    assert names(report, Severity.WARNING) == {"D2H_SYNC"}


def test_custom_ops_are_opaque_until_declared():
    @torch.library.custom_op("ostinato_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @twice.register_fake
    def _(x):
        return torch.empty_like(x)

    def make(dev):
        return torch.ops.ostinato_tests.twice, [(torch.ones(3, device=dev),)]

    report = check_factory(make, gpu=False)
    assert report.opaque_ops == {"ostinato_tests.twice.default": 4}
    assert report.exit_code() == 0
    declare_op("ostinato_tests::twice", "device")
    assert not check_factory(make, gpu=False).opaque_ops
    declare_op("ostinato_tests::twice", "sync")
    assert names(check_factory(make, gpu=False)) == {"D2H_SYNC"}
    with pytest.raises(UsageError, match="use 'device'"):
        declare_op("ostinato_tests::twice", "fine")


def test_suppressions(tmp_path):
    source = tmp_path / "step.py"
    source.write_text(
        "def step(x):\n"
        "    x.sum().item()  # graph: ok[CG101] a test reads it\n"
        "    y = x.nonzero()  # graph: ok[D2H_SYNC] wrong rule\n"
        "    return y\n"
    )
    space = {}
    exec(compile(source.read_text(), str(source), "exec"), space)
    report = check_factory(lambda dev: (space["step"], [(torch.ones(3, device=dev),)]), gpu=False)
    by_rule = {f.rule.name: f for f in report.findings}
    assert by_rule["D2H_SYNC"].suppressed == "a test reads it"
    assert by_rule["DYNAMIC_SHAPE"].suppressed is None
    assert by_rule["UNUSED_SUPPRESSION"].where.line == 3


def test_baseline_round_trip(tmp_path):
    def fn(x):
        return x.nonzero()

    report = check_factory(lambda dev: (fn, [(torch.ones(3, device=dev),)]), gpu=False)
    file = tmp_path / "baseline.json"
    assert write_baseline(file, report.findings) == 1
    assert all(f.suppressed for f in apply_baseline(report.findings, read_baseline(file)))
    file.write_text("{}")
    with pytest.raises(UsageError, match="is no baseline"):
        read_baseline(file)


def test_tables_exist_for_every_supported_torch():
    assert table_versions() == ("2.11", "2.12", "2.13")
    assert "aten.cholesky_solve.default" in load_table("2.11").effects
    assert "aten.cholesky_solve.default" not in load_table("2.13").effects
    assert "no op table" in load_table("2.14").note
    with pytest.raises(UsageError, match=r"major\.minor"):
        load_table("newest")


def test_meta_needs_no_memory_for_a_large_model():
    def make(dev):
        weight = torch.empty(1 << 20, 1 << 16, device=dev)  # 256 GiB
        return (lambda x: (x @ weight.T).argmax(-1)), [(torch.randn(1, 1 << 16, device=dev),)]

    report = check_subject(lambda: subject_from(make("cuda"), "large"), Settings(meta=True))
    assert report.exit_code() == 0
    assert report.num_regions == 4
