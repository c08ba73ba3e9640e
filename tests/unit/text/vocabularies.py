"""Small vocabularies of every kind, trained here, as the GGUF keys that would carry them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import hypothesis.strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from ostinato.text.gguf_vocabulary import TokenType

CORPUS = [
    "A phrase that repeats: the step runs again and again, and the same step runs for every token.",
    "def step(self, tokens):\n    for i in range(128):\n        yield self.run(tokens[i])  # 42 times\n",
    "Größe, façade, naïve, Ελλάδα, Привет мир, 漢字かな交じり文, 🙂🙂, שלום, مرحبا 1234567890 3.14159",
    "I'm sure we'll see what they've said; DON'T you? It's 12 o'clock.\r\n\r\n\tTabs and   spaces   too.",
] * 4

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<tool>", "    "]


@cache
def _byte_level_parts() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tuple(tokens), tuple((left, right) for left, right in model["merges"])


@cache
def _character_parts() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tuple(tokens), tuple((left, right) for left, right in model["merges"])


def byte_level(pre: str, **keys: Any) -> dict[str, Any]:
    """GGUF keys of a byte-level vocabulary: control tokens first, two user-defined ones last."""
    tokens, merges = _byte_level_parts()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*CONTROL, *tokens, *USER_DEFINED],
        "tokenizer.ggml.token_type": [TokenType.CONTROL] * len(CONTROL)
        + [TokenType.NORMAL] * len(tokens)
        + [TokenType.USER_DEFINED] * len(USER_DEFINED),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{name}": value for name, value in keys.items()}


def character(kind: str, **keys: Any) -> dict[str, Any]:
    """GGUF keys of a SentencePiece-like vocabulary (kind llama: scores; kind gemma4: merges)."""
    tokens, merges = _character_parts()
    control = ["<pad>", "</s>", "<s>", "<unk>"]
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    rank = {left + right: at for at, (left, right) in reversed(list(enumerate(merges)))}
    scores = [0.0] * (len(control) + 256) + [-float(rank.get(token, 10**6)) for token in tokens]
    own = {"scores": scores} if kind == "llama" else {"merges": [f"{left} {right}" for left, right in merges]}
    keys = own | {"model": kind, "bos_token_id": 2, "eos_token_id": 1, "unknown_token_id": 3} | keys
    return {
        "tokenizer.ggml.tokens": [*control, *in_bytes, *tokens],
        "tokenizer.ggml.token_type": [TokenType.CONTROL] * 3
        + [TokenType.UNKNOWN]
        + [TokenType.BYTE] * 256
        + [TokenType.NORMAL] * len(tokens),
    } | {f"tokenizer.ggml.{name}": value for name, value in keys.items()}


def texts(*special: str) -> st.SearchStrategy[str]:
    """Unicode of all sorts, with the words of the corpus and special tokens in between."""
    words = st.sampled_from([" ", "  ", "\n", "\n\n", "\r\n", "\t", "1", " 42", "²³", "e\u0301", "é", "🙂", "👩‍👧"])
    known = st.sampled_from(sorted({word for line in CORPUS for word in line.split(" ")}))
    parts = [st.text(max_size=10), words, known]
    if special:
        parts.append(st.sampled_from(special))
    return st.lists(st.one_of(*parts), max_size=10).map("".join)
