"""From the ``tokenizer.ggml.*`` keys of a GGUF file to a `tokenizers` pipeline.

Three kinds of vocabulary are read:

gpt2    byte-level BPE with merges; ``tokenizer.ggml.pre`` names how text is cut into words
llama   SentencePiece BPE: no merges in the file, pieces join in the order of their scores; bytes as ``<0xAB>``
gemma4  merges over characters with ``▁`` for the space and no cutting into words; bytes as ``<0xAB>``

Facts about the format: the GGUF specification, and the vocabulary code of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from ostinato.errors import TokenizerError
from ostinato.text.pretokenizers import PreTokenizer, pre_tokenizer_named


class TokenType(IntEnum):
    """The values of ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Tokens that end an answer in some family of models, where the file marks them as control tokens but does not
# say so in a key of its own.
_END_OF_TURN = frozenset(
    {
        "<|im_end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<end_of_turn>",
        "<turn|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",
    }
)


@dataclass(frozen=True)
class Vocabulary:
    """What a file says about its tokens, ready for the tokenizer.

    byte_level    a token's characters stand for bytes (GPT-2's map); otherwise ``▁`` is the space, ``<0xAB>`` a byte
    strips_space  decoding drops the one space that encoding had put before the text
    prefix_ids, suffix_ids  what ``add_special`` puts around a text
    named         the texts of bos_token, eos_token, … as chat templates use them
    """

    backend: Backend
    byte_level: bool
    strips_space: bool
    special_ids: frozenset[int]
    bos_id: int | None
    eos_ids: frozenset[int]
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    named: Mapping[str, str]


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary in ``metadata`` (GGUF key → value); TokenizerError if it has none that is known here."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise TokenizerError("the GGUF file has no tokenizer (no key tokenizer.ggml.model); take one that carries it")
    tokens = [str(token) for token in _required(metadata, "tokens")]
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise TokenizerError(f"the GGUF file lists {len(tokens) - len(ids)} tokens twice; convert the model again")
    types = _types(metadata, len(tokens))
    unknown = _id(metadata, "unknown_token_id", len(tokens))
    unknown_token = None if unknown is None else tokens[unknown]

    strips_space = False
    if kind == "gpt2":
        pre = pre_tokenizer_named(str(metadata.get("tokenizer.ggml.pre", "default")))
        backend = _byte_level(ids, _merges(metadata), pre, unknown_token)
        add_bos = pre.add_bos
    elif kind == "llama":
        scores = [float(score) for score in _required(metadata, "scores")]
        add_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        backend = _sentencepiece(ids, merges_from_scores(tokens, scores, types), unknown_token, add_space)
        add_bos, strips_space = True, add_space
    elif kind == "gemma4":
        backend = _sentencepiece(ids, _merges(metadata), unknown_token, add_space=False)
        add_bos = True
    else:
        raise TokenizerError(
            f"the GGUF file's tokenizer is of the kind {kind!r}; only gpt2, llama and gemma4 are known here"
        )
    # Later files may call a token control or user-defined that merges could also make: added tokens come first.
    backend.add_special_tokens(_added(tokens, types, TokenType.CONTROL, special=True))
    backend.add_tokens(_added(tokens, types, TokenType.USER_DEFINED, special=False))

    bos = _id(metadata, "bos_token_id", len(tokens))
    eos = _id(metadata, "eos_token_id", len(tokens))
    # Files of Gemma 4 exist that say false by mistake; the model needs its first token.
    adds_bos = kind == "gemma4" or bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    adds_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    special = frozenset(i for i, kind_ in enumerate(types) if kind_ == TokenType.CONTROL)
    ends = {eos, *(_id(metadata, key, len(tokens)) for key in ("eot_token_id", "eom_token_id"))}
    ends |= {ids[token] for token in _END_OF_TURN if ids.get(token) in special}
    return Vocabulary(
        backend=backend,
        byte_level=kind == "gpt2",
        strips_space=strips_space,
        special_ids=special,
        bos_id=bos,
        eos_ids=frozenset(index for index in ends if index is not None),
        prefix_ids=(bos,) if adds_bos and bos is not None else (),
        suffix_ids=(eos,) if adds_eos and eos is not None else (),
        named=named_tokens(metadata),
    )


