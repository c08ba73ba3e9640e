"""``ostinato bench`` on a tiny model, and its chart."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato.cli import bench
from ostinato.cli.main import execute
from ostinato.cli.plot import Line, line_chart, y_ticks
from ostinato.engine.measure import DecodePoint, Spread
from tests.tiny_model import CONTEXT

Capture = pytest.CaptureFixture[str]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def _short_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one reads a quarter of a GiB eleven times."""
    monkeypatch.setattr(bench, "read_bandwidth", lambda device: 1e10)


def test_table_json_and_plot(tiny: str, capsys: Capture, tmp_path: Path) -> None:
    json_file, plot = tmp_path / "figures.json", tmp_path / "speed.svg"
    arguments = [tiny, "--context", "32,16", "--batch", "2,1", "--new", "4", "--repeats", "2", "--device", "cpu"]
    assert execute(["bench", *arguments, "--json", str(json_file), "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    assert "10.0 GB/s" in shown
    figures = json.loads(json_file.read_text())
    assert [(p["context"], p["batch"]) for p in figures["decode"]] == [(16, 1), (16, 2), (32, 1), (32, 2)]
    assert [p["tokens"] for p in figures["prefill"]] == [16, 32]
    for point in figures["decode"]:
        spread = point["tokens_per_s"]
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        assert point["bytes_per_token"] == point["bytes_per_step"] / point["batch"]
        assert f"{spread['median']:,.1f}" in shown
        steps_per_s = spread["median"] / point["batch"]
        assert point["bandwidth_fraction"] == pytest.approx(point["bytes_per_step"] * steps_per_s / 1e10)
    drawing = ET.fromstring(plot.read_text())
    assert len(drawing.findall(f"{SVG}polyline")) == 2  # one for each batch


@pytest.mark.parametrize(("prompts", "found"), [("0", []), ("8,24", [8, 24])])
def test_prompts_have_lengths_of_their_own(
    prompts: str, found: list[int], tiny: str, capsys: Capture, tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    arguments = [tiny, "--context", "16", "--new", "2", "--repeats", "1", "--device", "cpu", "--prompt", prompts]
    assert execute(["bench", *arguments, "--json", str(file)]) == 0
    assert [p["tokens"] for p in json.loads(file.read_text())["prefill"]] == found
    assert ("first token" in capsys.readouterr().out) == bool(found)


def test_graph_against_eager() -> None:
    def point(graph: bool, rate: float) -> DecodePoint:
        return DecodePoint(512, 1, graph, Spread(rate, rate, rate), 1e3 / rate, 100, 0.5, 1 << 30)

    result = bench.Result("m.gguf", "GPU", "2", "0", None, 1e12, 100, 1.0, (point(True, 300.0), point(False, 75.0)), ())
    text = bench._as_text(result)
    assert "context 512, batch 1: the graph is 4.00 times as fast as eager" in text
    assert "1.0 GiB" in text
    lines = ET.fromstring(bench._as_chart(result)).findall(f"{SVG}polyline")
    assert ["stroke-dasharray" in line.attrib for line in lines] == [False, True]
    assert bench._as_json(dataclasses.replace(result, decode=()))["decode"] == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--state", "int3"], "--state int3 is not known; use float32, bfloat16"),
        (["--context", "12,x"], "--context takes whole numbers"),
        (["--batch", "0"], "--batch takes numbers of at least 1"),
        (["--random", "qwen3-8b"], "either MODEL or --random"),
        (["--new", "1"], "--new must be"),
        (["--repeats", "0"], "--repeats must be"),
        (["--threads", "0"], "--threads must be"),
        (["--plot", "speed.png"], "ends in .svg"),
        (["--context", str(CONTEXT)], f"{CONTEXT} positions"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tiny: str, capsys: Capture) -> None:
    assert execute(["bench", tiny, "--device", "cpu", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert message in shown.err


def test_an_unknown_shape(capsys: Capture) -> None:
    assert execute(["bench", "--random", "gpt-17", "--device", "cpu"]) == 2
    assert "--random gpt-17 is not known" in capsys.readouterr().err


@given(st.floats(1e-3, 1e9))
def test_ticks_are_few_round_and_reach_the_top(highest: float) -> None:
    ticks = y_ticks(highest)
    assert ticks[0] == 0
    assert ticks[-1] >= highest * (1 - 1e-9)
    assert ticks[-2] < highest
    assert 3 <= len(ticks) <= 7


def test_places_in_the_chart() -> None:
    line = Line("a < b", (1.0, 10.0, 100.0), (5.0, 10.0, 0.0), (4.0, 10.0, 0.0), (6.0, 10.0, 0.0))
    drawing = ET.fromstring(line_chart("t & t", "x", "y", [line]))
    points = drawing.find(f"{SVG}polyline").attrib["points"].split()  # type: ignore[union-attr]
    xs, ys = zip(*(map(float, point.split(",")) for point in points), strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1])  # decades are equally far apart
    assert ys[0] - ys[1] == pytest.approx(ys[2] - ys[0])  # 5 is in the middle of 0 and 10
    assert "a < b" in [text.text for text in drawing.iter(f"{SVG}text")]
    assert line_chart("one", "x", "y", [Line("l", (512.0,), (1.0,), (1.0,), (1.0,))])  # a single point
