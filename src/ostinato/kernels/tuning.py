"""Tile sizes: measured ones from a table per GPU type, so that nobody waits for an autotuner at start.

A table is JSON: key → the fields of Tiles. The packaged one is ``tuned/<GPU name with underscores>.json``; a file of
the same name in ``~/.cache/ostinato/tuned`` is laid over it. ``benchmarks/kernels_linear.py`` measures and writes them.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ostinato.errors import KernelError

PACKAGED = Path(__file__).parent / "tuned"
USER_CACHE = Path("~/.cache/ostinato/tuned")


@dataclass(frozen=True)
class Tiles:
    """How a product is cut into programs.

    path: which kernel. rows: of W a tile. groups: of 32 columns a tile. tokens: rows of x a program.
    repeats: tiles of W that one program takes in turn. splits: parts of the columns, summed by a second kernel.
    """

    path: str
    rows: int
    groups: int
    tokens: int
    warps: int
    repeats: int = 1
    splits: int = 1
    stages: int = 2


def linear_key(kind: str, n: int, k: int, m: int, gated: bool) -> str:
    """The table's key of a product; m counts in powers of two, since tiles change no faster."""
    bucket = 1 << (m - 1).bit_length()
    return f"{kind} {n}x{k} m{bucket}{' gated' if gated else ''}"


def file_name(gpu: str) -> str:
    """``NVIDIA H200`` → ``NVIDIA_H200.json``."""
    return gpu.replace(" ", "_").replace("/", "_") + ".json"


@functools.cache
def table(gpu: str) -> dict[str, Tiles]:
    """The measured tiles of a GPU type; empty for one that was never measured."""
    found: dict[str, Tiles] = {}
    for folder in (PACKAGED, USER_CACHE.expanduser()):
        path = folder / file_name(gpu)
        if path.is_file():
            found.update(read(path))
    return found


def read(path: Path) -> dict[str, Tiles]:
    """The table in a file; raises KernelError where it is none."""
    try:
        return {key: Tiles(**entry) for key, entry in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise KernelError(f"{path} is no table of tile sizes ({error}): delete it or measure again") from error


def write(path: Path, tiles: dict[str, Tiles]) -> None:
    """Store a table, one line an entry, sorted."""
    lines = [f"  {json.dumps(key)}: {json.dumps(asdict(tiles[key]))}" for key in sorted(tiles)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
