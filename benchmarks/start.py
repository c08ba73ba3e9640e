"""From nothing to the first token: a packed directory of random weights, and the time a process takes with it.

python benchmarks/start.py write --random qwen3.5-35b-a3b DIR    # as `ostinato convert` writes them, no tokenizer
python benchmarks/start.py first-token DIR                       # in a process of its own, the imports included
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402  # the clock starts before the imports, which are part of what is measured
import json  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from ostinato.engine.loading import EngineConfig, load_engine  # noqa: E402
from ostinato.engine.request import Request  # noqa: E402
from ostinato.engine.scheduler import Scheduler  # noqa: E402
from ostinato.load.packed_writer import index, plan_shards, write_shard  # noqa: E402
from ostinato.load.quantizing import PlannedTensor  # noqa: E402
from ostinato.load.random import RandomCheckpoint  # noqa: E402
from ostinato.load.safetensors import CONFIG, PACKED_METHOD, PACKED_VERSION, HFCheckpoint  # noqa: E402
from ostinato.quant.blocks import KINDS, BlockWeight  # noqa: E402
from ostinato.sampling import SamplingParams  # noqa: E402

SHARD_BYTES = 4 << 30
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16}


class RandomPieces:
    """Random weights as the writer of packed files asks for them."""

    def __init__(self, checkpoint: RandomCheckpoint) -> None:
        self.checkpoint = checkpoint

    def packed_pieces(self, name: str, device: torch.device) -> Iterator[tuple[int, BlockWeight]]:
        weight = self.checkpoint.read(name, device)
        assert isinstance(weight, BlockWeight)
        yield 0, weight

    def float_pieces(self, name: str, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
        values = self.checkpoint.read(name, device)
        assert isinstance(values, torch.Tensor)
        yield 0, values


def write(name: str, directory: Path) -> None:
    checkpoint = RandomCheckpoint(name)
    tensors = {}
    for info in checkpoint.tensors.values():
        kind = KINDS.get(info.type_name)
        tensors[info.name] = PlannedTensor(
            info.name,
            info.shape,
            info.type_name,
            info.num_bytes,
            kind,
            FLOATS.get(info.type_name, torch.float32),
            (),
            0,
        )
    shards = plan_shards(tensors, SHARD_BYTES, "random")
    directory.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        write_shard(shard, RandomPieces(checkpoint), directory, torch.device("cuda"))
    of_all = index(shards)
    if of_all is not None:
        (directory / of_all[0]).write_bytes(of_all[1])
    packed = {"quant_method": PACKED_METHOD, "version": PACKED_VERSION, "scheme": "int4-g128"}
    (directory / CONFIG).write_text(json.dumps({**checkpoint.config, "quantization_config": packed}))
    print(f"{sum(shard.num_bytes for shard in shards) / 1e9:.2f} GB in {directory}")


def first_token(directory: Path) -> None:
    imported = time.perf_counter()
    loaded = load_engine(HFCheckpoint(directory), EngineConfig(device="cuda", context=4096))
    torch.cuda.synchronize()
    ready = time.perf_counter()
    scheduler = Scheduler(loaded.runner, loaded.budget.context)
    prompt = tuple(torch.randint(loaded.model.vocab_size, (64,)).tolist())
    sequence = scheduler.add(Request(prompt, SamplingParams(temperature=0.8, max_tokens=16), frozenset()))
    first = 0.0
    while scheduler.has_work:
        if scheduler.step() and not first:
            first = time.perf_counter()
    ended = time.perf_counter()
    print(
        f"first token after {first - STARTED:.2f} s: imports {imported - STARTED:.2f}, weights {ready - imported:.2f}, "
        f"prompt of {len(prompt)} {first - ready:.2f}; 16 tokens, the capture among them, after {ended - STARTED:.2f} s"
    )
    assert len(sequence.tokens) == 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["write", "first-token"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--random", default="qwen3.5-35b-a3b")
    args = parser.parse_args()
    if args.mode == "write":
        write(args.random, args.directory)
    else:
        first_token(args.directory)


if __name__ == "__main__":
    main()
