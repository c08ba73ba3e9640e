"""Where the compiler puts the operands of the tensor-core instructions in the products of lists of picks.

``mma.m16n8k32`` is inline assembly there, and takes each operand from a thread of its own: lane 4r + j of a warp has to
hold index (r, j) of the last two axes. The kernels are compiled for a GPU, without one, and the layouts are read.
"""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import re, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from ostinato.kernels.moe.lists import triton as lists
name, constants, warps = eval(sys.argv[1])
kernel = getattr(lists, name)
names = kernel.arg_names
types = dict(x_words="*i32", x_scales="*fp32", roots="*fp32", order="*i32", blocks="*i32", words="*i32", d="*fp16",
             m="*fp16", act="*i8", act_words="*i32", act_scales="*fp32", weights="*fp32", parts="*fp32",
             M="i32", E="i32", NUM_SHARED="i32")
source = ASTSource(fn=kernel, signature={n: types.get(n, "constexpr") for n in names},
                   constexprs={(names.index(n),): value for n, value in constants.items()},
                   attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if types.get(n, "i")[0] == "*"})
code = compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps, launch_pdl=True)).asm["ttgir"]
layouts = dict(re.findall(r"(#\\w+) = (#ttg\\.blocked<.*?>)", code))
for line in code.splitlines():
    if "mma.sync" in line:
        print(*{layouts[name] for name in re.findall(r"tensor<[0-9x]+xi32, (#\\w+)>", line)}, sep=" and ")
"""

SIZES = {"F": 512, "PICKS": 9, "PDL": True}


@pytest.mark.parametrize(
    ("name", "constants", "warps", "groups"),
    [
        ("_gate_up_mma_kernel", {"K": 2048, "RT": 1}, 8, 8),  # of two matrices two groups in a loop and two behind it
        ("_gate_up_mma_kernel", {"K": 384, "RT": 2}, 4, 4),
        ("_down_mma_kernel", {"H": 2048, "RT": 2, "WARPS": 4, "DEPTH": 4}, 4, 4),
    ],
)
def test_lane_4r_j_of_a_warp_holds_index_r_j(name, constants, warps, groups):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, str((name, {**SIZES, **constants}, warps))]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    found = run.stdout.splitlines()
    assert len(found) == 4 * groups
    for layout in found:
        assert "sizePerThread = [1, 1, 1, 1, 1]" in layout
        assert "threadsPerWarp = [1, 1, 1, 8, 4]" in layout
        assert f"warpsPerCTA = [1, 1, {warps}, 1, 1]" in layout
        assert "order = [4, 3, 2, 1, 0]" in layout
        assert " and " not in layout
