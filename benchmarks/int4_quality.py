"""What four bits cost: KL divergence and top-1 agreement on a fixed text, and the error of each kind at full size.

    python benchmarks/int4_quality.py [MODEL] [--no-spread] [--errors-only] [--json FILE]

MODEL: a Hugging Face directory, or a GGUF file, whose matrices are dequantized and quantized anew (default: the default
model). Every scheme runs in float32 against the same model unquantized, so that nothing but the weights differs.

The weights of a Q4 file lie on a grid that a scheme with the same groups may meet exactly, which would flatter it. So
each matrix of a GGUF file is first spread uniformly within its steps; the reference is that model. ``--no-spread``
leaves it as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ostinato.engine.loading import EngineConfig, load_engine
from ostinato.load.gguf import GGUFFile
from ostinato.load.quantizing import QuantizingCheckpoint
from ostinato.load.resolve import resolve
from ostinato.load.safetensors import HFCheckpoint
from ostinato.quant.blocks import KINDS, BlockKind, BlockWeight, dequantize, scales
from ostinato.quant.gguf import GGUF_TYPES, pack
from ostinato.quant.gguf_encode import encode
from ostinato.quant.int4 import QUANTIZABLE, quantize
from ostinato.quant.plan import Scheme
from ostinato.sampling import SamplingParams
from ostinato.text import Tokenizer

SCHEMES = tuple(Scheme(group, head) for group in (32, 64, 128) for head in ("int8", "int6"))
BASELINES = ("Q4_0", "Q4_1")  # llama.cpp's rounding in groups of 32, with the output in int8: 4.5 and 5 bits a weight

TEXT = """\
The tide tables hung behind the counter of the ferry office, yellow at the edges and corrected in three different inks.
Nobody under fifty could read them. The younger crew looked at their telephones, which told them the hour of high water
to the second and nothing about the sandbar that had moved in February. Old Henrik could read the tables, and he could
read the sandbar too: a line of shorter waves, a change of green, a place where the gulls stood instead of swimming.

In mathematics, a prime number is a whole number greater than one that cannot be formed by multiplying two smaller whole
numbers. There are infinitely many of them; the oldest known proof is due to Euclid. Suppose that there were only
finitely many, multiply all of them together and add one. The result leaves a remainder of one when it is divided by any
of them, so its prime factors are not in the list, which was supposed to be complete.

