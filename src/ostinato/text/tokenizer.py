"""Text to token ids and back, from a GGUF file's metadata or a Hugging Face directory."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ostinato.errors import UsageError
from ostinato.text import directory_vocabulary, gguf_vocabulary
from ostinato.text.gguf_vocabulary import Vocabulary

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's map: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(rest)}


_BYTE_OF = _bytes_of_characters()


class Tokenizer:
    """The tokenizer of one model. It may be used from several threads.

    vocab_size  ids run from 0 to vocab_size − 1 (a model's embedding may have more rows: padding)
    bos_id      the id that begins a sequence, or None
    eos_ids     every id that ends an answer
    named       the texts of bos_token, eos_token, …, for chat templates
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._backend = vocabulary.backend
        self._lock = threading.Lock()
        self._pieces: dict[int, bytes] = {}
        self._added = self._backend.get_added_tokens_decoder()
        self.vocab_size = max(self._backend.get_vocab_size(with_added_tokens=True), max(self._added, default=0) + 1)
        self.bos_id = vocabulary.bos_id
        self.eos_ids = vocabulary.eos_ids
        self.named: Mapping[str, str] = vocabulary.named

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From a GGUF file's keys (``tokenizer.ggml.*``: lists, arrays, plain values).

        Raises TokenizerError when the keys are missing, contradict each other, or name a kind of vocabulary or a
        pre-tokenizer that is not known here.
        """
        return cls(gguf_vocabulary.read_vocabulary(metadata))

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """From the tokenizer.json of a Hugging Face directory and the configuration files beside it.

        Raises TokenizerError when tokenizer.json is missing, cannot be read, or decodes in an unknown way.
        """
        return cls(directory_vocabulary.read_vocabulary(Path(path)))

    @property
    def strips_space(self) -> bool:
        """Encoding puts a space before a text, and decoding takes it away again (SentencePiece)."""
        return self._vocabulary.strips_space

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The ids of ``text``.

        add_special    put the model's first and last token around it, where the model asks for that; a chat
                       template has written them already, so its output is encoded without
        parse_special  ``<|im_end|>`` and the like in the text mean the token; otherwise they are plain characters
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid Unicode: lone surrogate at character {error.start}") from error
        with self._lock:  # the switch belongs to the pipeline, not to the call
            self._backend.encode_special_tokens = not parse_special
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if add_special:
            return [*self._vocabulary.prefix_ids, *ids, *self._vocabulary.suffix_ids]
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD.

        skip_special  leave out tokens such as ``<|im_end|>``
        """
        data = b"".join(self.piece(index) for index in ids if not (skip_special and self.is_special(index)))
        if self.strips_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def piece(self, index: int) -> bytes:
        """The bytes that token ``index`` stands for: maybe a part of a character, nothing for a padding id."""
        piece = self._pieces.get(index)
        if piece is None:
            piece = self._pieces[index] = self._read_piece(index)
        return piece

    def is_special(self, index: int) -> bool:
        """Is it a control token, which stands for no text of the answer?"""
        return index in self._vocabulary.special_ids

    def token_id(self, text: str) -> int | None:
        """The id of the token that is written ``text`` in the vocabulary, or None."""
        index: int | None = self._backend.token_to_id(text)
        return index

    def _read_piece(self, index: int) -> bytes:
        if index < 0:
            raise ValueError(f"a token id is not negative: {index}")
        added = self._added.get(index)
        if added is not None:
            return str(added.content).encode()
        token: str | None = self._backend.id_to_token(index)
        if token is None:
            return b""  # the embedding has more rows than the vocabulary has tokens
        if self._vocabulary.byte_level:
            if all(character in _BYTE_OF for character in token):
                return bytes(_BYTE_OF[character] for character in token)
            return token.encode()
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
