"""``ostinato check``, ``ostinato scan`` and ``ostinato explain``."""

from __future__ import annotations

import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from ostinato.check.finding import Severity
from ostinato.check.isolate import Request, run_isolated
from ostinato.check.report import print_report, to_github, to_html, to_json, to_sarif
from ostinato.check.result import Report, sorted_findings
from ostinato.check.rules import all_rules
from ostinato.check.rules import explain as explain_rule
from ostinato.check.static import scan_paths
from ostinato.check.suppress import apply_baseline, apply_suppressions, read_baseline, write_baseline
from ostinato.errors import UsageError


class Format(StrEnum):
    """Forms of the report."""

    TEXT = "text"
    JSON = "json"
    SARIF = "sarif"
    GITHUB = "github"
    HTML = "html"


class Level(StrEnum):
    """From which severity on the exit code is 1."""

    ERROR = "error"
    HAZARD = "hazard"
    WARNING = "warning"
    INFO = "info"


FormatOption = Annotated[Format, typer.Option("--format", "-f", help="Form of the report.")]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="Write the report to this file.")]
FailOnOption = Annotated[Level, typer.Option(help="Exit with 1 from this severity on.")]
BaselineOption = Annotated[Path | None, typer.Option(help="Suppress what this baseline file lists.")]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show notes, suppressed findings and every branch not reached.")
]


def register(app: typer.Typer) -> None:
    """Add the three commands."""
    app.command(name="check")(check)
    app.command(name="scan")(scan)
    app.command(name="explain")(explain)


def _arch(text: str) -> tuple[int, int]:
    digits = text.removeprefix("sm_").replace(".", "")
    if not digits.isdigit() or len(digits) < 2:
        raise UsageError(f"architecture {text!r}: write it like sm_90 or 9.0")
    return int(digits[:-1]), int(digits[-1])


def _publish(
    report: Report,
    form: Format,
    output: Path | None,
    fail_on: Level,
    baseline: Path | None,
    new_baseline: Path | None,
    verbose: bool,
) -> int:
    if baseline is not None:
        report = replace(report, findings=apply_baseline(report.findings, read_baseline(baseline)))
    if new_baseline is not None:
        write_baseline(new_baseline, report.findings)
    if form is Format.TEXT:
        if output is None:
            print_report(report, Console(highlight=False), verbose=verbose)
        else:
            with output.open("w", encoding="utf-8") as stream:
                print_report(report, Console(file=stream, no_color=True, highlight=False, width=120), verbose=verbose)
    else:
        writers = {Format.JSON: to_json, Format.SARIF: to_sarif, Format.GITHUB: to_github, Format.HTML: to_html}
        text = writers[form](report)
        if output is None:
            sys.stdout.write(text)
        else:
            output.write_text(text, encoding="utf-8")
    return int(report.exit_code(Severity[fail_on.value.upper()]))


def check(
    target: Annotated[str, typer.Argument(help="module:callable (a factory), script.py, or hf:DIR_OR_CONFIG")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments of the script.")] = None,
    *,
    form: FormatOption = Format.TEXT,
    output: OutputOption = None,
    fail_on: FailOnOption = Level.HAZARD,
    meta: Annotated[bool, typer.Option("--meta", help="FakeTensors: no memory, no data, any size of model.")] = False,
    passes: Annotated[str, typer.Option(help="cpu, gpu, or all: the GPU too where there is one.")] = "all",
    calls: Annotated[int, typer.Option(min=1, help="How many calls to make at least.")] = 4,
    torch_version: Annotated[
        str | None, typer.Option(help="Op table to use, like 2.11; default the running version.")
    ] = None,
    arch: Annotated[str, typer.Option(help="Architecture to assume, like sm_90.")] = "sm_90",
    cache: Annotated[str, typer.Option(help="hf: static, dynamic or all.")] = "all",
    dtype: Annotated[str | None, typer.Option(help="hf: dtype of the model; default what its config says.")] = None,
    time_limit: Annotated[float, typer.Option(min=1.0, help="Seconds until a check that hangs is ended.")] = 120.0,
    baseline: BaselineOption = None,
    new_baseline: Annotated[
        Path | None, typer.Option("--write-baseline", help="Write the findings' fingerprints here.")
    ] = None,
    verbose: VerboseOption = False,
) -> int:
    """Find what would keep PyTorch code from being captured as a CUDA graph, or make a replay wrong, without a GPU."""
    if passes not in ("cpu", "gpu", "all"):
        raise UsageError(f"--passes {passes}: use cpu, gpu or all")
    request = Request(
        target=target,
        meta=meta,
        num_calls=calls,
        torch_version=torch_version,
        arch=_arch(arch),
        arguments=tuple(arguments or ()),
        cache=cache,
        dtype=dtype,
        passes=passes,
        limit_s=time_limit,
    )
    return _publish(run_isolated(request), form, output, fail_on, baseline, new_baseline, verbose)


def scan(
    paths: Annotated[list[Path], typer.Argument(help="Files or directories.")],
    *,
    form: FormatOption = Format.TEXT,
    output: OutputOption = None,
    fail_on: FailOnOption = Level.HAZARD,
    baseline: BaselineOption = None,
    new_baseline: Annotated[
        Path | None, typer.Option("--write-baseline", help="Write the findings' fingerprints here.")
    ] = None,
    verbose: VerboseOption = False,
) -> int:
    """Look for such code in source files, without running it."""
    report = scan_paths(paths)
    suppressed = apply_suppressions(report.findings, {})
    return _publish(
        replace(report, findings=sorted_findings(suppressed)), form, output, fail_on, baseline, new_baseline, verbose
    )


def explain(
    rule: Annotated[
        str | None, typer.Argument(help="A code or name, like CG104 or H2D_BLOCKING; none lists all.")
    ] = None,
) -> int:
    """Explain one of the checker's codes: why, how it shows at run time, the remedy."""
    console = Console(highlight=False)
    if rule is None:
        for item in all_rules():
            console.print(f"[bold]{item.code}[/bold] {item.name:<18} {item.title}", soft_wrap=True)
        return 0
    text = explain_rule(rule)
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        sys.stdout.write(text)
    return 0
