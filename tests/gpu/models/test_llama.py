"""Llama-like models on a GPU against the same weights in float32 on the CPU, which other tests hold to transformers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ostinato.quant.blocks import BlockWeight, dequantize
from tests.gpu.models.checkpoints import CPU, CUDA, FAMILIES, MemorySource, Runs, Spec, build, random_ids

QUANTIZED = tuple(
    dataclasses.replace(FAMILIES[index], kind=kind)
    for index, kind in ((0, "Q4_1"), (0, "Q4_K"), (0, "Q6_K"), (2, "Q4_K"), (3, "Q8_0"), (4, "Q5_K"), (4, "Q4_1"))
)
IDS = random_ids(150, seed=1)


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> float:
    p, q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def exact_logits(spec: Spec, source: MemorySource | None = None) -> torch.Tensor:
    return Runs(build(spec, CPU, torch.float32, source), CPU, torch.float32).prefill(IDS)


def noise(spec: Spec, expected: torch.Tensor) -> float:
    """The divergence that the fast path's roundings make, from weights that are off at random instead.

    The largest of 32 normal numbers is about two deviations, so a rounding to int8 in groups of 32 is off by up to
    2 / 127 / 2 = 0.8 % of a deviation; bfloat16 adds 0.2 %. A weight that is off by 1 % has the same effect on a sum.
    """
    source = MemorySource(spec)
    generator = torch.Generator().manual_seed(0)
    for name, value in source.values.items():
        if len(value.shape) == 2:
            matrix = dequantize(value) if isinstance(value, BlockWeight) else value
            off = 0.01 * (2 * torch.rand(matrix.shape, generator=generator) - 1)
            source.values[name] = matrix * (1 + off)
    return divergence(expected, exact_logits(spec, source))


@pytest.mark.parametrize("spec", FAMILIES + QUANTIZED, ids=str)
def test_float32_is_the_cpus(spec: Spec) -> None:
    """Prefill whole and in chunks, decode after it, and decode from the first token on."""
    expected = exact_logits(spec)
    model = build(spec, CUDA, torch.float32)
    # About 13 products in a row of up to 512 terms, each off by at most half its terms times 2^-23, on both sides; and
    # cosines whose angles differ in their last place.
    atol = 2 * 13 * 512 / 2 * 2.0**-23 * float(expected.abs().max())
    whole = Runs(model, CUDA, torch.float32).prefill(IDS)
    torch.testing.assert_close(whole, expected, rtol=0, atol=atol)
    runs = Runs(model, CUDA, torch.float32)
    mixed = [runs.prefill(IDS[:70]), runs.prefill(IDS[70:71], 70), runs.prefill(IDS[71:130], 71)]
    mixed += [runs.decode(IDS[at : at + 1], [at], [0]) for at in range(130, 150)]
    torch.testing.assert_close(torch.cat(mixed), expected, rtol=0, atol=atol)
    runs = Runs(model, CUDA, torch.float32)
    stepwise = torch.cat([runs.decode(IDS[at : at + 1], [at], [0]) for at in range(80)])
    torch.testing.assert_close(stepwise, expected[:80], rtol=0, atol=atol)


@pytest.mark.parametrize("spec", FAMILIES + QUANTIZED, ids=str)
def test_the_fast_path_is_near(spec: Spec) -> None:
    """KL from the float32 logits, by the prompt's kernels and by the answer's; see ``noise`` for its size.

    Twice its error (four times its divergence) leaves room for activations whose largest is more than two deviations
    and for queries, keys and values in bfloat16.
    """
    expected = exact_logits(spec)
    bound = 4 * noise(spec, expected)
    assert bound < divergence(expected, expected.roll(1, 0)) / 20  # a wrong position would be seen
    model = build(spec, CUDA, torch.bfloat16)
    assert divergence(expected, Runs(model, CUDA, torch.bfloat16).prefill(IDS)) < bound
    runs = Runs(model, CUDA, torch.bfloat16)
    stepwise = torch.cat([runs.decode(IDS[at : at + 1], [at], [0]) for at in range(len(IDS))])
    assert divergence(expected, stepwise) < bound
    runs = Runs(model, CUDA, torch.bfloat16)
    after = torch.cat([runs.prefill(IDS[:129]), *(runs.decode(IDS[i : i + 1], [i], [0]) for i in range(129, 150))])
    assert divergence(expected, after) < bound


@pytest.mark.parametrize("batch", [2, 3, 8, 11, 16])
@pytest.mark.parametrize("spec", [FAMILIES[1], FAMILIES[2], QUANTIZED[0], QUANTIZED[5]], ids=str)
def test_rows_of_different_lengths_in_any_order(spec: Spec, batch: int) -> None:
    reference = build(spec, CPU, torch.float32)
    exact, fast = build(spec, CUDA, torch.float32), build(spec, CUDA, torch.bfloat16)
    lengths = [1 + (37 * slot) % 140 for slot in range(batch)]
    texts = [random_ids(length + 4, seed=slot) for slot, length in enumerate(lengths)]
    expected = [Runs(reference, CPU, torch.float32).prefill(text) for text in texts]
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(batch)).tolist()
    for model, kv_dtype in ((exact, torch.float32), (fast, torch.bfloat16)):
        runs = Runs(model, CUDA, kv_dtype, batch)
        for slot, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            runs.prefill(text[:length], slot=slot)
        wanted, found = [], []
        for step in range(4):
            positions = [lengths[slot] + step for slot in order]
            rows = [texts[slot][at] for slot, at in zip(order, positions, strict=True)]
            found.append(runs.decode(rows, positions, order))
            wanted.append(torch.stack([expected[slot][at] for slot, at in zip(order, positions, strict=True)]))
        actual, right = torch.cat(found), torch.cat(wanted)
        if kv_dtype == torch.float32:
            atol = 2 * 13 * 512 / 2 * 2.0**-23 * float(right.abs().max())
            torch.testing.assert_close(actual, right, rtol=0, atol=atol)
        else:
            assert divergence(right, actual) < 4 * noise(spec, exact_logits(spec))
