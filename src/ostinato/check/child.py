"""The process in which checked code runs: it may print, raise, hang, fork or end, and the report is still written.

Started by ``isolate.py`` as ``python -m ostinato.check.child REQUEST RESULT``; not meant to be called by hand.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import torch

from ostinato.check.finding import Frame
from ostinato.check.frames import is_folded
from ostinato.check.pretend import Gpu
from ostinato.check.report import to_json
from ostinato.check.result import Report, sorted_findings
from ostinato.check.session import Progress, Settings, describe
from ostinato.check.targets import run_target
from ostinato.errors import CheckError, OstinatoError, UsageError

USAGE_MARK = "usage: "


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _unfinished(target: str, progress: Progress, problem: str) -> Report:
    return Report(
        target=target,
        findings=sorted_findings(progress.findings()),
        num_regions=progress.calls_done,
        partial=problem,
        torch_version=torch.__version__,
    )


def _main_frames(thread_id: int) -> list[Frame]:
    frame = sys._current_frames().get(thread_id)
    found = []
    for summary in traceback.extract_stack(frame) if frame is not None else []:
        if not is_folded(summary.filename):
            found.append(Frame(summary.filename, summary.lineno or 0, summary.name))
    return list(reversed(found))


def _watch(limit_s: float, target: str, progress: Progress, result: Path) -> None:
    """After the time limit, write what was found so far and end the process."""
    main = threading.main_thread().ident or 0

    def expire() -> None:
        places = _main_frames(main)
        at = f"; it is at {places[0].file}:{places[0].line} in {places[0].function}" if places else ""
        problem = (
            f"not finished within the time limit of {limit_s:g} s{at}. "
            "Raise it with --time-limit, or check a smaller part"
        )
        _write(result, to_json(_unfinished(target, progress, problem)))
        os._exit(0)

    timer = threading.Timer(limit_s, expire)
    timer.daemon = True
    timer.start()


def main(request: Path, result: Path) -> None:
    """Run one request and write its report."""
    data: dict[str, Any] = json.loads(request.read_text(encoding="utf-8"))
    target = data["target"]
    progress = Progress()
    owner = os.getpid()
    forks: list[int] = []
    os.register_at_fork(after_in_parent=lambda: forks.append(1))
    torch.set_num_threads(data["threads"])
    gc.set_threshold(50_000, 50, 50)  # records are many, and hardly any of them form cycles
    settings = Settings(
        meta=data["meta"],
        num_calls=data["num_calls"],
        torch_version=data["torch_version"],
        gpu=Gpu(arch=(data["arch"][0], data["arch"][1])),
    )
    _watch(data["limit_s"], target, progress, result)
    try:
        report = run_target(
            target,
            settings,
            progress,
            arguments=data["arguments"],
            cache=data["cache"],
            dtype=data["dtype"],
            passes=data["passes"],
        )
    except UsageError as error:
        report = _unfinished(target, progress, USAGE_MARK + str(error))
    except CheckError as error:
        report = _unfinished(target, progress, str(error))
    except OstinatoError as error:
        report = _unfinished(target, progress, f"{type(error).__name__}: {error}")
    except BaseException as error:
        if os.getpid() == owner:
            text = f"the checker itself failed: {describe(error)} ({traceback.format_exc(limit=-3).strip()})"
            _write(result, to_json(dataclasses.replace(_unfinished(target, progress, ""), internal=text)))
        raise
    if os.getpid() != owner:
        os._exit(0)  # a copy that the checked code forked and that came back here: the parent reports
    if forks:
        report = dataclasses.replace(
            report,
            notes=(*report.notes, f"the checked code forked {len(forks)} times; only the first process was checked"),
        )
    _write(result, to_json(report))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads and exit handlers of the checked code must not hold the result back


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
