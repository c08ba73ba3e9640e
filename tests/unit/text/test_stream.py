"""The pieces of a stream are the whole text, and no piece holds half a character."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostinato.text import StreamDecoder, Tokenizer

from .vocabularies import byte_level, character, texts

KINDS = {
    "byte-level": byte_level("smollm"),
    "sentencepiece": character("llama"),
    "sentencepiece without space": character("llama", add_space_prefix=False),
    "gemma4": character("gemma4"),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(data=st.data(), skip_special=st.booleans())
def test_any_ids(kind: str, data: Any, skip_special: bool) -> None:
    tokenizer = Tokenizer.from_gguf(KINDS[kind])
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    stream = StreamDecoder(tokenizer, skip_special=skip_special)
    pieces = [*(stream.feed(index) for index in ids), stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip_special)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=texts())
def test_text_comes_whole_and_at_once(kind: str, text: str) -> None:
    tokenizer = Tokenizer.from_gguf(KINDS[kind])
    ids = tokenizer.encode(text, add_special=False)
    stream = StreamDecoder(tokenizer)
    given_out = ""
    for at, index in enumerate(ids):
        given_out += stream.feed(index)
        # all that is final by now: the text of the ids so far, up to a character that is not whole yet
        final = b"".join(map(tokenizer.piece, ids[: at + 1])).decode("utf-8", errors="ignore")
        assert given_out == (final.removeprefix(" ") if tokenizer.strips_space else final)
    assert stream.flush() == ""
    assert given_out == text


def test_half_a_character_waits() -> None:
    tokenizer = Tokenizer.from_gguf(character("llama"))
    stream = StreamDecoder(tokenizer)
    assert [stream.feed(4 + byte) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert stream.feed(4 + 0xF0) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_a_continuation_keeps_its_space() -> None:
    tokenizer = Tokenizer.from_gguf(character("llama"))
    ids = tokenizer.encode("the step", add_special=False)
    assert "".join(map(StreamDecoder(tokenizer).feed, ids)) == "the step"
    assert "".join(map(StreamDecoder(tokenizer, continuation=True).feed, ids)) == " the step"
