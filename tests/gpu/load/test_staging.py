"""Bytes of a file on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ostinato.errors import CheckpointError
from ostinato.load.staging import PIECE_BYTES, staging

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("count", [1, 4097, PIECE_BYTES, 9 * PIECE_BYTES + 13])
def test_all_bytes_arrive(tmp_path: Path, count: int) -> None:
    data = torch.randint(0, 256, (count + 100,), dtype=torch.uint8)
    path = tmp_path / "data"
    path.write_bytes(data.numpy().tobytes())
    for _ in range(3):  # buffers are used again
        with torch.inference_mode():
            target = torch.full((count + 2,), 7, dtype=torch.uint8, device=CUDA)
            staging(CUDA).read(path, 57, target[1:-1])
        assert torch.equal(target[1:-1].cpu(), data[57 : 57 + count])
        assert target[0] == target[-1] == 7


def test_a_file_that_shrank_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(1000))
    with pytest.raises(CheckpointError, match=r"cannot read .*data: the file ended early"):
        staging(CUDA).read(path, 500, torch.empty(501, dtype=torch.uint8, device=CUDA))


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*data: No such file"):
        staging(CUDA).read(tmp_path / "data", 0, torch.empty(8, dtype=torch.uint8, device=CUDA))
