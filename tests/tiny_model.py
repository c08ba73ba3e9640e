"""A llama of a few thousand random weights with a real vocabulary, as a GGUF file: for tests of whole commands."""

from __future__ import annotations

from pathlib import Path

import torch

from ostinato.load.gguf_writer import write_gguf

from .unit.text.vocabularies import byte_level

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTEXT = 256


def write_tiny_model(path: Path, *, template: str | None = CHATML, layers: int = 2) -> Path:
    """Write the model; the same weights every time."""
    metadata = byte_level("smollm")
    vocabulary = len(metadata["tokenizer.ggml.tokens"])
    hidden, feed_forward, heads, kv_heads = 64, 128, 4, 2
    random = torch.Generator().manual_seed(7)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random) / shape[-1] ** 0.5

    tensors = {"token_embd.weight": weight(vocabulary, hidden), "output_norm.weight": torch.ones(hidden)}
    for layer in range(layers):
        kv = hidden // heads * kv_heads
        for name, tensor in {
            "attn_norm": torch.ones(hidden),
            "attn_q": weight(hidden, hidden),
            "attn_k": weight(kv, hidden),
            "attn_v": weight(kv, hidden),
            "attn_output": weight(hidden, hidden),
            "ffn_norm": torch.ones(hidden),
            "ffn_gate": weight(feed_forward, hidden),
            "ffn_up": weight(feed_forward, hidden),
            "ffn_down": weight(hidden, feed_forward),
        }.items():
            tensors[f"blk.{layer}.{name}.weight"] = tensor
    metadata["tokenizer.ggml.token_type"] = [int(kind) for kind in metadata["tokenizer.ggml.token_type"]]
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    metadata |= {
        "general.architecture": "llama",
        "general.name": "Tiny",
        "llama.block_count": layers,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": feed_forward,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": hidden // heads,
    }
    write_gguf(path, metadata, tensors)
    return path
