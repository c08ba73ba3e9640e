"""Which requests run: admission to slots, batching, retirement."""

from __future__ import annotations

from collections import deque

from ostinato.engine.request import Request, Sequence, TokenEvent
from ostinato.engine.runner import Runner
from ostinato.errors import ContextLengthError, SamplingError, UsageError
from ostinato.kernels.sample.buffers import MAX_STOP_IDS
from ostinato.sampling import Published

RUN_AHEAD = 4  # steps launched before the first of them is read: hides the host, wastes at most three steps at an end


class Scheduler:
    """First come, first served. A request takes a slot and all the pages that it can ever need: it never fails midway.

    ``step`` does what can be done now: admits, prefills one chunk, launches a decode step, and collects the tokens that
    have come back. A sequence may be parked after its answer (``keep``): its slot and KV stay for a next turn.
    """

    def __init__(self, runner: Runner, context: int) -> None:
        self.runner = runner
        self.context = context
        self._queue: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self._free = list(range(runner.num_slots - 1, -1, -1))
        self._parked: set[int] = set()

    def add(self, request: Request, *, slot: int = -1, num_cached: int = 0) -> Sequence:
        """Queue a request. slot: one kept by an earlier sequence, whose KV holds ``num_cached`` tokens of the prompt.

        Raises ContextLengthError if the prompt leaves no room for an answer, SamplingError for too many stop ids and a
        bias beyond the vocabulary, UsageError for token ids beyond it and for a slot that is not kept.
        """
        length = len(request.prompt)
        if length == 0:
            raise SamplingError("the prompt is empty: give at least one token")
        if length >= self.context:
            raise ContextLengthError(
                f"the prompt has {length} tokens and the context {self.context}; "
                f"shorten it, or load with --context {length + request.params.max_tokens} or more"
            )
        if len(request.stop_ids) > MAX_STOP_IDS:
            raise SamplingError(f"at most {MAX_STOP_IDS} stop token ids, got {len(request.stop_ids)}")
        vocab = self.runner.model.vocab_size
        beyond = [token for token in request.prompt if not 0 <= token < vocab]
        if beyond:
            raise UsageError(f"the prompt has token id {beyond[0]}, which is not in the vocabulary of {vocab}")
        biased = [token for token in request.params.logit_bias if token >= vocab]
        if biased:
            raise SamplingError(f"logit_bias: token id {biased[0]} is beyond the vocabulary of {vocab}")
        if slot >= 0:
            if slot not in self._parked:
                raise UsageError(f"slot {slot} is not kept: it answers another request, or was given back")
            self._parked.discard(slot)
        assert num_cached < length, "at least one token must run to give logits"
        sequence = Sequence(request, slot=slot, num_cached=num_cached, prefilled=num_cached)
        # One position less than the context holds: the last token drawn is never fed back.
        sequence.limit = min(request.params.max_tokens, self.context - length)
        self._queue.append(sequence)
        return sequence

    @property
    def has_work(self) -> bool:
        return bool(self._queue or self._running)

    def step(self) -> list[TokenEvent]:
        """Advance everything by one step; returns the tokens that came back (possibly none).

        Raises UsageError where nothing could ever advance: all slots are kept and a request waits for one.
        """
        self._admit()
        if self._queue and not self._running:
            raise UsageError(
                f"all {self.runner.num_slots} slots hold kept conversations; end one, or load with a larger batch"
            )
        if self._prefill_chunk() and self.runner.is_synchronous:
            return self._collect(wait=False)  # the first token is here: a decode step would only delay it
        launched = self._launch()
        return self._collect(wait=not launched)

    def cancel(self, sequence: Sequence, reason: str = "cancelled") -> None:
        """End a sequence now; tokens of steps already launched are dropped."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        if self._running.get(sequence.slot) is sequence:
            self.runner.stop(sequence.slot)
            self._retire(sequence)
        elif sequence in self._queue:
            self._queue.remove(sequence)
            if sequence.slot >= 0:
                self._parked.add(sequence.slot)

    def keep(self, sequence: Sequence) -> None:
        """After its end ``sequence``'s slot stays taken, with its KV, until ``free``."""
        sequence.keeps_slot = True

    def free(self, slot: int) -> None:
        """Give back a slot that was kept."""
        if slot in self._parked:
            self._parked.discard(slot)
            self.runner.release(slot)
            self._free.append(slot)

    def _admit(self) -> None:
        for sequence in list(self._queue):
            request = sequence.request
            need = len(request.prompt) + sequence.limit
            if sequence.slot < 0 and not self._free:
                continue  # one further back may have a slot of its own
            slot = sequence.slot if sequence.slot >= 0 else min(self._free)
            if not self.runner.kv.can_hold(slot, need):
                return
            self._queue.remove(sequence)
            if slot in self._free:
                self._free.remove(slot)
            sequence.slot = slot
            stop_ids = () if request.params.ignore_eos else tuple(request.stop_ids)
            self.runner.admit(slot, request.params, request.prompt, stop_ids, need)
            self._running[slot] = sequence

    def _prefill_chunk(self) -> bool:
        """One chunk of the oldest sequence that still has some prompt to run; whether that drew its first token."""
        for sequence in self._running.values():
            prompt, start = sequence.request.prompt, sequence.prefilled
            if start == len(prompt):
                continue
            stop = min(start + self.runner.chunk, len(prompt))
            draw = stop == len(prompt)
            self.runner.prefill(sequence.slot, prompt[start:stop], start, draw=draw, remaining=sequence.limit)
            sequence.prefilled = stop
            sequence.launched += draw
            return draw
        return False

    def _launch(self) -> bool:
        """Launch a decode step if some sequence still has tokens to draw and no result is too far behind."""
        runner = self.runner
        ready = [s for s in self._running.values() if s.prompt_done and s.launched < s.limit]
        if not ready or any(s.launched - len(s.tokens) >= RUN_AHEAD for s in ready):
            return False
        # A bucket runs all rows below its size; rows of unfinished prompts are not active and draw nothing.
        runner.launch(max(s.slot for s in ready) + 1)
        for sequence in self._running.values():
            sequence.launched += sequence.prompt_done and sequence.launched < sequence.limit
        return True

    def _collect(self, *, wait: bool) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        for sequence in list(self._running.values()):
            must = wait and not events
            while sequence.finish_reason is None and sequence.launched > len(sequence.tokens):
                drawn = self.runner.wait(sequence.slot) if must else self.runner.poll(sequence.slot)
                if drawn is None:
                    break
                must = False
                if drawn.token is not None:
                    events.append(self._take(sequence, drawn.token, drawn))
        return events

    def _take(self, sequence: Sequence, token: int, drawn: Published) -> TokenEvent:
        sequence.tokens.append(token)
        request = sequence.request
        if token in request.stop_ids and not request.params.ignore_eos:
            sequence.finish_reason = "stop"
        elif len(sequence.tokens) == sequence.limit:
            sequence.finish_reason = "length"
        if sequence.finish_reason is not None:
            self._retire(sequence)
        return TokenEvent(sequence, token, drawn.logprob, drawn.top, sequence.finish_reason)

    def _retire(self, sequence: Sequence) -> None:
        slot = sequence.slot
        del self._running[slot]
        if sequence.keeps_slot:
            self._parked.add(slot)
        else:
            self.runner.release(slot)
            self._free.append(slot)
