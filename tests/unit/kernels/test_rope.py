"""rope_append: the reference against arithmetic in float64, the kernel against the reference."""

import pytest
import torch

from ostinato.errors import KernelError
from ostinato.kernels.rope import rope_append
from ostinato.kernels.rope.ref import rope_append_ref
from ostinato.kernels.rope.triton import rope_append as kernel

from .paged import inputs


def exact(given: dict[str, object]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of each row in float64, from the definition."""
    heads, kv_heads = given["num_heads"], given["num_kv_heads"]
    x = given["qkv"].double()
    q, k, v = x.unflatten(1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), 1)
    if given["q_norm"] is not None:
        q = q / (q.square().mean(-1, keepdim=True) + given["eps"]).sqrt() * given["q_norm"].double()
        k = k / (k.square().mean(-1, keepdim=True) + given["eps"]).sqrt() * given["k_norm"].double()
    half = len(given["inv_freq"])
    angle = (given["positions"][:, None].float() * given["inv_freq"]).double()[:, None]
    cos, sin = angle.cos() * given["rope_scale"], angle.sin() * given["rope_scale"]

    def turn(y: torch.Tensor) -> torch.Tensor:
        a, b = y[..., :half], y[..., half : 2 * half]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, y[..., 2 * half :]), -1)

    return turn(q), turn(k), v


CASES = [
    {"rows": 1, "heads": 1, "kv_heads": 1, "dim": 4, "rotary": 4},
    {"rows": 3, "heads": 9, "kv_heads": 3, "dim": 64, "rotary": 64},
    {"rows": 5, "heads": 6, "kv_heads": 1, "dim": 16, "rotary": 8, "norms": True},
    {"rows": 2, "heads": 4, "kv_heads": 2, "dim": 96, "rotary": 96, "norms": True},
    {"rows": 2, "heads": 2, "kv_heads": 2, "dim": 256, "rotary": 64, "page_size": 16},
    {"rows": 3, "heads": 3, "kv_heads": 1, "dim": 12, "rotary": 4, "page_size": 5, "max_position": 1_000_000 % 2003},
]


@pytest.mark.parametrize("which", ["reference", "kernel"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_arithmetic_in_float64(case: dict[str, object], which: str, device: torch.device) -> None:
    given = inputs(device, **case)
    q, k, v = exact(given)
    run = rope_append_ref if which == "reference" else kernel
    got = run(*given.values())
    # Two products and a sum of float32 values, with cosines good to two units in the last place: 8 units of 2^-24.
    tolerance = {"rtol": 0, "atol": float(q.abs().max()) * 8 * 2**-24}
    torch.testing.assert_close(got.double(), q, **tolerance)
    touched = torch.zeros_like(given["k_cache"][..., 0], dtype=torch.bool)
    for m in range(case["rows"]):
        position, size = int(given["positions"][m]), given["k_cache"].shape[2]
        page = int(given["page_table"][given["slots"][m], position // size])
        torch.testing.assert_close(given["k_cache"][page, :, position % size].double(), k[m], **tolerance)
        assert torch.equal(given["v_cache"][page, :, position % size].double(), v[m])
        touched[page, :, position % size] = True
    assert given["k_cache"][~touched].isnan().all(), "wrote to other places of the cache"
    assert given["v_cache"][~touched].isnan().all(), "wrote to other places of the cache"


@pytest.mark.parametrize("position", [0, 1, 4095, 131_071, 999_999, 1_048_575])
def test_far_positions_keep_their_angle(position: int, device: torch.device) -> None:
    given = inputs(device, 1, 2, 1, 64, 64, page_size=1 << 20, max_position=0)
    given["positions"].fill_(position)
    q, _, _ = exact(given)
    got = kernel(*given.values())
    torch.testing.assert_close(got.double(), q, rtol=0, atol=float(q.abs().max()) * 8 * 2**-24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype, device: torch.device) -> None:
    given = inputs(device, 3, 4, 2, 64, 64, dtype=dtype, norms=True)
    q, _, _ = exact(given)
    got = kernel(*given.values())
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), q, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_table_dies_with_its_frequencies(device: torch.device) -> None:
    """A new tensor at the address (and id) of an old one must not be taken for it."""
    for base in (10000.0, 100.0, 7.0):
        given = inputs(device, 2, 2, 1, 8, 8)
        given["inv_freq"] = (base ** -(torch.arange(0, 8, 2) / 8)).to(device)
        q, _, _ = exact(given)
        torch.testing.assert_close(rope_append_ref(*given.values()).double(), q, rtol=0, atol=1e-5)
        del given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g | {"qkv": g["qkv"][:, :-1]}, "takes qkv"),
        (lambda g: g | {"qkv": g["qkv"].t().contiguous().t()}, "contiguous"),
        (lambda g: g | {"inv_freq": torch.ones(33)}, "inv_freq"),
        (lambda g: g | {"positions": g["positions"].long()}, "positions int32"),
        (lambda g: g | {"slots": g["slots"][:1]}, "slots int32"),
        (lambda g: g | {"q_norm": torch.ones(3)}, "q_norm"),
        (lambda g: g | {"page_table": g["page_table"].long()}, "page_table"),
        (lambda g: g | {"v_cache": g["v_cache"].half()}, "one shape and dtype"),
        (
            lambda g: g | {"k_cache": g["k_cache"].transpose(1, 2), "v_cache": g["v_cache"].transpose(1, 2)},
            "contiguous",
        ),
        (lambda g: g | {"page_table": g["page_table"].to("meta")}, "put them on one device"),
    ],
)
def test_refuses_what_it_does_not_take(change: object, message: str) -> None:
    given = change(inputs(torch.device("cpu"), 2, 4, 2, 64, 64))
    with pytest.raises(KernelError, match=message):
        rope_append(**given)
