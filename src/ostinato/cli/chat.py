"""``ostinato chat [MODEL]``: several turns, of which only what is new is read by the model."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Annotated

import typer

from ostinato.cli import options
from ostinato.cli.conversation import Conversation
from ostinato.cli.options import progress
from ostinato.cli.summary import model_name, summary_line
from ostinato.errors import OstinatoError, UsageError
from ostinato.llm import LLM, Session
from ostinato.sampling.params import SamplingParams
from ostinato.text import ChatTemplate

HELP = """\
/reset        begin a new conversation
/system TEXT  begin a new conversation with this system message
/stats        speed and memory of the last answer
/help         this list
/exit         leave (also Ctrl-D)
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="chat", help="Talk with a model in several turns.")(chat)


def chat(
    model: Annotated[str | None, typer.Argument(help="[default: the small default model]")] = None,
    temperature: options.Temperature = 0.8,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    seed: options.Seed = None,
    max_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 1024,
    stop: options.Stop = None,
    system: options.System = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    quant: options.Quant = None,
    kv: options.KV = "auto",
    state: options.State = "float32",
    context: options.Context = None,
    threads: options.Threads = None,
    graphs: options.Graphs = True,
) -> None:
    """Talk with MODEL (a file, a directory, a hub id or a known name; default: a small one)."""
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
    )
    llm = LLM.load(
        model,
        device=device,
        dtype=dtype,
        quant=quant,
        kv=kv,
        state=state,
        context=context,
        progress=progress(),
        threads=threads,
        graphs=graphs,
    )
    try:
        Chat(llm, params, system, interactive=sys.stdin.isatty()).run()
    finally:
        llm.close()


@dataclass
class _Interrupt:
    """Has Ctrl-C been pressed while an answer came?"""

    pressed: bool = False


@contextmanager
def _ctrl_c_stops_the_answer() -> Iterator[_Interrupt]:
    """Ctrl-C sets a mark instead of breaking off a step in its middle; pressed again, it does break off."""
    interrupt = _Interrupt()

    def press(number: int, frame: FrameType | None) -> None:
        if interrupt.pressed:
            raise KeyboardInterrupt
        interrupt.pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


class Chat:
    """The loop that reads lines and answers them.

    interactive  a person types: a prompt is shown, Ctrl-C at it does nothing, and a turn that fails does not end
                 the program. Otherwise the lines come from a pipe, and the first error ends it.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, *, interactive: bool) -> None:
        self._llm = llm
        self._params = params
        self._interactive = interactive
        self._session: Session = llm.session()
        self._conversation = Conversation(llm.tokenizer, ChatTemplate.required(llm.template).render, system)
        self._answers = 0

    def run(self) -> None:
        """Until /exit or the end of the input."""
        if self._interactive:
            self._note(f"{model_name(self._llm)}. /help lists the commands, Ctrl-D leaves.")
        while (line := self._read()) is not None:
            try:
                if line.startswith("/"):
                    if not self._command(line):
                        return
                elif line.strip():
                    self._answer(line)
            except OstinatoError as error:
                if not self._interactive:
                    raise
                self._note(f"error: {error}")

    def _read(self) -> str | None:
        """The next line, with those that it is continued by; None at the end."""
        lines: list[str] = []
        while True:
            try:
                line = self._line("… " if lines else "> ")
            except EOFError:
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._note("")
                lines = []
                continue
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _line(self, mark: str) -> str:
        if self._interactive:
            return input(mark)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def _command(self, line: str) -> bool:
        """Do what a line with a slash says; False to leave."""
        name, _, rest = line.partition(" ")
        if name == "/exit":
            return False
        if name == "/reset":
            self._reset(None)
        elif name == "/system":
            if not rest.strip():
                raise UsageError("/system needs a text")
            self._reset(rest.strip())
        elif name == "/stats":
            self._note(summary_line(self._llm) if self._answers else "no answer yet")
        elif name == "/help":
            self._note(HELP)
        else:
            raise UsageError(f"no command {name}; /help lists them")
        return True

    def _reset(self, system: str | None) -> None:
        self._conversation.reset(system)
        self._session.reset()
        self._note("new conversation")

    def _answer(self, text: str) -> None:
        """Stream the answer to ``text``, and keep as much of it as was shown."""
        prompt_ids = self._conversation.ask(text)
        pieces: list[str] = []
        ids: list[int] = []
        with _ctrl_c_stops_the_answer() as interrupt:
            stream = self._llm.stream(prompt_ids, self._params, session=self._session)
            for delta in stream:
                pieces.append(delta.text)
                ids.extend(delta.token_ids)
                sys.stdout.write(delta.text)
                sys.stdout.flush()
                if interrupt.pressed:
                    break
            stream.close()
        answer = "".join(pieces)
        print("" if answer.endswith("\n") else "\n", end="", flush=True)
        if interrupt.pressed:
            self._note("stopped")
        self._answers += 1
        self._conversation.answered(text, prompt_ids, answer, ids)

    def _note(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
