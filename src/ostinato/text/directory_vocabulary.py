"""From the tokenizer files of a Hugging Face directory to the same vocabulary as a GGUF file gives.

tokenizer.json           the pipeline itself: required
tokenizer_config.json    add_bos_token, add_eos_token, the named tokens, tokens added later
special_tokens_map.json  the named tokens of older checkpoints
generation_config.json, config.json  which tokens end an answer
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from ostinato.errors import TokenizerError
from ostinato.text.gguf_vocabulary import Vocabulary

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MARK = "x"  # any text that is one word: around it, the special tokens of a pipeline show


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``, or an empty one if there is no such file; TokenizerError if it is no JSON object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} should hold a JSON object")
    return content


def read_named_tokens(directory: Path) -> dict[str, str]:
    """The texts of bos_token, eos_token, … in a checkpoint's directory, as chat templates use them."""
    named: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        content = read_json(directory / file)
        for name in _NAMED:
            value = content.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                named[name] = text
    return named


def read_vocabulary(directory: Path) -> Vocabulary:
    """The vocabulary of a checkpoint's directory; TokenizerError if tokenizer.json is missing or of an unknown kind."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(
            f"{directory} has no tokenizer.json; fetch it, or save it with transformers' save_pretrained"
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the Rust binding raises bare Exception
        raise TokenizerError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    backend.no_padding()
    backend.no_truncation()
    config = read_json(directory / "tokenizer_config.json")
    _add_later_tokens(backend, config, path)

    named = read_named_tokens(directory)
    added = backend.get_added_tokens_decoder()
    special = {index for index, token in added.items() if token.special}
    special |= {index for text in named.values() if (index := backend.token_to_id(text)) in added}
    bos = _token_id(backend, named, "bos_token")
    eos = _token_id(backend, named, "eos_token")
    ends = {eos, *_eos_ids(directory / "generation_config.json"), *_eos_ids(directory / "config.json")}
    prefix, suffix = _around(backend)
    if "add_bos_token" in config or "add_eos_token" in config:
        prefix = (bos,) if config.get("add_bos_token") and bos is not None else ()
        suffix = (eos,) if config.get("add_eos_token") and eos is not None else ()
    byte_level, strips_space = _decoding(backend, path)
    return Vocabulary(
        backend=backend,
        byte_level=byte_level,
        strips_space=strips_space,
        special_ids=frozenset(special),
        bos_id=bos,
        eos_ids=frozenset(index for index in ends if index is not None),
        prefix_ids=prefix,
        suffix_ids=suffix,
        named=named,
    )


def _token_id(backend: Backend, named: Mapping[str, str], name: str) -> int | None:
    text = named.get(name)
    if text is None:
        return None
    index: int | None = backend.token_to_id(text)
    return index


def _eos_ids(path: Path) -> list[int]:
    content = read_json(path)
    inner = content.get("text_config")  # of a multimodal model
    value = content.get("eos_token_id", inner.get("eos_token_id") if isinstance(inner, dict) else None)
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int)]


def _add_later_tokens(backend: Backend, config: Mapping[str, Any], path: Path) -> None:
    """Tokens that tokenizer_config.json knows and tokenizer.json does not; their ids must be the next free ones."""
    known = backend.get_added_tokens_decoder()
    later = config.get("added_tokens_decoder") or {}
    for index in sorted(int(key) for key in later):
        if index in known:
            continue
        entry = later[str(index)]
        flags = {name: bool(entry.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "normalized")}
        special = bool(entry.get("special", False))
        backend.add_tokens([AddedToken(entry["content"], special=special, **flags)])
        if backend.token_to_id(entry["content"]) != index:
            raise TokenizerError(f"tokenizer_config.json gives {entry['content']!r} the id {index}, {path} another")


def _around(backend: Backend) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the pipeline's post-processor puts before and after a text."""
    bare = backend.encode(_MARK, add_special_tokens=False).ids
    full = backend.encode(_MARK, add_special_tokens=True).ids
    before = next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), None)
    if before is None:
        raise TokenizerError(
            "tokenizer.json changes the text's own tokens when it adds special ones; that is not known here"
        )
    return tuple(full[:before]), tuple(full[before + len(bare) :])


def _decoding(backend: Backend, path: Path) -> tuple[bool, bool]:
    """(byte_level, strips_space) of the pipeline's decoder; TokenizerError for a kind that no model here uses."""
    decoder = backend.decoder
    if decoder is None:
        raise TokenizerError(f"{path} has no decoder; only ByteLevel and SentencePiece-like pipelines are known here")
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "ByteFallback", "Fuse", "Replace"}:
        return True, False
    if kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return False, any(step["type"] == "Strip" and step.get("start") for step in steps)
    if kinds <= {"Metaspace", "ByteFallback", "Fuse"}:
        return False, any(step.get("prepend_scheme", "never") != "never" for step in steps)
    raise TokenizerError(
        f"{path} decodes with {', '.join(sorted(kinds))}; "
        "only ByteLevel and SentencePiece-like pipelines are known here"
    )
