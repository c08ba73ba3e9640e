"""Tiny models for the tests of this folder."""

from pathlib import Path

import torch

from ostinato.load.gguf_writer import EncodedTensor, Typed, encode_tensor, write_gguf
from ostinato.quant.gguf import GGUF_TYPES

METADATA = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.tokens": ["<s>", "a", "é", "日本", ""],
    "tokenizer.ggml.scores": [0.0, -1.5, 2.0, 3.25, 4.0],
    "tokenizer.ggml.token_type": Typed("int32", [3, 1, 1, 1, 1]),
    "tokenizer.ggml.add_bos_token": False,
}


def random_block_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> EncodedTensor:
    """Random bytes of a type; shape as PyTorch counts."""
    kind = GGUF_TYPES[name]
    rows = torch.Size(shape[:-1]).numel()
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows, kind.row_bytes(shape[-1])), dtype=torch.uint8, generator=generator)
    return EncodedTensor(kind, shape, raw)


def tiny_tensors() -> dict[str, torch.Tensor | EncodedTensor]:
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, torch.Tensor | EncodedTensor] = {
        "token_embd.weight": encode_tensor(torch.randn(5, 64, generator=generator), "Q8_0"),
        "output_norm.weight": torch.randn(64, generator=generator),
    }
    for layer in range(2):
        tensors[f"blk.{layer}.attn_q.weight"] = encode_tensor(torch.randn(7, 64, generator=generator), "Q4_1")
        tensors[f"blk.{layer}.ffn_down.weight"] = torch.randn(3, 64, generator=generator).to(torch.bfloat16)
    return tensors


def write_tiny(path: Path) -> Path:
    write_gguf(path, METADATA, tiny_tensors())
    return path
