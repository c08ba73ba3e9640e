"""The eleven fault classes: each planted one is found, and the remedied one is clean."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from ostinato.check import ExitCode, Settings, Severity
from ostinato.check.script import check_script
from ostinato.check.session import Progress, check_subject
from ostinato.check.targets import subject_from

FOLDER = Path(__file__).parents[3] / "examples" / "capture_faults"
EXPECTED = {
    "01_wrong_device": {"WRONG_DEVICE"},
    "02_freed_temporary": {"FREED_INPUT"},
    "03_half_width_buffer": {"OUT_RESIZED"},
    "04_buffer_set_to_none": {"FALLBACK"},
    "05_item_in_diagnostic": {"D2H_SYNC"},
    "06_data_dependent_shapes": {"DYNAMIC_SHAPE"},
    "07_python_int_into_buffer": {"H2D_PAGEABLE"},
    "08_allocations_and_copies": {"WRONG_DEVICE", "STEP_ALLOCATION"},
    "09_branch_on_tensor": {"D2H_SYNC"},
    "10_sharing_matched_nothing": {"UNREAD_INPUT"},
    "11_frozen_warmup_value": {"FROZEN_WARMUP"},
}


def run(name, variant):
    path = FOLDER / f"{name}.py"
    if name[:2] in ("01", "02"):
        return check_script(path, [variant], Settings(), Progress())
    spec = importlib.util.spec_from_file_location(f"fault_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return check_subject(lambda: subject_from(getattr(module, variant)("cuda"), name))


def test_all_eleven_are_here():
    assert {p.stem for p in FOLDER.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_planted_fault_is_found(name):
    report = run(name, "planted")
    assert report.exit_code() == ExitCode.FINDINGS
    assert {f.rule.name for f in report.findings if f.severity >= Severity.WARNING} >= EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_remedied_fault_is_gone(name):
    report = run(name, "remedied")
    assert report.exit_code() == ExitCode.CLEAN, [f.message for f in report.findings]