def binary_search(values, wanted):
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if values[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low if low < len(values) and values[low] == wanted else -1

To make the dough, mix 500 g of flour with 325 g of lukewarm water, 10 g of salt and 3 g of dry yeast. Knead it for ten
minutes, until it is smooth and comes away from the bowl. Let it rise under a cloth for two hours; it should double in
size. Shape a loaf, let it rest for another forty minutes, and bake it at 230 degrees, the first quarter of an hour with
a bowl of hot water on the floor of the oven. It is done when it sounds hollow.

Q: Why does ice float on water?
A: Because it is less dense. When water freezes, its molecules arrange themselves in an open hexagonal lattice, which
takes up about nine percent more room than the same molecules do in the liquid. Most substances do the opposite. If ice
sank, lakes would freeze from the bottom, and few fish would survive the winter.
"""

# Matrices of well-known models: (rows, columns). Rows are independent, so that 2048 of them tell as much as all.
SHAPES = {
    "Qwen3.5-35B-A3B, linear attention in": (12288, 2048),
    "Qwen3.5-35B-A3B, attention out": (2048, 4096),
    "Qwen3.5-35B-A3B, experts gate/up": (1024, 2048),
    "Qwen3.5-35B-A3B, experts down": (2048, 512),
    "Qwen3.5-35B-A3B, output": (248320, 2048),
    "Llama-3.1-8B, down": (4096, 14336),
}


class Requantized(GGUFFile):
    """A GGUF file whose quantized matrices are spread within their steps and, with a scheme, quantized again."""

    def __init__(self, path: Path, scheme: Scheme | str | None, spread: bool) -> None:
        super().__init__(path)
        self._scheme, self._spread = scheme, spread

    def read(self, name: str, device: torch.device | str = "cpu") -> BlockWeight | torch.Tensor:
        weight = super().read(name, device)
        shape = self.tensors[name].shape
        if isinstance(weight, torch.Tensor):
            if len(shape) < 2:
                return weight
            dense = weight.float()
        else:
            dense = dequantize(weight)
            if self._spread:
                generator = torch.Generator().manual_seed(sum(name.encode()))
                step = scales(weight)[0].abs().repeat_interleave(weight.kind.group, 1)
                dense += step * (torch.rand(dense.shape, generator=generator) - 0.5)
        hf_name = {"token_embd.weight": "embed_tokens.weight", "output.weight": "lm_head.weight"}.get(name, name)
        if isinstance(self._scheme, str):
            gguf_type = GGUF_TYPES[self._scheme]
            if hf_name == name:
                again = pack(encode(dense, gguf_type), gguf_type, shape[-1])
                assert isinstance(again, BlockWeight)
                return dequantize(again)
            return dequantize(quantize(dense, KINDS["I8_64"]))
        kind = None if self._scheme is None else self._scheme.kind_for(hf_name, shape)
        return dense if kind is None else dequantize(quantize(dense, kind))


def log_probabilities(opened: Any, ids: list[int]) -> torch.Tensor:
    """After each token: float64 [n, vocab]."""
    loaded = load_engine(opened, EngineConfig(dtype="float32", context=len(ids) + 1, graphs=False))
    try:
        loaded.runner.admit(0, SamplingParams(), ids, (), len(ids))
        with torch.inference_mode():
            return loaded.runner.logits(0, ids, 0).double().cpu().log_softmax(-1)
    finally:
        loaded.runner.close()


def compare(model: str | None, spread: bool) -> list[dict[str, Any]]:
    """One entry for each scheme."""
    path = resolve(model).path
    open_as: Callable[[Any], Any]
    if path.is_dir():
        tokenizer = Tokenizer.from_directory(path)

        def open_as(scheme: Any) -> Any:
            source = HFCheckpoint(path)
            return source if scheme is None else QuantizingCheckpoint(source, scheme)
    else:
        tokenizer = Tokenizer.from_gguf(GGUFFile(path).metadata)

        def open_as(scheme: Any) -> Any:
            return Requantized(path, scheme, spread)

    ids = tokenizer.encode(TEXT)
    target = torch.tensor(ids[1:])[:, None]
    exact = log_probabilities(open_as(None), ids)
    entries = []
    base = -float(exact[:-1].gather(1, target).mean())
    print(f"{len(ids)} tokens, perplexity {math.exp(base):.3f} unquantized")
    print(f"{'scheme':12} {'head':5} {'mean KL':>8} {'99 %':>7} {'largest':>8} {'top-1':>7} {'perplexity':>11}")
    schemes: list[Scheme | str] = [*SCHEMES, *(() if path.is_dir() else BASELINES)]
    for scheme in schemes:
        found = log_probabilities(open_as(scheme), ids)
        kl = (exact.exp() * (exact - found)).sum(-1)
        entry = {
            "scheme": str(scheme),
            "head": scheme.head if isinstance(scheme, Scheme) else "int8",
            "mean_kl": float(kl.mean()),
            "kl_99": float(kl.quantile(0.99)),
            "max_kl": float(kl.max()),
            "top1": float((exact.argmax(-1) == found.argmax(-1)).double().mean()),
            "perplexity": math.exp(-float(found[:-1].gather(1, target).mean())),
        }
        entries.append(entry)
        print(
            f"{entry['scheme']:12} {entry['head']:5} {entry['mean_kl']:8.4f} {entry['kl_99']:7.3f} "
            f"{entry['max_kl']:8.3f} {entry['top1']:7.1%} {entry['perplexity']:11.3f}",
            flush=True,
        )
    return entries


def errors(device: torch.device) -> list[dict[str, Any]]:
    """Relative error of each kind on normal weights of full-size shapes, and the speed of quantizing them."""
    print(f"{'matrix':38} {'columns':>8}", *(f"{kind:>16}" for kind in QUANTIZABLE))
    entries = []
    for label, (rows, k) in SHAPES.items():
        generator = torch.Generator(device).manual_seed(k)
        weight = torch.randn(min(rows, 2048), k, device=device, generator=generator) * 0.02
        cells = []
        for name in QUANTIZABLE:
            found, seconds = timed(weight, KINDS[name])
            relative = float((dequantize(found) - weight).norm() / weight.norm())
            rate = weight.numel() / seconds
            entries.append({"matrix": label, "columns": k, "kind": name, "relative": relative, "weights_per_s": rate})
            cells.append(f"{relative:8.4%} {rate / 1e6:5.0f}M/s")
        print(f"{label:38} {k:8}", *cells, flush=True)
    return entries


def timed(weight: torch.Tensor, kind: BlockKind) -> tuple[BlockWeight, float]:
    started = time.perf_counter()
    found = quantize(weight, kind)
    if weight.device.type == "cuda":
        torch.cuda.synchronize()
    return found, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--no-spread", action="store_true")
    parser.add_argument("--errors-only", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "errors": errors(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }
    if not arguments.errors_only:
        result["schemes"] = compare(arguments.model, not arguments.no_spread)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
