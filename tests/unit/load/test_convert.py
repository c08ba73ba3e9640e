"""``convert``: what is written is what reading on the fly gives; interruptions, full disks, directories in use."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ostinato.errors import CheckpointError, ConversionError, UsageError
from ostinato.load import convert as module
from ostinato.load.convert import convert
from ostinato.load.quantizing import QuantizingCheckpoint
from ostinato.load.safetensors import HFCheckpoint, PackedTensor
from ostinato.load.source import WeightReader
from ostinato.quant.blocks import BlockWeight
from ostinato.quant.plan import Scheme

from ..models import tiny, tiny_qwen3_5
from .test_quantizing import Heard, same

SCHEME = Scheme(group=64)
SHARD = 20_000  # bytes: several files of a tiny model


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("moe")
    tiny_qwen3_5.reference(tiny_qwen3_5.SPECS[0]).bfloat16().save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    tiny.reference(tiny.SPECS[1]).save_pretrained(directory)
    return directory


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("shard_bytes", [SHARD, 1 << 30])
@pytest.mark.parametrize("which", ["moe", "llama"])
def test_the_directory_holds_what_reading_on_the_fly_gives(
    which: str, shard_bytes: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = HFCheckpoint(request.getfixturevalue(which))
    done = convert(source, tmp_path / "new" / "dst", SCHEME, shard_bytes=shard_bytes)
    packed, view = HFCheckpoint(done.directory), QuantizingCheckpoint(source, SCHEME)
    assert list(packed.tensors) == list(view.tensors)
    assert any(isinstance(info, PackedTensor) for info in packed.tensors.values())
    for name, info in packed.tensors.items():
        ours, theirs = packed.read(name), view.read(name)
        assert same(ours, theirs), name
        planned = view.tensors[name]
        assert (info.shape, info.type_name, info.num_bytes) == (planned.shape, planned.type_name, planned.num_bytes)
    assert packed.config == {k: v for k, v in source.config.items() if k != "quantization_config"}
    assert packed.packed is not None
    assert packed.packed["scheme"] == "int4-g64"
    assert (done.num_kept, done.num_files) == (0, len(packed.files))
    assert (done.num_files > 1) == (shard_bytes == SHARD)
    assert (done.directory / "tokenizer.json").exists() == (which == "moe")
    assert not any(path.suffix == ".partial" or path.name == module.MARKER for path in done.directory.iterdir())
    ids = tiny.random_ids(12)
    runs = [tiny.Runs(tiny.build(checkpoint)).prefill(ids) for checkpoint in (packed, view)]
    assert torch.equal(runs[0], runs[1])


def test_files_are_safetensors_for_others_too(moe: Path, tmp_path: Path) -> None:
    convert(HFCheckpoint(moe), tmp_path, SCHEME)
    theirs = load_file(tmp_path / "model.safetensors")
    packed = HFCheckpoint(tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weight = packed.read(name)
    assert isinstance(weight, BlockWeight)
    assert theirs[f"{name}.words"].shape == (8, 64, 8)
    assert torch.equal(theirs[f"{name}.words"].view(8 * 64, 8), weight.words)
    assert torch.equal(theirs[f"{name}.d"].view(8 * 64, 1), weight.d)


def test_experts_come_as_one_stack_through_the_reader(moe: Path, tmp_path: Path) -> None:
    convert(HFCheckpoint(moe), tmp_path, SCHEME)
    reader = WeightReader(HFCheckpoint(tmp_path))
    weight = reader.read("model.layers.1.mlp.experts.down_proj", (8, 64, 32))
    assert isinstance(weight, BlockWeight)
    assert weight.shape == (8 * 64, 32)


KILLED = """
import os, signal, sys
from pathlib import Path
from ostinato.load.convert import convert
from ostinato.load.safetensors import HFCheckpoint
from ostinato.quant.plan import Scheme

class Kill:
    def start(self, label, total): self.limit = total * 0.6
    def update(self, done):
        if done > self.limit: os.kill(os.getpid(), signal.SIGKILL)
    def stop(self): pass