def named_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The texts of bos_token, eos_token, … in a GGUF file's keys, as chat templates use them."""
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    return {
        f"{name}_token": str(tokens[index])
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (index := _id(metadata, f"{key}_token_id", len(tokens))) is not None
    }


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """The merges that make SentencePiece's BPE out of pieces and scores, best first.

    Every way of cutting a piece into two other pieces is a merge with the score of the whole. Only normal pieces
    take part: text must not grow into a control token or a byte token.
    """
    score_of = {t: s for t, s, kind in zip(tokens, scores, types, strict=True) if kind == TokenType.NORMAL}
    found: list[tuple[float, str, str]] = []
    for piece, score in score_of.items():
        cuts = [
            (piece[:at], piece[at:]) for at in range(1, len(piece)) if piece[:at] in score_of and piece[at:] in score_of
        ]
        cuts.sort(key=lambda cut: (score_of[cut[0]], score_of[cut[1]]), reverse=True)
        found.extend((score, left, right) for left, right in cuts)
    found.sort(key=lambda merge: -merge[0])
    return [(left, right) for _, left, right in found]


def _byte_level(
    ids: dict[str, int], merges: list[tuple[str, str]], pre: PreTokenizer, unknown_token: str | None
) -> Backend:
    backend = Backend(_bpe(ids, merges, unknown_token, byte_fallback=False, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre.build()
    return backend


def _sentencepiece(
    ids: dict[str, int], merges: list[tuple[str, str]], unknown_token: str | None, add_space: bool
) -> Backend:
    backend = Backend(_bpe(ids, merges, unknown_token, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    # Prepend acts on every stretch of text between special tokens, as SentencePiece does for each call.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if add_space else spaces
    return backend


def _bpe(
    ids: dict[str, int],
    merges: list[tuple[str, str]],
    unknown_token: str | None,
    *,
    byte_fallback: bool,
    ignore_merges: bool = False,
) -> BPE:
    try:
        return BPE(
            ids,
            merges,
            unk_token=unknown_token,
            fuse_unk=True,
            byte_fallback=byte_fallback,
            ignore_merges=ignore_merges,
        )
    except Exception as error:  # the Rust binding raises bare Exception
        raise TokenizerError(f"the GGUF file's merges and tokens do not fit together: {error}") from error


def _required(metadata: Mapping[str, Any], name: str) -> Sequence[Any]:
    values: Sequence[Any] | None = metadata.get(f"tokenizer.ggml.{name}")
    if values is None or len(values) == 0:
        raise TokenizerError(f"the GGUF file's tokenizer lacks tokenizer.ggml.{name}; convert the model again")
    return values


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for merge in _required(metadata, "merges"):
        # The separator is looked for after the first character, which may itself be a space.
        at = str(merge).find(" ", 1)
        if at < 0:
            raise TokenizerError(f"the GGUF file has the merge {merge!r}, which is no pair; convert the model again")
        merges.append((str(merge)[:at], str(merge)[at + 1 :]))
    return merges


def _types(metadata: Mapping[str, Any], count: int) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type")
    if types is not None:
        if len(types) != count:
            raise TokenizerError(f"the GGUF file has {count} tokens but {len(types)} token types")
        return [int(kind) for kind in types]
    result = [int(TokenType.NORMAL)] * count
    for name in ("bos", "eos", "unknown", "padding"):
        index = _id(metadata, f"{name}_token_id", count)
        if index is not None:
            result[index] = int(TokenType.CONTROL)
    return result


def _id(metadata: Mapping[str, Any], name: str, count: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return None
    index = int(value)
    if not 0 <= index < count:
        raise TokenizerError(f"the GGUF file's tokenizer.ggml.{name} is {index}, but it has {count} tokens")
    return index


def _added(tokens: Sequence[str], types: Sequence[int], kind: TokenType, *, special: bool) -> list[AddedToken]:
    return [
        AddedToken(token, normalized=False, special=special)
        for token, kind_ in zip(tokens, types, strict=True)
        if kind_ == kind and token
    ]
