"""The check of kernels' accesses sees each kind that leaves the arguments, and no other."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the check is the interpreter's")


@triton.jit
def _touch_kernel(source, out, FIRST: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr, HOW: tl.constexpr):
    at = FIRST + tl.arange(0, SIZE)
    mask = (at >= 0) & (at < 5) if MASKED else at == at
    if HOW == "load":
        tl.store(out + tl.arange(0, SIZE), tl.load(source + at, mask=mask, other=0.0))
    elif HOW == "plain load":
        tl.store(out, tl.load(source + FIRST))
    elif HOW == "store":
        tl.store(source + at, 1.0, mask=mask)
    elif HOW == "add":
        tl.atomic_add(source + at, 1.0, mask=mask)
    else:
        tl.atomic_cas(source + FIRST, 0.0, 1.0)


def touch(source: torch.Tensor, first: int, masked: bool, how: str) -> torch.Tensor:
    out = torch.zeros(8)
    _touch_kernel[(1,)](source, out, first, 8, masked, how)
    return out


@pytest.mark.parametrize(
    ("how", "said"),
    [("load", "reads"), ("plain load", "reads"), ("store", "writes"), ("add", "updates"), ("swap", "swaps")],
)
@pytest.mark.parametrize("first", [5, -9])
def test_what_leaves_the_arguments_is_refused(how, said, first):
    whole = torch.arange(100.0)
    with pytest.raises(Exception, match=f"a kernel {said} 4 bytes"):
        touch(whole[10:15], first, False, how)
    assert torch.equal(whole, torch.arange(100.0))  # refused before anything was written


@pytest.mark.parametrize("how", ["load", "store", "add"])
@pytest.mark.parametrize("first", [-3, 0, 2])
def test_masked_lanes_touch_nothing(how, first):
    whole = torch.arange(100.0)
    out = touch(whole[10:15], first, True, how)
    expected = torch.arange(100.0)
    touched = expected[10 + max(0, first) : 15]
    if how == "load":
        assert torch.equal(out, torch.nn.functional.pad(expected[10:15], (8, 8))[8 + first : 16 + first])
    elif how == "store":
        touched.fill_(1)
    else:
        touched += 1
    assert torch.equal(whole, expected)


def test_rows_of_a_wider_matrix_reach_to_the_last_element_only():
    matrix = torch.arange(24.0).view(4, 6)
    assert torch.equal(touch(matrix[1:3, :4].t(), 0, True, "load")[:5], torch.arange(6.0, 11.0))
    with pytest.raises(Exception, match="reads 4 bytes 0 bytes past an argument's end; lanes outside: 6"):
        touch(matrix[:1, :2], 0, False, "load")