convert(HFCheckpoint(sys.argv[1]), Path(sys.argv[2]), Scheme(group=64), shard_bytes=int(sys.argv[3]), progress=Kill())
"""


def test_a_killed_conversion_goes_on_where_it_stopped(moe: Path, tmp_path: Path) -> None:
    clean, killed = tmp_path / "clean", tmp_path / "killed"
    convert(HFCheckpoint(moe), clean, SCHEME, shard_bytes=SHARD)
    arguments = [sys.executable, "-c", KILLED, str(moe), str(killed), str(SHARD)]
    run = subprocess.run(arguments, check=False, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == -signal.SIGKILL
    finished = {path.name: path.stat().st_ino for path in killed.glob("*.safetensors")}
    assert 0 < len(finished) < len(list(clean.glob("*.safetensors")))
    assert list(killed.glob("*.partial"))
    with pytest.raises(CheckpointError, match=r"lacks config\.json"):
        HFCheckpoint(killed)
    heard = Heard()
    done = convert(HFCheckpoint(moe), killed, SCHEME, shard_bytes=SHARD, progress=heard)
    assert done.num_kept == len(finished)
    assert {name: (killed / name).stat().st_ino for name in finished} == finished  # not written again
    assert files(killed) == files(clean)
    assert heard.calls[-2][1] == heard.calls[0][1]  # skipped files count as done


def test_a_finished_conversion_is_only_looked_at(moe: Path, tmp_path: Path) -> None:
    convert(HFCheckpoint(moe), tmp_path, SCHEME, shard_bytes=SHARD)
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.iterdir()}
    done = convert(HFCheckpoint(moe), tmp_path, SCHEME, shard_bytes=SHARD)
    assert done.num_kept == done.num_files
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", ["short", "header", "gone"])
def test_a_damaged_file_is_written_again(damage: str, moe: Path, tmp_path: Path) -> None:
    done = convert(HFCheckpoint(moe), tmp_path, SCHEME, shard_bytes=SHARD)
    clean = files(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    if damage == "gone":
        shard.unlink()
    else:
        data = bytearray(shard.read_bytes())
        data[40] ^= 1
        shard.write_bytes(data if damage == "header" else shard.read_bytes()[:-9])
    again = convert(HFCheckpoint(moe), tmp_path, SCHEME, shard_bytes=SHARD)
    assert again.num_kept == done.num_files - 1
    assert files(tmp_path) == clean


def test_directories_in_use_are_left_alone(moe: Path, llama: Path, tmp_path: Path) -> None:
    def refused(source: Path, directory: Path, said: str, scheme: Scheme = SCHEME) -> None:
        before = files(directory) if directory.is_dir() else None
        with pytest.raises(ConversionError, match=said) as caught:
            convert(HFCheckpoint(source), directory, scheme)
        assert "\n" not in str(caught.value)
        assert before is None or files(directory) == before

    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("three years of work")
    refused(moe, own, r"own is not empty \(thesis.txt …\)")
    refused(moe, own / "thesis.txt", "is a file")
    refused(moe, moe, "is the source itself")
    refused(moe, llama, "is not empty")
    done = tmp_path / "done"
    convert(HFCheckpoint(moe), done, SCHEME)
    refused(llama, done, "holds a conversion to int4-g64 with head int6 of another source")
    refused(moe, done, "or with other settings", Scheme(group=32))
    refused(moe, done, "or with other settings", Scheme(group=64, head="int8"))
    with pytest.raises(UsageError, match="is packed already, as int4-g64"):
        convert(HFCheckpoint(done), tmp_path / "twice", SCHEME)


def test_a_full_disk_is_said_and_what_was_finished_stays(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda path: Usage)
        with pytest.raises(ConversionError, match=r"needs 0.1 GiB more and its disk has 0.0 GiB free"):
            convert(HFCheckpoint(moe), tmp_path, SCHEME, shard_bytes=SHARD)
    write = module.write_shard
    written = []

    def full(*arguments: Any) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*arguments)
        written.append(arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", full)
        with pytest.raises(ConversionError, match="is full: free some space and run the same command again"):
            convert(HFCheckpoint(moe), tmp_path, SCHEME, shard_bytes=SHARD)
    assert convert(HFCheckpoint(moe), tmp_path, SCHEME, shard_bytes=SHARD).num_kept == 2


def test_damaged_packed_directories_are_refused(moe: Path, tmp_path: Path) -> None:
    convert(HFCheckpoint(moe), tmp_path, SCHEME)
    config = tmp_path / "config.json"
    original = config.read_text()
    for changes, said in (({"version": 99}, "packed in version 99"), ({"version": None}, "packed in version None")):
        value = json.loads(original)
        value["quantization_config"] |= changes
        config.write_text(json.dumps(value))
        with pytest.raises(CheckpointError, match=said):
            HFCheckpoint(tmp_path)
    config.write_text(original)
    model = tmp_path / "model.safetensors"
    data = model.read_bytes()
    for old, new, said in (
        (b"down_proj.words", b"down_proj.wards", "lacks its plane words"),
        (b"down_proj.d", b"down_proj.e", r"plane d of tensor .*down_proj.* is missing"),
        (b'\\"I4_32\\"', b'\\"I4_64\\"', r"plane d of tensor .* is missing or not of shape"),
        (b'\\"I4_32\\"', b'\\"I5_32\\"', "packed as I5_32, which is not known"),
        (b'\\"kinds\\"', b'\\"minds\\"', "does not say how it is packed"),
    ):
        assert old in data
        model.write_bytes(data.replace(old, new, 1))
        with pytest.raises(CheckpointError, match=said) as caught:
            HFCheckpoint(tmp_path)
        assert "\n" not in str(caught.value)
