"""The tables of tile sizes."""

import pytest

from ostinato.errors import KernelError
from ostinato.kernels import tuning
from ostinato.kernels.tuning import Tiles, linear_key
from ostinato.quant.blocks import KINDS

PATHS = {"resident", "streamed", "mma", "wide", "packed", "tile", "gemm"}


def test_a_table_survives_writing(tmp_path):
    tiles = {
        linear_key("Q4_0", 64, 32, 5, True): Tiles("mma", 16, 0, 8, 2),
        linear_key("Q4_0", 64, 32, 1, False): Tiles("resident", 4, 1, 1, 4, repeats=2),
    }
    tuning.write(tmp_path / "a" / "table.json", tiles)
    assert tuning.read(tmp_path / "a" / "table.json") == tiles
    assert set(tiles) == {"Q4_0 64x32 m8 gated", "Q4_0 64x32 m1"}


@pytest.mark.parametrize("text", ["{", "[1]", '{"key": {"path": "mma", "colour": 3}}'])
def test_a_broken_table_is_named(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(KernelError, match=r"table\.json is no table of tile sizes"):
        tuning.read(path)


def test_the_users_table_is_laid_over_the_packaged_one(tmp_path, monkeypatch):
    for folder, rows in (("packaged", 1), ("user", 2)):
        tiles = Tiles("mma", rows, 0, 8, 2)
        tuning.write(tmp_path / folder / tuning.file_name("A GPU/2"), {folder: tiles, "both": tiles})
    monkeypatch.setattr(tuning, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(tuning, "USER_CACHE", tmp_path / "user")
    tuning.table.cache_clear()
    found = tuning.table("A GPU/2")
    tuning.table.cache_clear()
    assert {key: tiles.rows for key, tiles in found.items()} == {"packaged": 1, "user": 2, "both": 2}


def test_packaged_tables_name_known_kinds_and_paths():
    for path in tuning.PACKAGED.glob("*.json"):
        for key, tiles in tuning.read(path).items():
            assert key.split()[0] in KINDS
            assert tiles.path in PATHS
