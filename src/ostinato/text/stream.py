"""Token ids in, one by one; finished text out."""

from __future__ import annotations

import codecs

from ostinato.text.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes a growing answer: the pieces together are ``tokenizer.decode`` of all ids.

    A character whose bytes come in several tokens is held back until it is whole; everything else is given out
    with the token that completes it.

    skip_special  leave out control tokens
    continuation  the ids continue a text that is already shown, so a leading space is text (otherwise the space
                  that SentencePiece puts before every text is dropped, as ``decode`` does)
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False, continuation: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strips_space = tokenizer.strips_space and not continuation
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, index: int) -> str:
        """The text that token ``index`` has made final, often empty."""
        if self._skip_special and self._tokenizer.is_special(index):
            return ""
        piece = self._tokenizer.piece(index)
        if self._strips_space and piece:
            self._strips_space = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole. The decoder can be used again."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest
