"""Token ids are those of transformers, on generated Unicode and special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GemmaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.integrations.ggml import GGUFLlamaConverter
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from ostinato.errors import TokenizerError, UsageError
from ostinato.text import Tokenizer
from ostinato.text.pretokenizers import PRE_TOKENIZERS

from .vocabularies import CONTROL, CORPUS, byte_level, character, texts

MANY = settings(max_examples=200, deadline=None)


def _as_dicts(metadata: dict[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocabulary = {token: at for at, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    return vocabulary, [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]


@pytest.fixture(scope="module")
def from_gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What transformers makes of a GGUF file with the byte-level vocabulary (it always cuts as GPT-2 does)."""
    directory = tmp_path_factory.mktemp("gguf")
    metadata = byte_level("gpt-2")
    writer = GGUFWriter(directory / "tiny.gguf", "llama")
    for name in ("block_count", "context_length", "embedding_length", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{name}")(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    # transformers knows no user-defined tokens, so they are control tokens for this comparison.
    writer.add_token_types([3 if kind == 4 else int(kind) for kind in metadata["tokenizer.ggml.token_type"]])
    writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoTokenizer.from_pretrained(directory, gguf_file="tiny.gguf")


@MANY
@given(text=texts(*CONTROL, "<tool>"))
def test_gpt2_words_as_transformers_reads_the_file(from_gguf_file: Any, text: str) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level("gpt-2"))
    assert tokenizer.encode(text) == from_gguf_file(text)["input_ids"]


@MANY
@given(text=texts(*CONTROL, "<tool>"))
def test_smollm_words_take_every_digit_alone(from_gguf_file: Any, text: str) -> None:
    reference = from_gguf_file.backend_tokenizer
    before = reference.pre_tokenizer
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    try:
        expected = reference.encode(text).ids
    finally:
        reference.pre_tokenizer = before
    assert Tokenizer.from_gguf(byte_level("smollm")).encode(text) == expected


@pytest.mark.parametrize(("pre", "reference_class"), [("qwen2", Qwen2Tokenizer), ("qwen35", Qwen3_5Tokenizer)])
def test_qwen_words_as_in_transformers(pre: str, reference_class: Any) -> None:
    metadata = byte_level(pre)
    tokenizer = Tokenizer.from_gguf(metadata)
    vocabulary, merges = _as_dicts(metadata)
    reference = reference_class(vocab=vocabulary, merges=merges)
    reference.add_special_tokens({"additional_special_tokens": CONTROL})
    reference.add_tokens(["<tool>", "    "])

    @MANY
    @given(text=texts(*CONTROL, "<tool>"))
    def same(text: str) -> None:
        assert tokenizer.encode(text) == reference(text, add_special_tokens=False)["input_ids"]

    same()


@pytest.mark.parametrize("add_space", [True, False])
def test_sentencepiece_as_in_transformers(add_space: bool) -> None:
    metadata = character("llama", add_space_prefix=add_space)
    tokenizer = Tokenizer.from_gguf(metadata)
    reference = GGUFLlamaConverter(
        {
            "tokenizer_type": "llama",
            "tokens": metadata["tokenizer.ggml.tokens"],
            "scores": metadata["tokenizer.ggml.scores"],
            "token_type": metadata["tokenizer.ggml.token_type"],
            "bos_token_id": 2,
            "eos_token_id": 1,
            "unk_token_id": 3,
            "add_prefix_space": add_space,
        }
    ).converted()

    @MANY
    @given(text=texts("<s>", "</s>"))
    def same(text: str) -> None:
        ids = tokenizer.encode(text, add_special=False)
        assert ids == reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == [2, *ids]

    same()


def test_gemma_words_as_in_transformers() -> None:
    metadata = character("gemma4", add_bos_token=False)
    tokenizer = Tokenizer.from_gguf(metadata)
    vocabulary, merges = _as_dicts(metadata)
    reference = GemmaTokenizer(vocab=vocabulary, merges=merges, eos_token="</s>", bos_token="<s>", mask_token="<pad>")

    @MANY
    @given(text=texts("<s>", "</s>"))
    def same(text: str) -> None:
        # The file says "no first token" by mistake; Gemma 4 always gets it.
        assert tokenizer.encode(text) == [2, *reference(text, add_special_tokens=False)["input_ids"]]

    same()


