"""Quantizing weights without calibration data: four bits with a solved scale and minimum, six and eight symmetric.

Four bits: half-quadratic splitting as in HQQ (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning
Models", 2023), with p = 0.7. For each group it looks for the scale d and the minimum m that make

    sum |e|**p + beta / 2 (w - (d q + m) - e)**2,     q = round((w - m) / d) in 0 … 15

small: an auxiliary error e takes what the quants cannot express, by the generalized soft threshold of the p-norm; then
d and m are the least-squares line through (q, w - e), where HQQ solves for the zero alone. A large error costs little
under p < 1, so iterates leave the ends of a group outside; errors are in steps d, so that the size of a tensor's
weights does not matter. Of all iterates, and the plain range of the group, the one with the least squared error counts:
by it the p-norm alone goes too far (measured: a smaller error and a smaller KL than with the p-norm as the judge).

Six and eight bits: w = d q without a minimum; of some scales around the largest weight the one with the least squared
error, then the least-squares scale for its quants.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ostinato.errors import ModelFileError
from ostinato.quant.blocks import BlockKind, BlockWeight, pack_quants, plane_columns

QUANTIZABLE = ("I4_32", "I4_64", "I4_128", "I6_64", "I8_64")

_LARGEST_Q = 15
# Weights at a time. On a CPU within the caches, and so few that PyTorch leaves each operation to one thread: threads
# take tiles instead, without a barrier after every operation. On a GPU 1 GB of temporaries.
_TILE = {"cpu": 1 << 15, "cuda": 1 << 24}
_SHRINKS = {6: 16, 8: 6}  # scales that are tried, per number of bits: 0.5 % apart below that of the largest weight


@dataclass(frozen=True)
class Solver:
    """p: of the norm. beta: weight of the auxiliary error's penalty, in steps; it grows by ``growth`` an iteration."""

    iterations: int = 20
    p: float = 0.7
    beta: float = 4.0
    growth: float = 1.05


def quantize(weight: torch.Tensor, kind: BlockKind, solver: Solver | None = None) -> BlockWeight:
    """The matrix [N, K] of floats as ``kind`` (one of QUANTIZABLE), on its device, computed in float32.

    Rows are independent: a matrix in pieces gives the same as the whole. Raises ModelFileError for weights that are
    not finite or that float16 scales cannot express.
    """
    n, k = weight.shape
    assert kind.name in QUANTIZABLE
    assert k % kind.block == 0, f"{kind.name} cannot hold {k} columns"
    columns = plane_columns(kind, k)
    planes = {name: torch.empty(n, wide, dtype=t, device=weight.device) for name, (wide, t) in columns.items()}
    step = max(1, _TILE[weight.device.type] // k)
    starts = range(0, n, step)

    def tile(start: int) -> BlockWeight:
        return _tile(weight[start : start + step].float(), kind, solver or Solver())

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        tiles = threads.map(tile, starts) if weight.device.type == "cpu" and len(starts) > 1 else map(tile, starts)
        for start, part in zip(starts, tiles, strict=True):
            for name, values in part.planes().items():
                planes[name][start : start + step] = values
    if not all(bool(planes[name].isfinite().all()) for name in ("d", "m") if name in planes):
        raise ModelFileError("it has weights that are not finite, or beyond what float16 scales can express")
    return BlockWeight(kind, (n, k), **planes)


def _tile(weight: torch.Tensor, kind: BlockKind, solver: Solver) -> BlockWeight:
    """Some rows, float32."""
    n, k = weight.shape
    groups = weight.reshape(-1, kind.group)
    m = None
    if kind.bits == 4:
        q, d, m = solve_int4(groups, solver)
    else:
        q, d = solve_symmetric(groups, kind.bits)
    words, high = pack_quants(q.view(n, k), kind.bits)
    return BlockWeight(kind, (n, k), words, d.view(n, -1), high, None if m is None else m.view(n, -1))


def solve_int4(w: torch.Tensor, solver: Solver) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quants uint8 [G, g], scale and minimum float16 [G] of groups w float32 [G, g]."""
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    d, m = (high - low) / _LARGEST_Q, low
    best_d, best_m = d, m
    best = torch.full_like(d, torch.inf)
    beta = solver.beta
    for _ in range(solver.iterations + 1):
        inverse = _inverse(d)
        q = _quants(w, inverse, m)
        error = torch.addcmul(m, q, d).neg_().add_(w)
        loss = error.square().sum(1, keepdim=True)
        better = loss < best
        best = torch.where(better, loss, best)
        best_d, best_m = torch.where(better, d, best_d), torch.where(better, m, best_m)
        # The part of each error beyond the threshold belongs to the auxiliary variable, the line need not follow it.
        steps = (error * inverse).abs_()
        threshold = steps.clamp_min(1e-6).pow_(solver.p - 1).mul_(1 / beta)
        kept = steps.sub_(threshold).clamp_min_(0)
        beta *= solver.growth
        target = w - kept.mul_(d).copysign_(error)
        d, m = _line(q, target, d)
    d, m = best_d.half(), best_m.half()
    wide = d.float()
    q = _quants(w, _inverse(wide), m.float())
    return q.to(torch.uint8), d.squeeze(1), m.squeeze(1)


def _line(q: torch.Tensor, target: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least-squares line target = d q + m of each group; where all quants are equal d stays and m is solved."""
    mean_q, mean_t = q.mean(1, keepdim=True), target.mean(1, keepdim=True)
    centred = q - mean_q
    spread = centred.square().sum(1, keepdim=True)
    slope = (centred * target).sum(1, keepdim=True) / spread
    good = (spread > 0) & (slope > 0)
    d = torch.where(good, slope, d)
    return d, mean_t - d * mean_q


def _quants(w: torch.Tensor, inverse: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return (w - m).mul_(inverse).round_().clamp_(0, _LARGEST_Q)


def _inverse(d: torch.Tensor) -> torch.Tensor:
    """1 / d; 0 where d is 0, as in a group of equal weights."""
    return torch.where(d != 0, 1 / d, 0.0)


def solve_symmetric(w: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored quants [G, g] (uint8 with offset 32 for 6 bits, int8 for 8) and scale float16 [G] of w float32 [G, g].

    Six bits reach from -32 to 31: the scale's sign puts the largest weight on -32.
    """
    low, high = (-32, 31) if bits == 6 else (-127, 127)
    largest = w.gather(1, w.abs().argmax(1, keepdim=True))
    widest = largest / low if bits == 6 else largest.abs() / high
    best_d = widest
    best = torch.full_like(widest, torch.inf)
    for i in range(_SHRINKS[bits]):
        d = widest * (1 - 0.005 * i)
        q = (w * _inverse(d)).round_().clamp_(low, high)
        squares = (q * q).sum(1, keepdim=True)
        product = (q * w).sum(1, keepdim=True)
        d = torch.where(squares > 0, product / squares, d)  # the best scale for these quants
        loss = -product * d  # plus the sum of w², which is the same for all
        better = loss < best
        best, best_d = torch.where(better, loss, best), torch.where(better, d, best_d)
    d = best_d.half()
    q = (w * _inverse(d.float())).round_().clamp_(low, high)
    return (q + 32).to(torch.uint8) if bits == 6 else q.to(torch.int8), d.squeeze(1)
