"""Decode steps of tiny ``transformers`` models: the lines that are known to break, or falsify, their captures."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import transformers

from ostinato.check import Settings, Severity
from ostinato.check.hf import check_hf
from ostinato.check.session import Progress
from ostinato.check.static import scan_paths
from ostinato.errors import UsageError
from tests.unit.check import tiny_configs

_MODELS = Path(transformers.__file__).parent / "models"


def lines(report, severity, variant=""):
    return {
        f"{Path(f.where.file).name}:{f.where.line}"
        for f in report.findings
        if f.severity is severity and variant in f.variant
    }


@pytest.fixture
def run(tmp_path):
    def go(config, cache="all", dtype=None, meta=False):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return check_hf(str(tmp_path), Settings(meta=meta), Progress(), cache=cache, dtype=dtype)

    return go


def test_llama_with_a_static_cache_is_clean(run):
    report = run(tiny_configs.LLAMA, "static")
    assert not report.at_least(Severity.HAZARD)
    assert any("replays against eager" in p.detail for p in report.passes)


def test_llama_with_a_dynamic_cache_grows(run):
    report = run(tiny_configs.LLAMA, "dynamic")
    assert not lines(report, Severity.ERROR)
    assert lines(report, Severity.HAZARD) == {
        "cache_utils.py:146", "cache_utils.py:147", "masking_utils.py:510", "masking_utils.py:511"
    }  # fmt: skip


def test_qwen_needs_bfloat16_for_its_experts(run):
    assert lines(run(tiny_configs.QWEN3_5_MOE, "static"), Severity.ERROR) == {"moe.py:332"}
    report = run(tiny_configs.QWEN3_5_MOE, "static", torch.bfloat16)
    assert not report.at_least(Severity.HAZARD)


def test_gemma_reads_a_python_length_and_uploads_when_the_window_is_full(run):
    report = run(tiny_configs.GEMMA4, "static", torch.bfloat16)
    assert lines(report, Severity.ERROR) == {"cache_utils.py:559"}
    assert "window full" in next(f.variant for f in report.findings if f.severity is Severity.ERROR)
    assert "masking_utils.py:510" in lines(report, Severity.HAZARD)


def test_deepseek_uploads_a_zero_and_grows_its_own_caches(run):
    report = run(tiny_configs.DEEPSEEK_V4, "dynamic", torch.bfloat16)
    assert lines(report, Severity.ERROR) == {"masking_utils.py:604"}
    assert lines(report, Severity.HAZARD) >= {
        "masking_utils.py:510", "modeling_deepseek_v4.py:204", "modeling_deepseek_v4.py:225",
        "modeling_deepseek_v4.py:226", "modeling_deepseek_v4.py:673",
    }  # fmt: skip


def test_meta_tells_the_same_lines(run):
    plain = run(tiny_configs.DEEPSEEK_V4, "dynamic", torch.bfloat16)
    meta = run(tiny_configs.DEEPSEEK_V4, "dynamic", torch.bfloat16, meta=True)
    assert lines(meta, Severity.ERROR) == lines(plain, Severity.ERROR)
    assert lines(meta, Severity.HAZARD) <= lines(plain, Severity.HAZARD)


@pytest.mark.parametrize(
    ("config", "text"), [({"model_type": "no_such_model"}, "does not know"), ({}, "model_type None")]
)
def test_configs_that_cannot_be_meant(run, config, text):
    with pytest.raises(UsageError, match=text):
        run(config)


def test_full_size_without_meta_is_refused():
    with pytest.raises(UsageError, match="check it with --meta"):
        check_hf("llama", Settings(), Progress())


def test_no_config():
    with pytest.raises(UsageError, match="no config at"):
        check_hf("/nowhere/at/all", Settings(), Progress())


@pytest.mark.slow
def test_scanning_all_modeling_files():
    files = sorted(_MODELS.glob("*/modeling_*.py"))
    start = time.perf_counter()
    report = scan_paths(files)
    seconds = time.perf_counter() - start
    assert report.num_regions == len(files) > 490
    assert not report.partial
    assert not [f for f in report.findings if f.where.file.endswith("modeling_llama.py")]
    assert 500 < len(report.findings) < 3000
    assert seconds < 60  # 6 s on two quiet cores; this bound only catches a quadratic walk
