"""Where the compiler puts the operands of tensor-core instructions that are written as inline assembly.

``mma.m16n8k32`` takes each operand from a thread of its own: lane 4r + j of a warp has to hold index (r, j) of the last
two axes. Triton chooses the layout, from the tensors' shape; compiled for a GPU, without one, it is read here.
"""

import os
import subprocess
import sys

SCRIPT = """
import importlib, re, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
module, name, types, constants, unaligned, warps = eval(sys.argv[1])
kernel = getattr(importlib.import_module(module), name)
names = kernel.arg_names
aligned = [n for n in names if n in types and n not in unaligned]
source = ASTSource(fn=kernel, signature={n: types.get(n, "constexpr") for n in names},
                   constexprs={(names.index(n),): value for n, value in constants.items()},
                   attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned})
code = compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps, launch_pdl=True)).asm["ttgir"]
layouts = dict(re.findall(r"(#\\w+) = (#ttg\\.blocked<.*?>)", code))
for line in code.splitlines():
    if "mma.sync" in line:
        print(*{layouts[name] for name in re.findall(r"tensor<[0-9x]+xi32, (#\\w+)>", line)}, sep=" and ")
"""


def assert_lane_4r_j_holds_index_r_j(
    module: str, name: str, types: dict, constants: dict, unaligned: tuple, warps: int, instructions: int
) -> None:
    """Compile kernel ``name`` and check the layout of all operands of its so many instructions.

    types: of the arguments that are no constants, as Triton's signatures name them; all but ``unaligned`` are
    multiples of 16.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, str((module, name, types, constants, unaligned, warps))]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    found = run.stdout.splitlines()
    assert len(found) == instructions
    for layout in found:
        assert "sizePerThread = [1, 1, 1, 1, 1]" in layout
        assert "threadsPerWarp = [1, 1, 1, 8, 4]" in layout
        assert f"warpsPerCTA = [1, 1, {warps}, 1, 1]" in layout
        assert "order = [4, 3, 2, 1, 0]" in layout
        assert " and " not in layout
