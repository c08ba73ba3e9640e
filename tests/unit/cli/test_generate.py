"""``ostinato generate`` as a whole, on a tiny random model."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from ostinato.cli.main import execute
from ostinato.text import ChatTemplate, Tokenizer
from tests.tiny_model import CHATML, CONTEXT
from tests.unit.text.vocabularies import byte_level

Capture = pytest.CaptureFixture[str]
ON_CPU = ["--device", "cpu"]


def _json(capsys: Capture, *arguments: str) -> dict[str, Any]:
    assert execute(["generate", *arguments, "--json", *ON_CPU]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_streams_text_and_ends_with_a_line_of_figures(tiny: str, capsys: Capture) -> None:
    assert execute(["generate", tiny, "the step", "--max-tokens", "6", *ON_CPU]) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith("\n")
    for part in ("prompt 21 tokens", "tokens/s", "ms/token", "iB", "nothing captured (cpu, eager)"):
        assert part in shown.err


def test_json(tiny: str, capsys: Capture) -> None:
    answer = _json(capsys, tiny, "the step", "--temperature", "0", "--max-tokens", "6")
    tokenizer = Tokenizer.from_gguf(byte_level("smollm"))
    prompt = ChatTemplate(CHATML).render([{"role": "user", "content": "the step"}])
    assert answer["prompt_token_ids"] == tokenizer.encode(prompt)
    assert answer["text"] == tokenizer.decode(answer["token_ids"], skip_special=True)
    assert answer["finish_reason"] in ("stop", "length")
    assert len(answer["logprobs"]) == len(answer["token_ids"]) == answer["timings"]["new_tokens"] <= 6
    assert answer["model"] == "Tiny"


def test_raw_prompts_and_seeds(tiny_without_template: str, capsys: Capture) -> None:
    raw = [tiny_without_template, "the step runs", "--raw", "--max-tokens", "8", "--temperature", "1.5"]
    first = _json(capsys, *raw, "--seed", "3")
    assert first["prompt_token_ids"] == Tokenizer.from_gguf(byte_level("smollm")).encode("the step runs")
    assert _json(capsys, *raw, "--seed", "3")["token_ids"] == first["token_ids"]
    assert _json(capsys, *raw, "--seed", "4")["token_ids"] != first["token_ids"]


def test_stop_strings_end_the_answer(tiny: str, capsys: Capture) -> None:
    raw = [tiny, "the step", "--raw", "--temperature", "0", "--max-tokens", "24"]
    whole = _json(capsys, *raw)["text"]
    stop = whole[3:5]
    assert stop
    cut = _json(capsys, *raw, "--stop", stop, "--stop", "never comes")
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == whole[: whole.index(stop)]


def test_prompts_from_standard_input(tiny: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    direct = _json(capsys, tiny, "the step", "--max-tokens", "1")
    monkeypatch.setattr("sys.stdin", io.StringIO("the step"))
    assert _json(capsys, tiny, "-", "--max-tokens", "1")["prompt_token_ids"] == direct["prompt_token_ids"]


def test_system_message(tiny: str, capsys: Capture) -> None:
    ids = _json(capsys, tiny, "hi", "--system", "Be kind.", "--max-tokens", "1")["prompt_token_ids"]
    assert Tokenizer.from_gguf(byte_level("smollm")).decode(ids).startswith("<|im_start|>system\nBe kind.<|im_end|>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tiny}", "hi", "--top-p", "2"], "top_p must be"),
        (["{tiny}", "hi", "--max-tokens", "0"], "max_tokens must be"),
        (["{tiny}", "hi", "--stop", ""], "must not be empty"),
        (["{tiny}", "hi", "--raw", "--system", "x"], "--system needs the chat template"),
        (["{tiny}", "hi", "--context", str(CONTEXT + 1)], f"{CONTEXT} positions"),
        (["{tiny}", "one two three " * CONTEXT], "the prompt has"),
        (["{tiny}", "hi", "--dtype", "int3"], "--dtype int3"),
        (["{tiny}", "hi", "--device", "abacus"], "abacus"),
        (["{tiny}", "hi", "--threads", "0"], "--threads 0"),
        (["{tiny}", " "], "the prompt is empty"),
        (["{tiny}"], "is a model; give the prompt after it"),
        (["{plain}", "hi"], "--raw"),
        (["a", "b", "c"], "got 3 arguments"),
        (["/no/such/file.gguf", "hi"], "no such file"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tiny: str, tiny_without_template: str, capsys: Capture
) -> None:
    given = [argument.format(tiny=tiny, plain=tiny_without_template) for argument in arguments]
    assert execute(["generate", *([] if "--device" in given else ON_CPU), *given]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err


def test_no_prompt_at_all(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", terminal)
    assert execute(["generate"]) == 2
    assert "no prompt; give one" in capsys.readouterr().err
