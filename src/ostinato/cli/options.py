"""Options that several commands share, and how sizes and speeds are written."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ostinato.load.progress import BarProgress, Progress, SilentProgress

Temperature = Annotated[float, typer.Option(help="0: always the most likely token.")]
TopK = Annotated[int, typer.Option(help="Draw among the k most likely tokens; 0: among all.")]
TopP = Annotated[float, typer.Option(help="Draw among the tokens that together have this probability; 1: among all.")]
MinP = Annotated[float, typer.Option(help="Leave out tokens less likely than this times the most likely one.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: make tokens of prompt and answer less likely.")]
PresencePenalty = Annotated[float, typer.Option(help="Taken from the logit of every token of the answer, once.")]
FrequencyPenalty = Annotated[float, typer.Option(help="The same for each time the token has come.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be given several times.")]
System = Annotated[str | None, typer.Option(help="Text of the system message.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1 … [default: a GPU if there is one]")]
DType = Annotated[str, typer.Option("--dtype", help="auto: the fast way; float32: every weight exactly, slowly.")]
Quant = Annotated[
    str | None,
    typer.Option("--quant", help="Quantize a checkpoint's matrices as they are read: int4, int4-g32, -g64 or -g128."),
]
KV = Annotated[str, typer.Option("--kv", help="How keys and values are kept.")]
State = Annotated[str, typer.Option("--state", help="How recurrent state is kept: float32 or bfloat16.")]
Context = Annotated[int | None, typer.Option(help="Room for prompt and answer, in tokens. [default: what fits]")]
Threads = Annotated[int | None, typer.Option(help="CPU threads. [default: the machine's cores]")]
Graphs = Annotated[bool, typer.Option("--graphs/--no-graphs", help="Capture the step as a CUDA graph.")]

_KIB = 1024


def progress() -> Progress:
    """A bar where a person watches, nothing where stderr is a file."""
    return BarProgress() if sys.stderr.isatty() else SilentProgress()


def size(num_bytes: float) -> str:
    """``98362432`` → ``93.8 MiB``."""
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= _KIB and len(units) > 1:
        value, units = value / _KIB, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def count(number: int) -> str:
    """``134515008`` → ``134.5M``."""
    for factor, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= factor:
            return f"{number / factor:.1f}{letter}"
    return str(number)


def rate(tokens: int, seconds: float) -> str:
    """Tokens per second; a dash where there is nothing to divide."""
    return f"{tokens / seconds:,.1f}" if tokens and seconds > 0 else "–"
