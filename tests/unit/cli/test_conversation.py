"""A turn begins with the ids of the turn before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostinato.cli.conversation import Conversation
from ostinato.text import ChatTemplate, Tokenizer
from tests.tiny_model import CHATML
from tests.unit.text.vocabularies import byte_level, texts

FORGETFUL = (  # a template that leaves thoughts out of earlier answers
    "{% for message in messages %}{% set text = message.content.split('</think>')[-1] %}"
    "{{ '<|im_start|>' + message.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


def _conversation(template: str = CHATML, system: str | None = None) -> tuple[Conversation, Tokenizer]:
    tokenizer = Tokenizer.from_gguf(byte_level("smollm"))
    return Conversation(tokenizer, ChatTemplate(template).render, system), tokenizer


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(texts(), texts(), st.booleans()), min_size=1, max_size=4), system=st.none() | texts())
def test_the_ids_are_the_whole_text_and_begin_with_the_turn_before(
    turns: list[tuple[str, str, bool]], system: str | None
) -> None:
    conversation, tokenizer = _conversation(system=system)
    messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
    before: list[int] = []
    for question, answer, ended in turns:
        ids = conversation.ask(question)
        messages.append({"role": "user", "content": question})
        assert tokenizer.decode(ids) == ChatTemplate(CHATML).render(messages)
        assert ids[: len(before)] == before
        drawn = tokenizer.encode(answer, add_special=False)
        conversation.answered(question, ids, answer, [*drawn, 2] if ended else drawn)
        messages.append({"role": "assistant", "content": answer})
        assert list(conversation.messages) == messages
        before = [*ids, *drawn]


def test_the_models_own_cut_of_its_answer_is_kept() -> None:
    conversation, tokenizer = _conversation()
    ids = conversation.ask("hello")
    letters = [tokenizer.encode(letter)[0] for letter in "the step"]
    assert letters != tokenizer.encode("the step")
    conversation.answered("hello", ids, "the step", [*letters, 2])
    following = conversation.ask("and now?")
    assert following[: len(ids) + len(letters)] == [*ids, *letters]
    assert following[len(ids) + len(letters)] == 2
    assert tokenizer.decode(following).count("<|im_end|>") == 3


@pytest.mark.parametrize("drawn", ["the step STOP", "the"])
def test_an_answer_that_was_cut_is_read_again(drawn: str) -> None:
    conversation, tokenizer = _conversation()
    ids = conversation.ask("hello")
    conversation.answered("hello", ids, "the step", tokenizer.encode(drawn))
    expected = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nthe step<|im_end|>\n"
    assert tokenizer.decode(conversation.ask("more")).startswith(expected)


def test_a_template_that_rewrites_earlier_turns() -> None:
    conversation, tokenizer = _conversation(FORGETFUL)
    ids = conversation.ask("hello")
    answer = "hm</think>the step"
    conversation.answered("hello", ids, answer, [*tokenizer.encode(answer), 2])
    text = tokenizer.decode(conversation.ask("more"))
    assert "hm" not in text
    assert "the step<|im_end|>" in text


def test_reset() -> None:
    conversation, tokenizer = _conversation(system="Be kind.")
    first = conversation.ask("hello")
    conversation.answered("hello", first, "hi", tokenizer.encode("hi"))
    conversation.reset()
    assert conversation.ask("hello") == first
    conversation.reset("Be brief.")
    assert [message["content"] for message in conversation.messages] == ["Be brief."]


def test_a_turn_counts_only_when_it_is_answered() -> None:
    calls: list[Sequence[Any]] = []
    tokenizer = Tokenizer.from_gguf(byte_level("smollm"))

    def render(messages: Sequence[Any]) -> str:
        calls.append(messages)
        return "<|im_start|>"

    conversation = Conversation(tokenizer, render)
    conversation.ask("one")
    conversation.ask("two")
    assert [message["content"] for message in calls[-1]] == ["two"]
