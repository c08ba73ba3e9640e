"""``ostinato convert SRC DST --quant int4``: a checkpoint in four bits, on the disk."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from ostinato.cli import options
from ostinato.cli.options import count, progress, size
from ostinato.engine.loading import pick_device
from ostinato.errors import UsageError
from ostinato.load.convert import convert as convert_checkpoint
from ostinato.load.gguf import GGUFFile
from ostinato.load.resolve import resolve
from ostinato.quant.plan import parse_scheme


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="convert", help="Quantize a checkpoint and store it for fast loading.")(convert)


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face checkpoint: a directory or a hub id.")],
    directory: Annotated[Path, typer.Argument(metavar="DST", help="A directory that is new or empty.")],
    quant: Annotated[
        str, typer.Option(help="int4, int4-g32, int4-g64 or int4-g128: how many columns share a scale.")
    ] = "int4",
    head: Annotated[str, typer.Option(help="Of the embedding and the output matrix: int6 or int8.")] = "int6",
    device: options.Device = None,
) -> None:
    """Write SRC (bf16, f16, f32 or fp8) to DST in four bits. Interrupted, the same command goes on where it stopped."""
    scheme = parse_scheme(quant, head)
    opened = resolve(source, progress()).open()
    if isinstance(opened, GGUFFile):
        raise UsageError(f"{opened.label} is a GGUF file, quantized already: run it as it is, or convert the original")
    started = time.perf_counter()
    done = convert_checkpoint(opened, directory, scheme, device=pick_device(device), progress=progress())
    seconds = time.perf_counter() - started
    if done.num_kept:
        print(f"{done.num_kept} of {done.num_files} files were complete already")
    print(
        f"{directory}: {count(done.num_parameters)} parameters in {size(done.num_bytes)} "
        f"({done.bits_per_weight:.2f} bits per weight), {done.num_files} files, {seconds:.1f} s\n"
        f'ostinato generate {shlex.quote(str(directory))} "…"'
    )
