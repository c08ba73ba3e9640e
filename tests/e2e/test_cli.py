"""The program as it is run: its own process, pipes, a terminal, Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ostinato.load.gguf_writer import write_gguf
from tests.tiny_model import write_tiny_model

PROGRAM = [sys.executable, "-m", "ostinato.cli.main"]
PATIENCE_S = 180


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf"))


def test_an_answer_through_pipes(tiny: str) -> None:
    run = subprocess.run(
        [*PROGRAM, "generate", tiny, "-", "--max-tokens", "4", "--device", "cpu", "--json"],
        input="the step",
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    assert json.loads(run.stdout)["timings"]["new_tokens"] <= 4
    assert run.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "/no/such/model.gguf", "hi"], "no such file or directory"),
        (["generate", "{tiny}", "hi", "--top-p", "2"], "top_p"),
        (["generate", "{cut}", "hi"], "cut.gguf"),
        (["generate", "{magic}", "hi"], "is not a GGUF file"),
        (["generate", "{foreign}", "hi"], "architecture 'rwkv9' is not implemented"),
        (["generate", "{unknown}", "hi"], "tensor 'token_embd.weight' has type IQ2_XXS"),
        (["generate", "{shard}", "hi"], "lacks part-00002-of-00002.gguf"),
        (["generate", "{tiny}", "word " * 300, "--context", "20"], "the context 20"),
        (["bench", "{tiny}", "--context", "32", "--batch", "100000000"], "use a smaller batch"),
    ],
)
def test_bad_input_is_one_line_and_code_2(tiny: str, tmp_path: Path, arguments: list[str], message: str) -> None:
    cut, magic = tmp_path / "cut.gguf", tmp_path / "magic.gguf"
    cut.write_bytes(Path(tiny).read_bytes()[:-5000])
    magic.write_bytes(b"FUGG" + Path(tiny).read_bytes()[4:])
    foreign, unknown, shard = (tmp_path / f"{name}.gguf" for name in ("foreign", "unknown", "part-00001-of-00002"))
    write_gguf(foreign, {"general.architecture": "rwkv9"}, {"a.weight": torch.zeros(4, 4)})
    data = Path(tiny).read_bytes()
    name = b"token_embd.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # behind the name: number of dimensions, two of them, then the type
    unknown.write_bytes(data[:at] + (16).to_bytes(4, "little") + data[at + 4 :])
    shard.write_bytes(data)
    paths = {"cut": cut, "magic": magic, "foreign": foreign, "unknown": unknown, "shard": shard}
    given = [argument.format(tiny=tiny, **paths) for argument in arguments]
    run = subprocess.run([*PROGRAM, *given], capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert message in run.stderr


def test_ctrl_c_ends_generate_quietly(tiny: str) -> None:
    command = [*PROGRAM, "generate", tiny, "-", "--device", "cpu", "--threads", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b"word " * 100_000)  # more than a pipe holds: afterwards the program has begun to read
        process.stdin.flush()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert (out, err) == (b"", b"")


class _Terminal:
    """A program on a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self._screen, inner = pty.openpty()
        self.process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, start_new_session=True)
        os.close(inner)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def wait_for(self, text: str) -> None:
        """Read until ``text`` has come, and forget what was before it."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} has not come: {self.shown!r}"
            self._read()
        self.shown = self.shown.split(text, 1)[1]

    def wait_for_more(self) -> None:
        """Read until anything has come."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.shown and time.monotonic() < deadline:
            self._read()

    def _read(self) -> None:
        if select.select([self._screen], [], [], 0.1)[0]:
            try:
                self.shown += os.read(self._screen, 4096).decode(errors="replace")
            except OSError:  # Linux says so when the program has left its terminal
                pytest.fail(f"the program has ended: {self.shown!r}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=PATIENCE_S)
        os.close(self._screen)


@pytest.fixture
def chat(tiny: str) -> Iterator[_Terminal]:
    terminal = _Terminal(
        [*PROGRAM, "chat", tiny, "--device", "cpu", "--threads", "1", "--max-tokens", "150", "--temperature", "5"]
    )
    yield terminal
    terminal.close()


def test_a_conversation_on_a_terminal(chat: _Terminal) -> None:
    chat.wait_for("/help lists the commands")
    chat.wait_for("> ")
    chat.type("the step\n")
    chat.wait_for("\n")
    chat.wait_for_more()
    chat.process.send_signal(signal.SIGINT)  # stops the answer; at the prompt, if it has ended already, nothing
    time.sleep(0.5)  # a line that is typed in the moment of Ctrl-C is thrown away with it
    chat.type("\n/stats\n")
    chat.wait_for("tokens/s")
    chat.type("/reset\n")
    chat.wait_for("new conversation")
    chat.wait_for("> ")
    time.sleep(0.5)  # between its prompt and its read, Python's input() keeps a Ctrl-C until the next line
    chat.process.send_signal(signal.SIGINT)  # at the prompt it ends nothing
    chat.wait_for("> ")
    chat.type("/exit\n")
    assert chat.process.wait(timeout=PATIENCE_S) == 0