@pytest.mark.parametrize(
    "metadata", [byte_level("smollm"), byte_level("qwen2"), character("llama"), character("gemma4")]
)
def test_text_comes_back(metadata: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_gguf(metadata)
    for line in CORPUS:
        assert tokenizer.decode(tokenizer.encode(line), skip_special=True) == line


@MANY
@given(text=texts(*CONTROL))
def test_every_unicode_text_comes_back(text: str) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level("smollm"))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_the_text(pre: str) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level(pre))
    for line in CORPUS:
        assert tokenizer.decode(tokenizer.encode(line, add_special=False)) == line


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "I'll pay 1234", ["I", "'ll", " pay", " 1234"]),
        ("smollm", "pay  12", ["pay", "  ", "1", "2"]),
        ("llama-bpe", "I'LL pay 12345\n\n", ["I", "'LL", " pay", " ", "123", "45", "\n\n"]),
        ("qwen2", "x=12", ["x", "=", "1", "2"]),
        ("deepseek-v3", "#include 漢字か 12345", ["#include", " ", "漢字か", " ", "123", "45"]),
        ("gpt-4o", "HTTPServer it's 1234", ["HTTPServer", " it's", " ", "123", "4"]),
        ("tekken", "helloWorld 12", ["hello", "World", " ", "1", "2"]),
        ("falcon", "a1234!?", ["a", "123", "4", "!?"]),
    ],
)
def test_words_of_the_pre_tokenizers(pre: str, text: str, words: list[str]) -> None:
    found = [text[start:end] for _, (start, end) in PRE_TOKENIZERS[pre].build().pre_tokenize_str(text)]
    assert found == words


def test_special_tokens() -> None:
    tokenizer = Tokenizer.from_gguf(byte_level("smollm"))
    tool = tokenizer.vocab_size - 2
    assert tokenizer.encode("<|im_end|>") == [2]
    as_text = tokenizer.encode("<|im_end|>", parse_special=False)
    assert len(as_text) > 1
    assert tokenizer.decode(as_text, skip_special=True) == "<|im_end|>"
    # user-defined tokens are text, so they are found either way, and never left out
    assert tokenizer.encode("<tool>", parse_special=False) == tokenizer.encode("<tool>") == [tool]
    assert tokenizer.decode([1, tool, 2], skip_special=True) == "<tool>"
    assert tokenizer.decode([1, tool, 2]) == "<|im_start|><tool><|im_end|>"
    assert tokenizer.is_special(2)
    assert not tokenizer.is_special(tool)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {0, 2})
    assert tokenizer.token_id("<tool>") == tool
    assert tokenizer.token_id("no such token") is None


def test_first_and_last_tokens() -> None:
    plain = Tokenizer.from_gguf(byte_level("smollm")).encode("hello")
    assert Tokenizer.from_gguf(byte_level("smollm", add_bos_token=True)).encode("hello") == [1, *plain]
    assert Tokenizer.from_gguf(byte_level("smollm", add_eos_token=True)).encode("hello") == [*plain, 2]
    both = Tokenizer.from_gguf(byte_level("smollm", add_bos_token=True, add_eos_token=True))
    assert both.encode("hello", add_special=False) == plain
    assert Tokenizer.from_gguf(byte_level("llama-bpe")).encode("")[0] == 1  # Llama 3's files need not say it
    assert Tokenizer.from_gguf(byte_level("smollm", eot_token_id=0, eom_token_id=5)).eos_ids == {0, 2, 5}


