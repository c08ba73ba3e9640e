"""``ostinato bench [MODEL]``: how fast a model decodes and reads prompts, beside the limit that memory sets."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ostinato import __version__
from ostinato.cli import options
from ostinato.cli.options import progress, size
from ostinato.cli.plot import Line, line_chart
from ostinato.cli.table import table
from ostinato.engine.loading import EngineConfig, Loaded, Openable, load_engine
from ostinato.engine.measure import (
    DecodePoint,
    PrefillPoint,
    Spread,
    measure_decode,
    measure_prefill,
    read_bandwidth,
)
from ostinato.errors import UsageError
from ostinato.load.quantizing import quantizing, reading
from ostinato.load.random import RandomCheckpoint
from ostinato.load.resolve import resolve


@dataclasses.dataclass(frozen=True)
class Result:
    """Everything that one call has measured. read_bandwidth: bytes per second. bytes_per_token: weights at batch 1."""

    model: str
    device: str
    torch_version: str
    ostinato_version: str
    threads: int | None
    read_bandwidth: float
    weight_bytes_per_token: int
    load_s: float
    decode: tuple[DecodePoint, ...]
    prefill: tuple[PrefillPoint, ...]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="bench", help="Measure how fast a model decodes and reads prompts.")(bench)


def bench(
    model: Annotated[str | None, typer.Argument(help="[default: the small default model]")] = None,
    context: Annotated[str, typer.Option(help="Tokens that stand before, separated by commas.")] = "512",
    batch: Annotated[str, typer.Option(help="Sequences at a time, separated by commas.")] = "1",
    random: Annotated[
        str | None, typer.Option(metavar="NAME", help="A well-known model's full shape with random weights.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompts to read, in tokens; 0 for none. [default: those of --context]")
    ] = None,
    new: Annotated[int, typer.Option(help="Tokens to decode in each measurement.")] = 128,
    repeats: Annotated[int, typer.Option(help="Measurements of each point, after one that does not count.")] = 5,
    temperature: options.Temperature = 0.8,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw decode speed over context.")] = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    quant: options.Quant = None,
    kv: options.KV = "auto",
    state: options.State = "float32",
    threads: options.Threads = None,
    graphs: options.Graphs = True,
    eager: Annotated[bool, typer.Option("--eager/--no-eager", help="Measure the eager step beside the graph.")] = True,
) -> None:
    """Median and spread of decode and prefill, memory, bytes per token, fraction of the bandwidth; graph and eager."""
    contexts, batches = _numbers("--context", context), _numbers("--batch", batch)
    prompts = contexts if prompt is None else [] if prompt == "0" else _numbers("--prompt", prompt)
    _check(model, random, new, repeats, threads, plot)
    if random is not None and quant is not None:
        raise UsageError("--random NAME has types of its own: leave --quant out")
    if threads is not None:
        torch.set_num_threads(threads)
    opened: Openable
    if random is not None:
        opened = RandomCheckpoint(random)
    else:
        opened = quantizing(resolve(model, progress()).open(), quant, progress())
    room = max(max(contexts) + new, *prompts, 0) + 2
    config = EngineConfig(device, dtype, kv, room, max(batches), graphs=graphs, state=state)
    with reading(opened):
        loaded = load_engine(opened, config)
    try:
        result = _measure(opened, loaded, contexts, batches, prompts, new, repeats, temperature, graphs, eager)
    finally:
        loaded.runner.close()
    print(_as_text(result))
    if json_file is not None:
        json_file.write_text(json.dumps(_as_json(result), indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        plot.write_text(_as_chart(result), encoding="utf-8")


def _numbers(option: str, text: str) -> list[int]:
    """``512,2048`` → [512, 2048]."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} takes whole numbers separated by commas, got {text!r}") from None
    if min(numbers) < 1:
        raise UsageError(f"{option} takes numbers of at least 1, got {text!r}")
    return sorted(set(numbers))


def _check(
    model: str | None, random: str | None, new: int, repeats: int, threads: int | None, plot: Path | None
) -> None:
    """Refuse what would only fail after the measuring."""
    if model is not None and random is not None:
        raise UsageError("give either MODEL or --random NAME, not both")
    if new < 2:
        raise UsageError(f"--new must be at least 2, got {new}")
    if repeats < 1:
        raise UsageError(f"--repeats must be at least 1, got {repeats}")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be at least 1, got {threads}")
    if plot is not None and plot.suffix != ".svg":
        raise UsageError(f"--plot writes SVG; give a file that ends in .svg, not {plot}")


