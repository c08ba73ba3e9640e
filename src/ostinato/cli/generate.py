"""``ostinato generate [MODEL] PROMPT``: one answer, streamed."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from ostinato.cli import options
from ostinato.cli.options import progress
from ostinato.cli.summary import model_name, summary_line, timings
from ostinato.errors import UsageError
from ostinato.llm import LLM, Delta
from ostinato.load.known import KNOWN_MODELS
from ostinato.sampling.params import SamplingParams

_STDIN = "-"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="generate", help="Answer one prompt.")(generate)


def generate(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL] PROMPT", help="The prompt, or - to read it from standard input."),
    ] = None,
    temperature: options.Temperature = 0.8,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    seed: options.Seed = None,
    max_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 512,
    stop: options.Stop = None,
    system: options.System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it stands, without chat template.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end instead of a stream.")
    ] = False,
    device: options.Device = None,
    dtype: options.DType = "auto",
    quant: options.Quant = None,
    kv: options.KV = "auto",
    state: options.State = "float32",
    context: options.Context = None,
    threads: options.Threads = None,
    graphs: options.Graphs = True,
) -> None:
    """Answer PROMPT with MODEL (a file, a directory, a hub id or a known name; default: a small one)."""
    model, prompt = _model_and_prompt(words or [])
    if raw and system is not None:
        raise UsageError("--system needs the chat template that --raw turns off; put the text into the prompt")
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
    )
    llm = LLM.load(
        model,
        device=device,
        dtype=dtype,
        quant=quant,
        kv=kv,
        state=state,
        context=context,
        progress=progress(),
        threads=threads,
        graphs=graphs,
    )
    try:
        ids = _prompt_ids(llm, prompt, system=system, raw=raw)
        if as_json:
            print(json.dumps(_answer(llm, ids, params), ensure_ascii=False, indent=2))
            return
        ended = _stream(llm, ids, params)
        print("" if ended.endswith("\n") else "\n", end="", flush=True)
        print(summary_line(llm), file=sys.stderr)
    finally:
        llm.close()


def _model_and_prompt(words: list[str]) -> tuple[str | None, str]:
    """(MODEL or None for the default one, the prompt)."""
    if len(words) > 2:
        raise UsageError(f"expected [MODEL] PROMPT, got {len(words)} arguments; put the prompt in quotes")
    if len(words) == 1 and (words[0].endswith(".gguf") or words[0] in KNOWN_MODELS):
        raise UsageError(f"{words[0]} is a model; give the prompt after it, or - to read it from standard input")
    model = words[0] if len(words) == 2 else None
    prompt = words[-1] if words else _STDIN
    if prompt == _STDIN:
        if not words and sys.stdin.isatty():
            raise UsageError('no prompt; give one: ostinato generate "Why is the sky blue?", or pipe it in')
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    return model, prompt


def _prompt_ids(llm: LLM, prompt: str, *, system: str | None, raw: bool) -> list[int]:
    if raw:
        return llm.tokenizer.encode(prompt)
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return llm.chat_prompt(messages)


def _stream(llm: LLM, ids: list[int], params: SamplingParams) -> str:
    """Write the answer as it comes; returns its last piece that was not empty."""
    last = ""
    for delta in llm.stream(ids, params):
        if delta.text:
            last = delta.text
            sys.stdout.write(delta.text)
            sys.stdout.flush()
    return last


def _answer(llm: LLM, ids: list[int], params: SamplingParams) -> dict[str, Any]:
    deltas: list[Delta] = list(llm.stream(ids, params))
    return {
        "text": "".join(delta.text for delta in deltas),
        "token_ids": [index for delta in deltas for index in delta.token_ids],
        "prompt_token_ids": ids,
        "logprobs": [value for delta in deltas for value in delta.logprobs],
        "finish_reason": next((delta.finish_reason for delta in reversed(deltas) if delta.finish_reason), None),
        "model": model_name(llm),
        "timings": timings(llm),
    }
