"""What ``ostinato convert`` needs: GPU and host memory, and time, for a checkpoint of a model's full width.

    python benchmarks/convert_memory.py DIRECTORY [--random qwen3.5-35b-a3b] [--layers 4] [--quant int4]

Writes random bfloat16 weights of the model's first layers into DIRECTORY/source, a file a layer, and converts them into
DIRECTORY/packed. Tensors are quantized one after the other, so more layers take more time and no more memory. Host
memory is what the process allocated itself (anonymous pages): the source is mapped, and its pages belong to the cache.
"""

from __future__ import annotations

import argparse
import json
import math
import threading
import time
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from ostinato.load.convert import convert
from ostinato.load.random import RandomCheckpoint
from ostinato.load.resolve import resolve
from ostinato.load.safetensors import HFCheckpoint
from ostinato.quant.plan import parse_scheme

GB = 1e9


class HostMemory:
    """Watches the anonymous memory of this process; ``peak`` is in bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> HostMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status tells no RssAnon: this benchmark runs on Linux")


def write_source(directory: Path, name: str, num_layers: int, device: str) -> int:
    """Random bfloat16 weights as a Hugging Face checkpoint; returns their number."""
    random = RandomCheckpoint(name, num_layers=num_layers)
    directory.mkdir(parents=True)
    files: dict[str, list[str]] = defaultdict(list)
    for key in random.tensors:
        parts = key.split(".")
        files[parts[2] if parts[1] == "layers" else parts[-2]].append(key)
    generator = torch.Generator(device).manual_seed(0)
    weight_map = {}
    for stem, keys in files.items():
        tensors = {
            key: (0.02 * torch.randn(random.tensors[key].shape, device=device, generator=generator)).bfloat16().cpu()
            for key in keys
        }
        file_name = f"model-{stem}.safetensors"
        save_file(tensors, directory / file_name, {"format": "pt"})
        weight_map.update(dict.fromkeys(keys, file_name))
    total = sum(2 * math.prod(info.shape) for info in random.tensors.values())
    listing = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(listing))
    (directory / "config.json").write_text(json.dumps(dict(random.config)))
    return total // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--random", default="qwen3.5-35b-a3b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--quant", default="int4")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    count = write_source(args.directory / "source", args.random, args.layers, args.device)
    opened = resolve(str(args.directory / "source")).open()
    assert isinstance(opened, HFCheckpoint)
    on_gpu = args.device.startswith("cuda")
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before, began = anonymous_bytes(), time.perf_counter()
    with HostMemory() as host:
        done = convert(opened, args.directory / "packed", parse_scheme(args.quant, "int6"), device=args.device)
    seconds = time.perf_counter() - began
    print(
        f"{count / 1e9:.2f} G weights in {args.layers} layers: {seconds:.1f} s, {done.num_bytes / GB:.2f} GB,"
        f" {done.bits_per_weight:.2f} bits per weight"
    )
    if on_gpu:
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        print(f"GPU memory: {allocated / GB:.2f} GB in tensors, {reserved / GB:.2f} GB taken from the GPU")
    print(f"host memory: {host.peak / GB:.2f} GB at most, {before / GB:.2f} GB before it began")


if __name__ == "__main__":
    main()
