"""The turns of a conversation as token ids, so that each turn begins with exactly the ids of the one before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ostinato.text import StreamDecoder, Tokenizer

Message = dict[str, str]


class Conversation:
    """Messages, and the ids that stand for them.

    A model's answer is kept as the ids that it has drawn: tokenizing its text again could cut it differently, and
    the KV of the whole answer would be lost. Where a template writes an earlier turn in another way than it came
    (thoughts that are left out), the conversation is tokenized anew and the engine keeps what is still equal.
    """

    def __init__(
        self, tokenizer: Tokenizer, render: Callable[[Sequence[Message]], str], system: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._render = render
        self._system = system
        self._messages: list[Message] = []
        self._text = ""
        self._ids: list[int] = []
        self.reset()

    @property
    def messages(self) -> Sequence[Message]:
        """What has been said, the system message first."""
        return tuple(self._messages)

    def reset(self, system: str | None = None) -> None:
        """Begin anew, with a new system message if one is given."""
        self._system = system if system is not None else self._system
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._text, self._ids = "", []

    def ask(self, text: str) -> list[int]:
        """The ids of the prompt that ends with the user's ``text``. Nothing is kept until ``answered``."""
        prompt = self._render([*self._messages, {"role": "user", "content": text}])
        if self._ids and prompt.startswith(self._text):
            rest = self._tokenizer.encode(prompt[len(self._text) :], add_special=False)
            # A special token is a sure border: no token reaches across it.
            if rest and self._tokenizer.is_special(rest[0]):
                return [*self._ids, *rest]
        return self._tokenizer.encode(prompt, add_special=False)

    def answered(self, text: str, prompt_ids: Sequence[int], answer: str, answer_ids: Sequence[int]) -> None:
        """Keep a turn: the user's ``text``, the ids that ``ask`` gave for it, the answer and its ids."""
        prompt = self._render([*self._messages, {"role": "user", "content": text}])
        kept = list(answer_ids)
        while kept and kept[-1] in self._tokenizer.eos_ids:
            kept.pop()  # the template writes the end of the answer itself
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        # An answer that was cut (by a stop string, by Ctrl-C in the middle of a character) is not what its ids say.
        decoder = StreamDecoder(self._tokenizer, skip_special=True, continuation=True)
        whole = "".join(map(decoder.feed, kept)) + decoder.flush() == answer
        self._text, self._ids = (prompt + answer, [*prompt_ids, *kept]) if whole else ("", [])
