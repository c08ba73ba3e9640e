"""``ostinato models``, ``ostinato inspect``, and how sizes are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ostinato.cli.main import execute
from ostinato.cli.options import count, size
from ostinato.cli.table import table
from ostinato.config import Settings
from ostinato.load.known import DEFAULT_MODEL, KNOWN_MODELS
from tests.tiny_model import CONTEXT
from tests.unit.models.tiny_qwen3_5 import SPECS, reference

Capture = pytest.CaptureFixture[str]


def test_models(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ostinato.cli.models.settings", lambda: Settings(tmp_path, offline=True))
    assert execute(["models"]) == 0
    shown = capsys.readouterr().out
    for name, model in KNOWN_MODELS.items():
        line = next(line for line in shown.splitlines() if line.startswith(f"{name} "))
        assert model.licence in line
    line = next(line for line in shown.splitlines() if line.startswith(DEFAULT_MODEL))
    assert "93.8 MiB" in line
    assert "  no  " in line


def test_inspect(tiny: str, capsys: Capture) -> None:
    assert execute(["inspect", tiny, "--context", "100"]) == 0
    shown = capsys.readouterr().out
    assert "llama, GGUF v3" in shown
    assert f"2 layers, made for a context of {CONTEXT}" in shown
    assert "0–1" in shown  # both layers are alike, so they share a line
    # 2 layers × key and value × 2 heads × 16 × 2 bytes × 100 tokens
    assert f"KV in bf16 {size(2 * 2 * 2 * 16 * 2 * 100)}" in shown


def test_inspect_as_json(tiny: str, capsys: Capture) -> None:
    assert execute(["inspect", tiny, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["context"] == CONTEXT
    assert found["memory"]["kv_bytes"] == 2 * 2 * 2 * 16 * 2 * CONTEXT
    assert found["num_bytes"] == sum(layer["num_bytes"] for layer in found["layers"])
    assert found["not_implemented"] is None


def test_inspect_a_model_with_recurrent_layers(tmp_path: Path, capsys: Capture) -> None:
    directory = tmp_path / "model"
    reference(SPECS[0]).save_pretrained(directory)
    assert execute(["inspect", str(directory), "--context", "100"]) == 0
    shown = capsys.readouterr().out
    assert "qwen3_5_moe_text, safetensors" in shown
    # One layer of attention: key and value × 2 heads × 32 × 2 bytes × 100 tokens. Two delta nets: a convolution over 4
    # tokens of 128 channels, 4 heads of 16 × 16 and their last two changes of 16 + 16 + 1, 4 bytes each.
    assert (
        f"KV in bf16 {size(2 * 2 * 32 * 2 * 100)} + recurrent state {size(2 * 4 * (4 * 128 + 4 * 256 + 2 * 4 * 33))} = "
        in shown
    )


def test_inspect_mistakes(tiny: str, capsys: Capture, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(Path(tiny).read_bytes()[:1000])
    for arguments, message in (
        ([tiny, "--context", "0"], "at least 1"),
        ([str(broken)], "broken.gguf"),
        ([str(tmp_path)], "broken.gguf"),
    ):
        assert execute(["inspect", *arguments]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        assert message in shown


def test_sizes() -> None:
    assert [size(n) for n in (0, 1023, 1536, 98_362_432, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "93.8 MiB",
        "3.0 TiB",
    ]
    assert [count(n) for n in (999, 1500, 134_515_008, 7 * 10**9)] == ["999", "1.5K", "134.5M", "7.0B"]


def test_tables() -> None:
    assert table(["a", "bb"], [["long", "1"], ["x", "20"]], right=(1,)) == "a     bb\n────  ──\nlong   1\nx     20"
