"""Text in, text out."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch

from ostinato.engine.loading import EngineConfig, Loaded, check_architecture, load_engine
from ostinato.engine.request import Request, TokenEvent
from ostinato.engine.request import Sequence as TokenSequence
from ostinato.engine.scheduler import Scheduler
from ostinato.errors import UsageError
from ostinato.load.describe import ModelDescription, describe
from ostinato.load.gguf import GGUFFile
from ostinato.load.progress import Progress
from ostinato.load.quantizing import quantizing, reading
from ostinato.load.resolve import resolve
from ostinato.sampling import SamplingParams
from ostinato.text import ChatTemplate, StopStrings, StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Delta:
    """What is new in an answer. text: may be empty while a character or a possible stop string is unfinished.

    logprobs: one per token. top_logprobs: for each token the most likely ones and theirs, as many as the request asked
    for. finish_reason: ``stop`` (a stop token or string), ``length``, or None while it goes on.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    finish_reason: str | None


@dataclass
class RunStats:
    """What one answer took. Seconds of wall clock; prefill ends with the first token, which decode does not count."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefill_s: float = 0.0
    new_tokens: int = 0
    decode_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return (self.new_tokens - 1) / self.decode_s if self.decode_s else 0.0


@dataclass(eq=False)
class Session:
    """A conversation whose KV stays on the device between answers, in a slot of its own.

    tokens: ids whose keys and values the slot holds. answering: while one of its answers is being streamed.
    Made by ``LLM.session``.
    """

    llm: LLM
    slot: int = -1
    tokens: list[int] = field(default_factory=list)
    answering: bool = False

    def reset(self) -> None:
        """Forget everything and give the slot back. Raises UsageError in the middle of an answer."""
        if self.answering:
            raise UsageError("the conversation is being answered; close that stream first")
        if self.slot >= 0:
            self.llm.scheduler.free(self.slot)
        self.slot, self.tokens = -1, []

    def common_prefix(self, prompt: Sequence[int]) -> int:
        """Tokens of ``prompt`` whose KV stands; at most all but one, since the last must run to give logits.

        Recurrent state stands after all the tokens and nowhere before, so a prompt that leaves them starts anew.
        """
        count = 0
        for ours, theirs in zip(self.tokens, prompt[:-1], strict=False):
            if ours != theirs:
                break
            count += 1
        if self.llm.runner.kv.is_recurrent and count < len(self.tokens):
            return 0
        return count


class LLM:
    """A model that is loaded, with its tokenizer. Not for several threads at a time; use it as a context manager."""

    def __init__(
        self, loaded: Loaded, info: ModelDescription, tokenizer: Tokenizer, template: ChatTemplate | None
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.template = template
        self.runner = loaded.runner
        self.model = loaded.model
        self.budget = loaded.budget
        self.device = loaded.device
        self.load_s = loaded.seconds
        self.context = loaded.budget.context
        self.scheduler = Scheduler(loaded.runner, self.context)
        self.stats = RunStats()
        # Tokens that came back while another stream was asked for its own.
        self._inboxes: dict[TokenSequence, deque[TokenEvent]] = {}

    @classmethod
    def load(
        cls,
        model: str | None = None,
        *,
        device: str | None = None,
        dtype: str = "auto",
        quant: str | None = None,
        kv: str = "auto",
        state: str = "float32",
        context: int | None = None,
        max_batch: int = 1,
        chunk: int | None = None,
        graphs: bool = True,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> LLM:
        """Load MODEL (None: the default one), downloading it where needed; see EngineConfig for the settings.

        quant: quantizes a Hugging Face checkpoint as it is read (``int4``, ``int4-g128`` …).
        threads: of the CPU path; None for PyTorch's own choice. Raises OstinatoError.
        """
        if threads is not None:
            if threads < 1:
                raise UsageError(f"--threads {threads} is not a number of threads; use at least 1")
            torch.set_num_threads(threads)
        if max_batch < 1:
            raise UsageError(f"a batch of {max_batch} holds no sequence; use at least 1")
        opened = quantizing(resolve(model, progress).open(), quant, progress)
        check_architecture(opened)
        if isinstance(opened, GGUFFile):
            tokenizer, template = Tokenizer.from_gguf(opened.metadata), ChatTemplate.from_gguf(opened.metadata)
        else:
            tokenizer = Tokenizer.from_directory(opened.directory)
            template = ChatTemplate.from_directory(opened.directory)
        config = EngineConfig(device, dtype, kv, context, max_batch, chunk, graphs, state)
        with reading(opened):
            loaded = load_engine(opened, config)
        return cls(loaded, describe(opened), tokenizer, template)

    # -- text --------------------------------------------------------------------------------------------------------

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer. Raises TokenizerError without a template."""
        text = ChatTemplate.required(self.template).render(messages, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special=False)

    def session(self) -> Session:
        """A conversation that keeps its KV between turns."""
        return Session(self)

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams, *, session: Session | None = None
    ) -> Generator[Delta, None, None]:
        """The answer to a text (taken as it is, without a chat template) or to token ids, piece by piece.

        Closing the iterator cancels the rest. ``stats`` tells afterwards what it took. Several streams may be read in
        turn. Raises ContextLengthError, and UsageError where ``session`` is answering already or all slots are kept.
        """
        if session is not None and session.answering:
            raise UsageError("the conversation is being answered; finish or close that stream first")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        cached = session.common_prefix(ids) if session is not None else 0
        request = Request(tuple(ids), params, self.tokenizer.eos_ids)
        slot = session.slot if session is not None else -1
        sequence = self.scheduler.add(request, slot=slot, num_cached=cached)
        if session is not None:
            self.scheduler.keep(sequence)
        stats = self.stats = RunStats(prompt_tokens=len(ids), cached_tokens=cached)
        self._inboxes[sequence] = deque()
        if session is not None:
            session.answering = True
        try:
            yield from self._answer(sequence, params, stats)
        finally:
            exact = sequence.ended_in_step
            self.scheduler.cancel(sequence)
            del self._inboxes[sequence]
            if session is not None:
                session.answering = False
                if sequence.slot >= 0:
                    session.slot = sequence.slot
                    # The last token was drawn but maybe never run, so its KV may not stand.
                    session.tokens = [*ids[: sequence.prefilled], *sequence.tokens[:-1]]
                    if self.runner.kv.is_recurrent and not exact:
                        session.tokens = []

    def generate(self, prompt: str | Sequence[int], params: SamplingParams) -> str:
        """The whole answer as text."""
        return "".join(delta.text for delta in self.stream(prompt, params))

    def _answer(self, sequence: TokenSequence, params: SamplingParams, stats: RunStats) -> Generator[Delta, None, None]:
        decoder = StreamDecoder(self.tokenizer, skip_special=True, continuation=True)
        stops = StopStrings(params.stop)
        started = time.perf_counter()
        first = started
        reason = None
        while reason is None:
            event = self._next_event(sequence)
            now = time.perf_counter()
            stats.new_tokens += 1
            if stats.new_tokens == 1:
                first = now
                stats.prefill_s = now - started
            stats.decode_s = now - first
            text, stopped = stops.feed(decoder.feed(event.token))
            reason = event.finish_reason
            if reason is not None and not stopped:
                tail, stopped = stops.feed(decoder.flush())
                text += tail + ("" if stopped else stops.flush())
            if stopped:
                reason = "stop"
            yield Delta(text, (event.token,), (event.logprob,), (event.top,), reason)

    def _next_event(self, sequence: TokenSequence) -> TokenEvent:
        inbox = self._inboxes[sequence]
        while not inbox:
            for event in self.scheduler.step():
                if event.sequence in self._inboxes:
                    self._inboxes[event.sequence].append(event)
        return inbox.popleft()

    # -- the rest ----------------------------------------------------------------------------------------------------

    @property
    def memory_bytes(self) -> int:
        """Memory in use: of the GPU by this process's tensors and graphs, or the process's peak on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.memory_reserved(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def close(self) -> None:
        """Free the graphs. The model's memory goes when the object does."""
        self.runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