def _measure(
    opened: Openable,
    loaded: Loaded,
    contexts: list[int],
    batches: list[int],
    prompts: list[int],
    new: int,
    repeats: int,
    temperature: float,
    graphs: bool,
    eager: bool,
) -> Result:
    on_gpu = loaded.device.type == "cuda"
    captured = on_gpu and graphs
    ways = [True, False] if captured and eager else [captured]
    bandwidth = read_bandwidth(loaded.device)
    decode = []
    for depth in contexts:
        for rows in batches:
            for graph in ways:
                _note(f"decode: context {depth}, batch {rows}, {_way(graph)}")
                brief = on_gpu and not graph  # eager is tens of times slower, and only its size is of interest
                decode.append(
                    measure_decode(
                        loaded,
                        context=depth,
                        batch=rows,
                        new_tokens=min(new, 16) if brief else new,
                        repeats=min(repeats, 2) if brief else repeats,
                        bandwidth=bandwidth,
                        graph=graph,
                        temperature=temperature,
                    )
                )
    prefill = []
    for depth in prompts:
        _note(f"prefill: {depth} tokens")
        prefill.append(measure_prefill(loaded, tokens=depth, repeats=repeats))
    return Result(
        model=opened.label,
        device=torch.cuda.get_device_name(loaded.device) if on_gpu else platform.processor() or platform.machine(),
        torch_version=torch.__version__,
        ostinato_version=__version__,
        threads=None if on_gpu else torch.get_num_threads(),
        read_bandwidth=bandwidth,
        weight_bytes_per_token=loaded.model.bytes_per_step(),
        load_s=loaded.seconds,
        decode=tuple(decode),
        prefill=tuple(prefill),
    )


def _note(line: str) -> None:
    if sys.stderr.isatty():
        print(f"measuring {line} …", file=sys.stderr, flush=True)


def _way(graph: bool) -> str:
    return "graph" if graph else "eager"


def _as_text(result: Result) -> str:
    threads = "" if result.threads is None else f", {result.threads} threads"
    lines = [
        f"{result.model} on {result.device}{threads}, torch {result.torch_version}",
        f"measured read bandwidth {result.read_bandwidth / 1e9:,.1f} GB/s; "
        f"weights read per token {size(result.weight_bytes_per_token)}; loaded in {result.load_s:.2f} s\n",
        table(
            ["context", "batch", "", "tokens/s", "low – high", "ms/step", "bytes/token", "of bandwidth", "memory"],
            [_decode_row(point) for point in result.decode],
            right=(0, 1, 3, 4, 5, 6, 7, 8),
        ),
    ]
    pairs = [
        (point, eager)
        for point in result.decode
        for eager in result.decode
        if point.graph and not eager.graph and (point.context, point.batch) == (eager.context, eager.batch)
    ]
    lines += [
        f"context {point.context}, batch {point.batch}: the graph is "
        f"{point.tokens_per_s.median / eager.tokens_per_s.median:.2f} times as fast as eager"
        for point, eager in pairs
    ]
    if result.prefill:
        lines.append("")
        lines.append(
            table(
                ["prompt", "tokens/s", "low – high", "first token"],
                [
                    [
                        str(p.tokens),
                        f"{p.tokens_per_s.median:,.1f}",
                        _range(p.tokens_per_s),
                        f"{p.first_token_ms:.1f} ms",
                    ]
                    for p in result.prefill
                ],
                right=(0, 1, 2, 3),
            )
        )
    return "\n".join(lines)


def _decode_row(point: DecodePoint) -> list[str]:
    return [
        str(point.context),
        str(point.batch),
        _way(point.graph),
        f"{point.tokens_per_s.median:,.1f}",
        _range(point.tokens_per_s),
        f"{point.ms_per_step:.3f}",
        size(point.bytes_per_step / point.batch),
        f"{point.bandwidth_fraction:.1%}",
        size(point.memory_bytes) if point.memory_bytes else "–",
    ]


def _range(spread: Spread) -> str:
    return f"{spread.low:,.1f} – {spread.high:,.1f}"


def _as_json(result: Result) -> dict[str, Any]:
    figures = dataclasses.asdict(result)
    for written, point in zip(figures["decode"], result.decode, strict=True):
        written["bytes_per_token"] = point.bytes_per_step / point.batch
    return figures


def _as_chart(result: Result) -> str:
    lines = []
    for batch, graph in dict.fromkeys((point.batch, point.graph) for point in result.decode):
        points = [p for p in result.decode if (p.batch, p.graph) == (batch, graph)]
        lines.append(
            Line(
                label=f"batch {batch}, {_way(graph)}",
                x=tuple(float(p.context) for p in points),
                y=tuple(p.tokens_per_s.median for p in points),
                low=tuple(p.tokens_per_s.low for p in points),
                high=tuple(p.tokens_per_s.high for p in points),
                dashed=not graph,
            )
        )
    title = f"{Path(result.model).name} on {result.device}"
    return line_chart(title, "context (tokens)", "decode (tokens/s)", lines)
