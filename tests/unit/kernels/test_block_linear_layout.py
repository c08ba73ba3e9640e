"""Where the compiler puts the operands of tensor-core instructions that are written as inline assembly.

``mma.m16n8k32`` takes each operand from a thread of its own: lane 4r + j of a warp has to hold index (r, j) of the last
two axes. Triton chooses the layout, from the tensors' shape; compiled for a GPU, without one, it is read here.
"""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import re, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from ostinato.kernels.block_linear.wide.triton import _wide_kernel as kernel
kind, right, down, count, warps, gate = eval(sys.argv[1])
bits, span, offset, sign = kind
constants = dict(K=2048, BITS=bits, SPAN=span, OFFSET=offset, MIN_SIGN=sign, RT=right, TT=down, COUNT=count,
                 WARPS=warps, BIAS=False, RESIDUAL=False, GATE=gate, PDL=True)
types = dict(x="*i32", factors="*i32", words="*i32", high="*i32", d="*i16", m="*i16", bias="*fp16", residual="*fp32",
             out="*fp32", M="i32", N="i32")
names = kernel.arg_names
source = ASTSource(fn=kernel, signature={n: types.get(n, "constexpr") for n in names},
                   constexprs={(names.index(n),): value for n, value in constants.items()},
                   attrs={(names.index(n),): [["tt.divisibility", 16]] for n in types if n != "M"})
code = compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps, launch_pdl=True)).asm["ttgir"]
layouts = dict(re.findall(r"(#\\w+) = (#ttg\\.blocked<.*?>)", code))
for line in code.splitlines():
    if "mma.sync" in line:
        print(*{layouts[name] for name in re.findall(r"tensor<[0-9x]+xi32, (#\\w+)>", line)}, sep=" and ")
"""


@pytest.mark.parametrize(
    ("case", "instructions"),
    [
        (((4, 128, 0, 1), 1, 1, 4, 4, None), 16),
        (((4, 128, 0, 1), 2, 2, 1, 2, "silu"), 8),
        (((6, 64, 32, 0), 2, 2, 2, 1, None), 4),
    ],
    ids=str,
)
def test_lane_4r_j_of_a_warp_holds_index_r_j(case, instructions):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, str(case)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    found = run.stdout.splitlines()
    assert len(found) == instructions
    warps = case[4]
    for layout in found:
        assert "sizePerThread = [1, 1, 1, 1, 1]" in layout
        assert "threadsPerWarp = [1, 1, 1, 8, 4]" in layout
        assert f"warpsPerCTA = [1, 1, {warps}, 1, 1]" in layout
        assert "order = [4, 3, 2, 1, 0]" in layout
        assert " and " not in layout
