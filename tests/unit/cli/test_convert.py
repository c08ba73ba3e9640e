"""``ostinato convert`` and --quant: what is printed, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ostinato.cli.main import execute

from ..models import tiny as models_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer of one token a byte."""
    directory = tmp_path_factory.mktemp("llama")
    models_tiny.reference(models_tiny.SPECS[0]).save_pretrained(directory)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: models_tiny.VOCAB]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return directory


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[int]:
    common = ["--raw", "--json", "--device", "cpu", "--max-tokens", "6", "--temperature", "0", "--context", "64"]
    assert execute(["generate", *arguments, *common]) == 0
    ids: list[int] = json.loads(capsys.readouterr().out)["token_ids"]
    return ids


def test_converted_and_on_the_fly_answer_alike(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    assert execute(["convert", str(checkpoint), str(packed), "--quant", "int4-g32", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "bits per weight), 1 files" in told
    assert f"ostinato generate {packed}" in told
    assert execute(["convert", str(checkpoint), str(packed), "--quant", "int4-g32", "--device", "cpu"]) == 0
    assert "1 of 1 files were complete already" in capsys.readouterr().out
    assert answer(capsys, str(packed), "abc") == answer(capsys, str(checkpoint), "abc", "--quant", "int4-g32")


def test_inspect_tells_the_types(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "packed"
    execute(["convert", str(checkpoint), str(packed), "--head", "int8", "--device", "cpu"])
    capsys.readouterr()
    assert execute(["inspect", str(checkpoint), "--quant", "int4", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["file_format"] == "safetensors, as it would be in int4-g64"
    assert execute(["inspect", str(packed), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file_format"] == "safetensors, packed as int4-g64"
    assert {kind["type_name"] for kind in planned["types"]} == {"I4_64", "I4_32", "I6_64", "F32"}
    assert {kind["type_name"] for kind in found["types"]} == {"I4_64", "I4_32", "I8_64", "F32"}
    assert found["num_parameters"] == planned["num_parameters"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", "{gguf}", "{new}"], "is a GGUF file, quantized already"),
        (["convert", "{model}", "{new}", "--quant", "int7"], "--quant int7 is not known; use int4, int4-g32"),
        (["convert", "{model}", "{new}", "--head", "int4"], "--head int4 is not known; use int6 or int8"),
        (["convert", "{model}", "{model}"], "is the source itself"),
        (["convert", "/no/such", "{new}"], "no such file or directory"),
        (["generate", "{gguf}", "hi", "--quant", "int4"], "is a GGUF file, quantized already"),
        (["bench", "--random", "smollm2-135m", "--quant", "int4"], "leave --quant out"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], said: str, checkpoint: Path, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [a.format(gguf=tiny, model=checkpoint, new=tmp_path / "new") for a in arguments]
    assert execute(given) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert said in told.err
    assert told.err.count("\n") == 1
    assert not (tmp_path / "new").exists()
