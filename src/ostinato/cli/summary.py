"""What an answer has taken, in one line or as JSON."""

from __future__ import annotations

from typing import Any

from ostinato.cli.options import size
from ostinato.llm import LLM


def model_name(llm: LLM) -> str:
    """The model's own name, or where it lies."""
    return llm.info.title or llm.info.label


def summary_line(llm: LLM) -> str:
    """Prompt tokens/s, decode tokens/s, ms/token, memory, and what was captured."""
    stats = llm.stats
    cached = f" ({stats.cached_tokens} kept)" if stats.cached_tokens else ""
    prompt = f"prompt {stats.prompt_tokens} tokens{cached}"
    if stats.prefill_s:
        prompt += f", {stats.prefill_tokens_per_s:,.1f} tokens/s"
    answer = f"answer {stats.new_tokens} tokens"
    if stats.decode_s and stats.decode_tokens_per_s:
        answer += f", {stats.decode_tokens_per_s:,.1f} tokens/s, {1000 / stats.decode_tokens_per_s:.2f} ms/token"
    captured = "; ".join(llm.runner.describe()) or f"nothing captured ({llm.device.type}, eager)"
    return " · ".join([prompt, answer, size(llm.memory_bytes), captured])


def timings(llm: LLM) -> dict[str, Any]:
    """The same for --json: times in seconds, memory in bytes."""
    stats = llm.stats
    return {
        "load_s": llm.load_s,
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "prefill_s": stats.prefill_s,
        "prefill_tokens_per_s": stats.prefill_tokens_per_s,
        "new_tokens": stats.new_tokens,
        "decode_s": stats.decode_s,
        "decode_tokens_per_s": stats.decode_tokens_per_s,
        "memory_bytes": llm.memory_bytes,
        "captured": llm.runner.describe(),
    }
