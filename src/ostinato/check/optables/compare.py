"""Compare the op table of the running torch with a real GPU.

    python -m ostinato.check.optables.compare [--samples 4] [--only linalg] [--json FILE]

Runs the samples of PyTorch's own OpInfo data base on the GPU and notes for every ATen operation whether the host waited
in it. Prints operations that waited and are not in the table (missing), and operations that the table calls ``always``
and that never waited (stale). It needs the package ``expecttest``, which
PyTorch's test helpers import. Run it for each new torch release, and correct ``optables/<version>.json`` by hand: a
condition has to be understood before it is written down.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode

from ostinato.check.gpu_watch import HostWaits
from ostinato.check.op_table import load_table


class OpCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts, per ATen operation, how often it ran and how often the host waited in it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.ran: Counter[str] = Counter()
        self.waited: Counter[str] = Counter()
        self._current = ""
        self._has_waited = False

    def host_waits(self, kind: str) -> None:
        """Called by the trace."""
        self._has_waited = True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation; ``types`` is unused."""
        self._has_waited = False
        result = func(*args, **(kwargs or {}))
        name = str(func)
        self.ran[name] += 1
        self.waited[name] += self._has_waited
        return result


def count_waits(num_samples: int, only: str, limit_s: float) -> OpCounter:
    """Run the samples on the current CUDA device, for at most ``limit_s`` seconds.

    Samples that raise are left out: OpInfo has some on purpose.
    """
    end = time.monotonic() + limit_s
    counter = OpCounter()
    HostWaits.register()
    HostWaits.watcher = counter
    for info in op_db:
        if only not in info.name:
            continue
        if time.monotonic() > end:
            print(f"stopped at {info.name}: the time limit", file=sys.stderr)
            break
        dtypes = info.supported_dtypes("cuda")  # type: ignore[no-untyped-call]  # torch leaves it untyped
        dtype = torch.float32 if torch.float32 in dtypes else torch.int64
        if dtype not in dtypes:
            continue
        samples = info.sample_inputs("cuda", dtype)  # type: ignore[no-untyped-call]  # as above
        for number, sample in enumerate(samples):
            if number >= num_samples:
                break
            try:
                with counter:
                    info.op(sample.input, *sample.args, **sample.kwargs)
            except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
                print(f"left out {info.name}: {str(error).splitlines()[0][:80]}", file=sys.stderr)
                break
    HostWaits.watcher = None
    return counter


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description="Compare the op table with this GPU.")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    counter = count_waits(options.samples, options.only, options.seconds)
    table = load_table()
    copies = ("aten._to_copy", "aten.copy_", "aten.index", "aten._index_put_impl_")
    missing = {n: c for n, c in counter.waited.items() if c and n not in table.effects and not n.startswith(copies)}
    stale = [n for n, e in table.effects.items() if e.when == "always" and counter.ran[n] and not counter.waited[n]]
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name()}: {len(counter.ran)} operations; "
        f"table {table.version}"
    )
    for name, count in sorted(missing.items()):
        print(f"missing: {name} waited in {count} of {counter.ran[name]} samples")
    for name in stale:
        print(f"stale: {name} never waited in {counter.ran[name]} samples")
    if options.json is not None:
        rows = {n: {"ran": counter.ran[n], "waited": counter.waited[n]} for n in sorted(counter.ran)}
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if missing or stale else 0)


if __name__ == "__main__":
    main()
