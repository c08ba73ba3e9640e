"""``ostinato chat``: turns from a pipe on a tiny model, and Ctrl-C on one that only pretends."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ostinato.cli.chat import Chat
from ostinato.cli.main import execute
from ostinato.errors import ContextLengthError
from ostinato.sampling.params import SamplingParams
from ostinato.text import ChatTemplate, Tokenizer
from tests.tiny_model import CHATML
from tests.unit.text.vocabularies import byte_level

Capture = pytest.CaptureFixture[str]


def _talk(monkeypatch: pytest.MonkeyPatch, model: str, *lines: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return execute(["chat", model, "--device", "cpu", "--temperature", "0", "--max-tokens", "5"])


def test_later_turns_read_only_what_is_new(tiny: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _talk(monkeypatch, tiny, "the step runs again and again", "/stats", "and then?", "/stats") == 0
    first, second = capsys.readouterr().err.strip().splitlines()
    assert "kept" not in first
    prompt = int(first.split()[1])
    # all of the first prompt stands, and of the answer all but the last token, which was drawn but never run
    kept = int(second.split("(")[1].split()[0])
    assert prompt <= kept <= prompt + 5


def test_commands(tiny: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _talk(monkeypatch, tiny, "/stats", "/help", "/system Be brief.", "/reset", "", "/exit", "/nothing") == 0
    shown = capsys.readouterr().err
    assert shown.startswith("no answer yet\n/reset ")
    assert shown.count("\nnew conversation\n") + shown.count("new conversation\nnew") == 2
    assert "error" not in shown


@pytest.mark.parametrize(("line", "message"), [("/nope", "/help lists them"), ("/system ", "needs a text")])
def test_a_mistake_in_a_pipe_ends_it(
    line: str, message: str, tiny: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _talk(monkeypatch, tiny, line, "hello") == 2
    assert message in capsys.readouterr().err


def test_without_a_template(tiny_without_template: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _talk(monkeypatch, tiny_without_template, "hello") == 2
    assert "no chat template" in capsys.readouterr().err


class _PretendedLLM:
    """Answers word by word; ``interrupt_after`` words somebody presses Ctrl-C."""

    def __init__(self, words: list[str], interrupt_after: int | None = None) -> None:
        self.tokenizer = Tokenizer.from_gguf(byte_level("smollm"))
        self.template = ChatTemplate(CHATML)
        self.info = SimpleNamespace(title="Pretended", label="pretended")
        self.prompts: list[list[int]] = []
        self.closed = 0
        self._words, self._interrupt_after = words, interrupt_after

    def session(self) -> Any:
        return SimpleNamespace(reset=lambda: None)

    def stream(self, prompt: list[int], params: SamplingParams, *, session: Any) -> Iterator[Any]:
        self.prompts.append(prompt)
        if len(prompt) > 100:
            raise ContextLengthError("the prompt is too long")
        try:
            for at, word in enumerate(self._words):
                yield SimpleNamespace(text=word, token_ids=tuple(self.tokenizer.encode(word)), finish_reason=None)
                if at + 1 == self._interrupt_after:
                    signal.raise_signal(signal.SIGINT)
        finally:
            self.closed += 1


def _chat(llm: _PretendedLLM, monkeypatch: pytest.MonkeyPatch, *lines: str | BaseException) -> None:
    """Run a conversation with a person who types ``lines``; an exception among them is raised at the prompt."""
    coming = iter(lines)

    def type_line(mark: str) -> str:
        line = next(coming, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", type_line)
    Chat(llm, SamplingParams(), None, interactive=True).run()  # type: ignore[arg-type]


def test_ctrl_c_stops_the_answer_and_not_the_program(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = _PretendedLLM(["one", " two", " three"], interrupt_after=1)
    before = signal.getsignal(signal.SIGINT)
    _chat(llm, monkeypatch, "first", KeyboardInterrupt(), "second")
    shown = capsys.readouterr()
    assert shown.out == "one two\none two\n"  # the token that was under way is still shown
    assert shown.err.count("stopped\n") == 2
    assert llm.closed == 2
    assert "one two<|im_end|>" in llm.tokenizer.decode(llm.prompts[1])
    assert signal.getsignal(signal.SIGINT) is before


def test_a_turn_that_fails_is_forgotten(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = _PretendedLLM(["fine"])
    _chat(llm, monkeypatch, "long " * 200, "short", "a line\\", "that goes on", "/nope", "/exit")
    shown = capsys.readouterr()
    assert "error: the prompt is too long\n" in shown.err
    assert "error: no command /nope" in shown.err
    assert shown.out == "fine\nfine\n"
    assert "long" not in llm.tokenizer.decode(llm.prompts[1])
    assert "user\na line\nthat goes on<|im_end|>" in llm.tokenizer.decode(llm.prompts[2])