def test_words_that_are_tokens_are_taken_whole_where_the_vocabulary_says_so() -> None:
    metadata = byte_level("llama-bpe", add_bos_token=False)
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "xqzj"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    whole = Tokenizer.from_gguf(metadata)
    assert whole.encode("xqzj") == [whole.vocab_size - 1]
    assert len(Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": "dbrx"}).encode("xqzj")) > 1


def test_bytes_stand_in_for_unknown_characters() -> None:
    tokenizer = Tokenizer.from_gguf(character("llama"))
    ids = tokenizer.encode("ꙮ", add_special=False)
    assert ids[1:] == [4 + byte for byte in "ꙮ".encode()]
    assert tokenizer.decode(ids) == "ꙮ"
    assert tokenizer.decode(ids[:-1]) == "\ufffd"


def test_the_space_of_sentencepiece() -> None:
    tokenizer = Tokenizer.from_gguf(character("llama"))
    assert tokenizer.encode("the", add_special=False) == tokenizer.encode("<s>the", add_special=False)[1:]
    assert tokenizer.decode(tokenizer.encode(" the")) == "<s>  the"  # the space, and the one of the vocabulary
    assert tokenizer.decode(tokenizer.encode(" the"), skip_special=True) == " the"


def test_a_padding_row_of_the_embedding_is_no_text() -> None:
    tokenizer = Tokenizer.from_gguf(byte_level("smollm"))
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""
    with pytest.raises(ValueError, match="not negative"):
        tokenizer.piece(-1)


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(UsageError, match="lone surrogate at character 2"):
        Tokenizer.from_gguf(byte_level("smollm")).encode("ab\udc80")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": None}, "no tokenizer"),
        ({"tokenizer.ggml.model": "rwkv"}, "kind 'rwkv'"),
        ({"tokenizer.ggml.pre": "kimi-k9"}, "pre-tokenizer 'kimi-k9'"),
        ({"tokenizer.ggml.tokens": []}, "lacks tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, "lacks tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["ab"]}, "is no pair"),
        ({"tokenizer.ggml.merges": ["qq zz"]}, "do not fit together"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "2 token types"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id is 1000000"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "1 tokens twice"),
    ],
)
def test_broken_files(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_gguf(byte_level("smollm") | change)
    assert "\n" not in str(caught.value)


def _save(metadata: dict[str, Any], directory: Path, **config: Any) -> Any:
    """A Hugging Face directory with the vocabulary of ``metadata``; returns transformers' tokenizer for it."""
    backend = Tokenizer.from_gguf(metadata)._backend
    backend.decoder = json_decoder(metadata["tokenizer.ggml.model"])
    names = {f"{name}_token": token for name, token in config.pop("names", {}).items()}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names, **config).save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def json_decoder(kind: str) -> Any:
    from tokenizers import decoders

    if kind == "gpt2":
        return decoders.ByteLevel()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if kind == "llama" else steps)


@pytest.mark.parametrize("add_bos", [None, True])
@pytest.mark.parametrize("metadata", [byte_level("qwen2"), character("llama"), character("gemma4")])
def test_directories_as_in_transformers(tmp_path: Path, metadata: dict[str, Any], add_bos: bool | None) -> None:
    bos, eos = (metadata["tokenizer.ggml.tokens"][metadata[f"tokenizer.ggml.{n}_token_id"]] for n in ("bos", "eos"))
    config = {} if add_bos is None else {"add_bos_token": add_bos}
    reference = _save(metadata, tmp_path, names={"bos": bos, "eos": eos}, **config)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 9}}))  # as multimodal models do
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.eos_ids == {metadata["tokenizer.ggml.eos_token_id"], 7, 8, 9}
    assert tokenizer.bos_id == metadata["tokenizer.ggml.bos_token_id"]

    @settings(max_examples=100, deadline=None)
    @given(text=texts(bos, eos))
    def same(text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids == reference(text)["input_ids"]
        assert tokenizer.decode(ids) == reference.decode(ids)

    same()


def test_directories_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.from_directory(tmp_path)
    _save(byte_level("smollm"), tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(state | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}})
    )
    with pytest.raises(TokenizerError, match="decodes with WordPiece"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state | {"decoder": None}))
    with pytest.raises(TokenizerError, match="no decoder"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(TokenizerError, match="JSON object"):
        Tokenizer.from_directory(tmp_path)


def test_tokens_that_only_the_configuration_knows(tmp_path: Path) -> None:
    _save(byte_level("smollm"), tmp_path)
    size = Tokenizer.from_directory(tmp_path).vocab_size
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    later = {str(size): {"content": "<later>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": later}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("<later>") == [size]
    assert tokenizer.is_special(size)
    later = {str(size + 3): {"content": "<later>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": later}))
    with pytest.raises(TokenizerError, match="another"):
        Tokenizer.from_directory(tmp_path)
