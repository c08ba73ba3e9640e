"""Launching a mixture of experts: three kernels for few tokens, six for up to 64, grouped products for more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton

from ostinato.errors import KernelError
from ostinato.kernels.block_linear.planes import kind_constants, pairs
from ostinato.kernels.grouped_linear import grouped_linear
from ostinato.kernels.launch import launch_options
from ostinato.kernels.moe.experts.triton import (
    _combine_kernel,
    _down_kernel,
    _down_list_kernel,
    _gate_up_kernel,
    _gate_up_list_kernel,
)
from ostinato.kernels.moe.lists.triton import _down_mma_kernel, _gate_up_mma_kernel
from ostinato.kernels.moe.ref import HANDED, Stack, moe_block_dense, stack_of
from ostinato.kernels.moe.route.triton import _choose_kernel, _router_kernel, _sort_kernel
from ostinato.kernels.rms_norm import rms_norm
from ostinato.quant.blocks import KINDS, BlockWeight

SPARSE = 0.4  # picks for each expert: up to so many, tokens do not look for experts in common
MAX_APART = 16  # tokens that do not, at most
MAX_ROWS = 64  # more are products on the tensor cores
INTEGER = ("I4_128", "I4_128")  # kinds whose lists are products on integer tensor cores
COARSE = ("I4_64", "I4_128")  # kinds of few scales
MIN_INTEGER = 8  # rows from which the rule takes them; fewer do not fill the GPU with programs of 128 columns
MAX_COLUMNS = 8192  # a program holds whole rows of a weight in registers


@dataclass(frozen=True)
class MoeTiles:
    """How the block is cut into programs.

    router_rows: experts a program. router_tokens: tokens a program. gate_rows: of F a program, 4, 8 or 16: they share a
    scale. down_rows: of H a thread. early: down loads before gate and up are done. together: picks side by side over
    the threads of down for one token, a divisor of its rows a thread and of the rows side by side. tokens: picks that
    share a program. registers: most of a thread in products of lists, 0 for no limit. apart: each token has programs of
    its own, as a single one always has, and no lists.

    integer: lists are multiplied on tensor cores, 128 of F a program, eight picks at a time (tokens is 8). Then
    gate_tiles, down_tiles: tiles of 16 rows a warp, the latter in down_warps. down_depth: groups of 128 columns that
    are loaded ahead. down_registers: as registers.
    """

    router_rows: int
    router_warps: int
    gate_rows: int
    gate_warps: int
    down_rows: int
    down_warps: int
    router_tokens: int = 1
    early: bool = True
    together: int = 1
    tokens: int = 8
    registers: int = 0
    apart: bool = False
    integer: bool = False
    gate_tiles: int = 1
    down_tiles: int = 1
    down_depth: int = 4
    down_registers: int = 128

    def int8_groups(self, of_shared: int | None = None) -> tuple[int, int, int]:
        """Columns that share a scale: of x, of what down reads, and there for the shared expert (``of_shared``)."""
        of_x, of_inner = (128, 128) if self.integer else (16, self.gate_rows)
        return of_x, of_inner, of_shared or of_inner


@dataclass(frozen=True)
class OneToken:
    """How gate and up are cut for one token: groups of 32 columns side by side, and the fields of their kernel."""

    groups: int
    together: int
    side: int
    shared: int
    programs: int


def one_token(tiles: MoeTiles, hidden: int, width: int, top_k: int, has_shared: bool) -> OneToken:
    """Rows of a weight lie in one warp, if it has warps enough of groups, so that sums meet no other warp's."""
    groups = min(32, triton.next_power_of_2(hidden // 32))
    together = 2 if top_k % 2 == 0 and tiles.gate_warps > 1 else 1
    side = min(tiles.gate_rows, max(1, tiles.gate_warps * 32 // groups // together))
    programs = top_k // together * (width // tiles.gate_rows)
    shared = max(4, side * together // 2, triton.next_power_of_2(triton.cdiv(width, programs))) if has_shared else 0
    return OneToken(groups, together, side, shared, programs)


def default_tiles(
    m: int, hidden: int, width: int, kinds: tuple[str, str], density: float, hands_down: bool = False
) -> MoeTiles:
    """Tiles by rule, from measurements at H = 2048, F = 512 (docs/performance/kernels_moe.md).

    kinds: of gate and up, and of down. density: picks of all tokens for each expert, the shared one aside.
    hands_down: with a ``next_norm``, for which a program of down has whole scales.
    """
    wide = max(1, min(4, hidden // 512))
    if m == 1 or (m <= MAX_APART and density <= SPARSE):
        together = 2 if width <= 512 else 1  # 32 lanes have a row
        warps = 8 if hands_down and width > 512 else 4  # 16 rows a program
        gate = 4, max(1, min(4, hidden // 1024))
        if kinds[0] in COARSE:  # few scales leave a thread room for more rows of gate and of up
            gate = 8, 1 << max(0, min(2, (hidden // 512).bit_length()))
        return MoeTiles(4 if m == 1 else 8, 8, *gate, 2 * together, warps, together=together, apart=True)
    if kinds == INTEGER and m >= MIN_INTEGER and width <= 2048:
        tiles = MoeTiles(8, 8, 8, wide, 8, 1, integer=True, down_tiles=4, down_registers=255)
        if m <= 16:
            return replace(tiles, router_tokens=1 if m <= 8 else 2, gate_tiles=2, registers=255)
        return replace(tiles, router_tokens=4, registers=128, down_warps=2)
    if m <= 4:
        rows = 8 if m <= 2 else 16
        return MoeTiles(8, 8, rows, wide, rows, 1, tokens=16, registers=128 if m <= 2 else 0)
    router_tokens = 1 if m < 16 else 2
    return MoeTiles(8, 8, 8, wide, 8, 4, router_tokens=router_tokens, tokens=16, registers=128)


def moe_block(
    h: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    router: torch.Tensor,
    shared_gate: torch.Tensor | None,
    gate_up: Sequence[torch.Tensor | None],
    gate_up_kind: str,
    down: Sequence[torch.Tensor | None],
    down_kind: str,
    num_experts: int,
    top_k: int,
    normalize: bool,
    has_shared: bool,
    next_norm: torch.Tensor | None = None,
    routed_x: torch.Tensor | None = None,
    routed_scale: torch.Tensor | None = None,
    routed_squares: torch.Tensor | None = None,
    routed_logits: torch.Tensor | None = None,
    tiles: MoeTiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernels for h [M, H]; arguments as the op's, and ``tiles`` in place of the rule's."""
    tokens, hidden = h.shape
    handed = _handed(hidden if next_norm is not None else 0, h.device)
    if gate_up_kind == "dense":
        out = moe_block_dense(
            h, norm=norm, eps=eps, router=router, gate_up=_first(gate_up), down=_first(down), top_k=top_k,
            normalize=normalize, shared_gate=shared_gate, has_shared=has_shared,
        )  # fmt: skip
        return out, *handed
    width = _first(gate_up).shape[0] // (2 * (num_experts + has_shared))
    if tokens == 0:
        return torch.empty_like(h), *handed
    if h.data_ptr() % 16:  # kernels load four elements at a time
        h = h.clone()
    if tokens > MAX_ROWS:
        stacks = stack_of(gate_up, gate_up_kind, hidden), stack_of(down, down_kind, width)
        out = _many_rows(h, norm, eps, router, shared_gate, *stacks, num_experts, top_k, normalize, has_shared)
        return out, *handed
    if max(hidden, width) > MAX_COLUMNS:
        raise KernelError(
            f"moe_block takes up to {MAX_COLUMNS} columns for up to {MAX_ROWS} rows, got {hidden} and {width} columns"
        )
    kinds = gate_up_kind, down_kind
    if tiles is None:
        tiles = default_tiles(tokens, hidden, width, kinds, tokens * top_k / num_experts, next_norm is not None)
    apart = tiles.apart or tokens == 1
    if tiles.integer:
        assert kinds == INTEGER, "tensor cores take lists of I4_128 only"
        assert not apart, "tokens apart have no lists"
        assert tiles.tokens == 8, "a product has eight picks"
    t = tiles
    device = h.device
    options = launch_options(device)
    picks = top_k + has_shared
    padded = max(32, triton.next_power_of_2(num_experts))
    parts_of_squares = 0
    if routed_x is not None:
        assert routed_scale is not None, "what is routed comes whole"
        assert routed_squares is not None, "what is routed comes whole"
        assert routed_logits is not None, "what is routed comes whole"
        x = routed_x.view(torch.int32), routed_scale, routed_squares
        logits = routed_logits
        parts_of_squares = routed_squares.shape[2]
    else:
        logits = torch.empty((tokens, num_experts + 1), dtype=torch.float32, device=device)
        x = *_int8(tokens, hidden, 4, device), torch.empty(tokens, dtype=torch.float32, device=device)
        grid = (triton.cdiv(num_experts, t.router_rows) + 1, triton.cdiv(tokens, t.router_tokens))
        _router_kernel[grid](
            h, norm, eps, router, shared_gate if shared_gate is not None else router, logits, *x, tokens,
            num_experts, hidden, t.router_rows, triton.next_power_of_2(hidden // 32), t.router_tokens,
            shared_gate is not None, t.integer, num_warps=t.router_warps, **options,
        )  # fmt: skip
    share = t.gate_rows // 4
    act: tuple[torch.Tensor, ...] = () if t.integer else _int8(tokens * picks, width, 1 if apart else share, device)
    gate_planes = _planes(gate_up, gate_up_kind)
    down_planes = _planes(down, down_kind)
    gate_constants = kind_constants(KINDS[gate_up_kind])
    down_constants = kind_constants(KINDS[down_kind])
    gate_groups = triton.next_power_of_2(hidden // 32)
    out = torch.empty_like(h)
    if apart:
        cut = one_token(t, hidden, width, top_k, has_shared)
        _gate_up_kernel[(cut.programs, tokens)](
            *x, eps, logits, *gate_planes, act[0].view(torch.int8), act[1], num_experts, hidden, width, *gate_constants,
            padded, top_k, t.gate_rows // cut.side, cut.side, cut.together, cut.groups, cut.shared, parts_of_squares,
            tokens > 1, num_warps=t.gate_warps, **options,
        )  # fmt: skip
        down_groups = min(32, triton.next_power_of_2(width // 32))
        together = min(t.together, 32 // down_groups)  # a row's sum over picks stays in one warp
        side = max(1, t.down_warps * 32 // down_groups // together)
        rows = min(t.down_rows, down_groups * together)  # a lane ends with one row's sum
        if next_norm is not None and rows * side % HANDED:
            raise KernelError(f"moe_block: {rows * side} rows a program of down are no multiple of {HANDED}")
        assert rows % together == 0, f"{t} leaves picks side by side without rows of the shared expert"
        after = (next_norm, *handed) if next_norm is not None else (h, out, out, out)
        _down_kernel[(triton.cdiv(hidden, rows * side), tokens)](
            *act, logits, *down_planes, h, out, *after, x[2], eps, num_experts, hidden, hidden, width,
            *down_constants,
            padded, top_k, normalize, has_shared, shared_gate is not None,
            share, max(cut.shared // 4, 1), rows, side, together, down_groups, t.early,
            HANDED if next_norm is not None else 0, parts_of_squares, tokens > 1, num_warps=t.down_warps, **options,
        )  # fmt: skip
        return out, *handed
    ids = torch.empty((tokens, picks), dtype=torch.int32, device=device)
    weights = torch.empty((tokens, picks), dtype=torch.float32, device=device)
    _choose_kernel[(tokens,)](
        logits, ids, weights, num_experts, padded, top_k, normalize, has_shared, shared_gate is not None,
        num_warps=1, **options,
    )  # fmt: skip
    routed = tokens * top_k
    num_shared = triton.cdiv(tokens, t.tokens) if has_shared else 0
    num_blocks = min(num_experts, routed) + routed // t.tokens
    order = torch.empty(routed, dtype=torch.int32, device=device)
    blocks = torch.empty((num_blocks, 4), dtype=torch.int32, device=device)
    _sort_kernel[(1,)](
        ids, order, torch.empty(padded, dtype=torch.int32, device=device), blocks, tokens, num_experts, num_blocks,
        padded, top_k, picks, triton.next_power_of_2(routed), t.tokens, triton.cdiv(tokens, t.tokens),
        num_warps=max(1, min(8, padded // 32)), **options,
    )  # fmt: skip
    limit = _limit(t.registers)
    parts = torch.empty((tokens * picks, hidden), dtype=torch.float32, device=device)
    lists = order, blocks
    counts = tokens, num_experts, num_shared
    if t.integer:
        inner = torch.empty((tokens * picks, width), dtype=torch.int8, device=device)
        scales = torch.empty((tokens * picks, width // 128, 2), dtype=torch.float32, device=device)
        gate_words, _, gate_d, gate_m, _, _ = gate_planes
        down_words, _, down_d, down_m, _, _ = down_planes
        _gate_up_mma_kernel[(width // 128, num_shared + num_blocks)](
            *x, *lists, gate_words, gate_d, gate_m, inner, scales, *counts, hidden, width, picks,
            t.gate_tiles, num_warps=8 // t.gate_tiles, **options, **limit,
        )  # fmt: skip
        _down_mma_kernel[(triton.cdiv(hidden, t.down_tiles * t.down_warps * 16), num_shared + num_blocks)](
            inner.view(torch.int32), scales, *lists, weights, down_words, down_d, down_m, parts, *counts, hidden, width,
            picks, t.down_tiles, t.down_warps, min(t.down_depth, width // 128), num_warps=t.down_warps, **options,
            **_limit(t.down_registers),
        )  # fmt: skip
    else:
        down_groups = triton.next_power_of_2(width // 32)
        side = max(1, t.down_warps * 32 // down_groups)  # rows side by side over the threads
        _gate_up_list_kernel[(width // t.gate_rows, num_shared + num_blocks)](
            *x, *lists, *gate_planes, *act, *counts, hidden, width, *gate_constants,
            picks, t.tokens, t.gate_rows, gate_groups, num_warps=t.gate_warps, **options, **limit,
        )  # fmt: skip
        _down_list_kernel[(triton.cdiv(hidden, t.down_rows * side), num_shared + num_blocks)](
            *act, *lists, weights, *down_planes, parts, *counts, hidden, width,
            *down_constants, picks, t.tokens, share, t.down_rows, side, down_groups,
            num_warps=t.down_warps, **options, **limit,
        )  # fmt: skip
    block = min(512, triton.next_power_of_2(hidden))
    _combine_kernel[(tokens, triton.cdiv(hidden, block))](
        h, parts, out, hidden, picks, block, num_warps=max(1, block // 128), **options
    )
    return out, *handed


def _first(planes: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """A stack's tensor, or its words."""
    first = planes[0]
    assert first is not None, "a stack has at least its words"
    return first


def _planes(planes: Sequence[torch.Tensor | None], kind: str) -> tuple[torch.Tensor, ...]:
    """The planes of a block weight in the kernels' order."""
    words, d, high, m, sub_d, sub_m = planes
    assert words is not None, "a block weight has words"
    assert d is not None, "a block weight has scales"
    return pairs(words, d, high, m, sub_d, sub_m, KINDS[kind])


def _limit(registers: int) -> dict[str, int]:
    """The launch option for most registers of a thread; 0 for no limit."""
    return {"maxnreg": registers} if registers else {}


def _int8(rows: int, columns: int, share: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for int8 rows: words int32 [rows, columns / 4], and scales float32, one for ``share`` words."""
    words = torch.empty((rows, columns // 4), dtype=torch.int32, device=device)
    return words, torch.empty((rows, columns // 4 // share), dtype=torch.float32, device=device)


def _handed(hidden: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for a row that is handed to the next product: int8, scales and sums of squares; 0 columns for none."""
    groups = hidden // HANDED
    return (
        torch.empty((1, hidden) if hidden else (0,), dtype=torch.int8, device=device),
        torch.empty((1, groups) if hidden else (0,), dtype=torch.float32, device=device),
        torch.empty((1, 1, groups) if hidden else (0,), dtype=torch.float32, device=device),
    )


def _many_rows(
    h: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    router: torch.Tensor,
    shared_gate: torch.Tensor | None,
    gate_up: Stack,
    down: Stack,
    num_experts: int,
    top_k: int,
    normalize: bool,
    has_shared: bool,
) -> torch.Tensor:
    """The block for many rows: bfloat16 products of picks sorted by expert; logits keep float32's precision."""
    tokens = h.shape[0]
    wide = rms_norm(h, norm, eps, torch.float32)
    x = wide.to(torch.bfloat16)
    logits = torch.empty((tokens, num_experts + 1), dtype=torch.float32, device=h.device)
    if router.dtype == torch.bfloat16 and h.device.type == "cuda":
        # Two bfloat16 hold 16 bits of a float32, enough that few choices differ from those for one token.
        rest = (wide - x.float()).to(torch.bfloat16)
        found = torch.mm(x, router.T, out_dtype=torch.float32) + torch.mm(rest, router.T, out_dtype=torch.float32)
        logits[:, :num_experts] = found
    else:
        logits[:, :num_experts] = wide @ router.float().T
    if shared_gate is not None:
        logits[:, num_experts] = wide @ shared_gate.float()
    assert isinstance(gate_up, BlockWeight), "dense stacks were multiplied before"
    assert isinstance(down, BlockWeight), "dense stacks were multiplied before"
    picks = top_k + has_shared
    padded = max(32, triton.next_power_of_2(num_experts))
    ids = torch.empty((tokens, picks), dtype=torch.int32, device=h.device)
    weights = torch.empty((tokens, picks), dtype=torch.float32, device=h.device)
    options = launch_options(h.device)
    _choose_kernel[(tokens,)](
        logits, ids, weights, num_experts, padded, top_k, normalize, has_shared, shared_gate is not None,
        num_warps=1, **options,
    )  # fmt: skip
    return grouped_linear(x, gate_up, down, ids, weights, num_experts=num_experts + has_shared, residual=h)
