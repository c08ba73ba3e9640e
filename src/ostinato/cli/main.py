"""The command ``ostinato``: which commands there are, and how every one of them ends.

A command's module is imported when the command runs, so ``ostinato --help`` does not wait for PyTorch. Such a
module has ``register(app)``, which adds its commands to a Typer application.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group

from ostinato import __version__
from ostinato.errors import OstinatoError

# command → (its module, what it does in one line)
COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("ostinato.cli.generate", "Answer one prompt."),
    "chat": ("ostinato.cli.chat", "Talk with a model in several turns."),
    "bench": ("ostinato.cli.bench", "Measure how fast a model decodes and reads prompts."),
    "convert": ("ostinato.cli.convert", "Quantize a checkpoint and store it for fast loading."),
    "models": ("ostinato.cli.models", "List the models that are known by name."),
    "inspect": ("ostinato.cli.inspect", "Show a model's layers, weights, and memory, without loading it."),
    "check": ("ostinato.cli.check", "Find what would keep PyTorch code from being captured as a CUDA graph."),
    "scan": ("ostinato.cli.check", "Look for such code in source files, without running it."),
    "explain": ("ostinato.cli.check", "Explain one of the checker's codes."),
}

INTERRUPTED = 130

# Typer carries its own copy of click in some versions; this is "wrong usage" in either.
_UsageMistake: type[Any] = typer.BadParameter.__bases__[0]


class LazyCommands(TyperGroup):
    """A group that knows its commands' names and imports the one that is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, (_, line) in COMMANDS.items():
            self.commands[name] = TyperCommand(name=name, help=line, short_help=line, add_help_option=False)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """As in every group, but with the real command in the place of its name."""
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed if name is None else load_command(name), rest


def load_command(name: str) -> Any:
    """Import the module of command ``name`` and take the command out of it."""
    holder = typer.Typer(rich_markup_mode=None)
    importlib.import_module(COMMANDS[name][0]).register(holder)
    return get_group(holder).commands[name]


app = typer.Typer(
    cls=LazyCommands,
    help="Language models at the speed of the memory, one CUDA graph per token; and a checker for your own captures.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ostinato {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Every command has its own --help."""


def execute(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code.

    0  done.  1  the checker found something.  2  the user's mistake, told in one line on stderr.  130  Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        outcome = get_command(app).main(args=given or ["--help"], prog_name="ostinato", standalone_mode=False)
    except OstinatoError as error:
        return _fail(str(error), error.exit_code)
    except _UsageMistake as error:
        where = error.ctx.command_path if error.ctx is not None else "ostinato"
        return _fail(f"{' '.join(error.format_message().split())} (see {where} --help)", 2)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    return outcome if isinstance(outcome, int) else 0


def _fail(line: str, code: int) -> int:
    sys.stdout.flush()
    print(f"error: {line}", file=sys.stderr)
    return code


def run() -> None:
    """The entry point that pyproject.toml names."""
    sys.exit(execute())


if __name__ == "__main__":
    run()
