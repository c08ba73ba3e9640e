"""How a byte-level BPE vocabulary wants its text cut into words before merging.

A GGUF file names this in ``tokenizer.ggml.pre``. The regular expressions are those of the vocabularies' own
``tokenizer.json`` files; where several expressions are listed, each splits further what the one before has left.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

from ostinato.errors import TokenizerError


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting text into words.

    splits         regular expressions (Oniguruma), applied one after the other; matches and gaps are both words
    nfc            Unicode normalization form C comes first
    ignore_merges  a word that is itself a token is taken whole, whatever the merges say
    add_bos        what holds where the file does not say ``tokenizer.ggml.add_bos_token``
    """

    splits: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The splits, followed by GPT-2's map from bytes to printable characters."""
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(split), behavior="isolated") for split in self.splits
        ]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(steps)


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s+(?!\S)|\s+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACES
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|" + _SPACES
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|" + _SPACES
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|" + _SPACES

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|" + _SPACES
_GPT4O = "|".join((_CASED_WORD % (_CONTRACTIONS + "?", _CONTRACTIONS + "?"), r"\p{N}{1,3}", _CASED_REST))
_TEKKEN = "|".join((_CASED_WORD % ("", ""), r"\p{N}", _CASED_REST))

_KANA_HAN = "[一-龥\u3040-ゟ゠-ヿ]+"
_DEEPSEEK_WORD = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|" + _SPACES
)
# Cased letters as DeepSeek-LLM's tokenizer.json lists them. Code points, because several of these letters
# (the Kelvin sign, Greek with tonos) turn into others when an editor normalizes the file.
_DEEPSEEK_LLM_RANGES = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C "
    "38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B "
    "1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 "
    "1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 "
    "2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B "
    "2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 "
    "FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF "
    "1E900-1E943 "
)
_DEEPSEEK_LLM_LETTERS = "".join(
    "-".join(chr(int(code, 16)) for code in span.split("-")) for span in _DEEPSEEK_LLM_RANGES.split()
)
_CJK_HANGUL = "[一-龥\u0800-一가-\ud7ff]+"

_SINGLE_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_PLAIN_GPT2 = PreTokenizer((_GPT2,))
_PLAIN_QWEN2 = PreTokenizer((_QWEN2,))
_DEEPSEEK_V3 = PreTokenizer((r"\p{N}{1,3}", _KANA_HAN, _DEEPSEEK_WORD))
_PLAIN_GPT4O = PreTokenizer((_GPT4O,))
_WHOLE_LLAMA3 = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_PLAIN_LLAMA3 = PreTokenizer((_LLAMA3,))
_BLOOM = PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+",))
_BAILING = PreTokenizer(
    (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|" + _SPACES,)
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    # GPT-2's own words
    "gpt-2": _PLAIN_GPT2,
    "gpt2": _PLAIN_GPT2,
    "phi-2": _PLAIN_GPT2,
    "gigachat": _PLAIN_GPT2,
    "a.x-4.0": _PLAIN_GPT2,
    "mellum": _PLAIN_GPT2,
    "exaone4": _PLAIN_GPT2,
    "jais": _PLAIN_GPT2,
    "trillion": _PLAIN_GPT2,
    "granite-docling": _PLAIN_GPT2,
    # GPT-NeoX's vocabulary and its descendants normalize
    "mpt": PreTokenizer((_GPT2,), nfc=True),
    "olmo": PreTokenizer((_GPT2,), nfc=True),
    # every digit a word
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "command-r": _SINGLE_DIGITS,
    "codeshell": _SINGLE_DIGITS,
    "exaone": _SINGLE_DIGITS,
    "minerva-7b": _SINGLE_DIGITS,
    "mellum2": _SINGLE_DIGITS,
    # Llama 3
    "llama-bpe": _WHOLE_LLAMA3,
    "llama3": _WHOLE_LLAMA3,
    "llama-v3": _WHOLE_LLAMA3,
    "falcon3": _WHOLE_LLAMA3,
    "falcon-h1": _WHOLE_LLAMA3,
    "pixtral": _WHOLE_LLAMA3,
    "midm-2.0": _WHOLE_LLAMA3,
    "lfm2": _WHOLE_LLAMA3,
    "dbrx": _PLAIN_LLAMA3,
    "smaug-bpe": _PLAIN_LLAMA3,
    "glm4": _PLAIN_LLAMA3,
    "chatglm-bpe": _PLAIN_LLAMA3,
    # Qwen
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    "qwen35": PreTokenizer((_QWEN35,), nfc=True),
    "deepseek-r1-qwen": _PLAIN_QWEN2,
    "megrez": _PLAIN_QWEN2,
    "stablelm2": _PLAIN_QWEN2,
    "hunyuan": _PLAIN_QWEN2,
    "solar-open": _PLAIN_QWEN2,
    "grok-2": _PLAIN_QWEN2,
    # DeepSeek
    "deepseek-v3": _DEEPSEEK_V3,
    "hunyuan-dense": _DEEPSEEK_V3,
    "joyai-llm": _DEEPSEEK_V3,
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_HANGUL, r"\p{N}")),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LLM_LETTERS}]+",
            "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
            r"\s+$",
            _CJK_HANGUL,
            r"\p{N}+",
        )
    ),
    # words that know upper from lower case
    "gpt-4o": _PLAIN_GPT4O,
    "llama4": _PLAIN_GPT4O,
    "kanana2": _PLAIN_GPT4O,
    "minimax-m2": _PLAIN_GPT4O,
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    # others
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "bloom": _BLOOM,
    "poro-chat": _BLOOM,
    "gpt3-finnish": _BLOOM,
    "viking": PreTokenizer((*_BLOOM.splits, r"\p{N}")),
    "bailingmoe": _BAILING,
    "bailingmoe2": _BAILING,
    "llada-moe": _BAILING,
    "seed-coder": PreTokenizer(
        (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|" + _SPACES,)
    ),
}


def pre_tokenizer_named(name: str) -> PreTokenizer:
    """The pre-tokenizer that a file calls ``name``; TokenizerError when nobody here knows it."""
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        raise TokenizerError(
            f"the GGUF file asks for the pre-tokenizer {name!r}, which is not known here; "
            "use the model's Hugging Face directory, whose tokenizer.json says it in full"
        ) from None
