"""Qwen3.5 and its relatives on a GPU against the same weights in float32 on the CPU, held to transformers elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ostinato.engine.runner import Runner
from ostinato.kv.paged import PagedKV
from ostinato.layers.linear import Linear, Norm
from ostinato.models import qwen3_5
from ostinato.models.interface import Model
from ostinato.quant.blocks import BlockWeight, dequantize
from ostinato.sampling import SamplingParams
from tests.gpu.models.checkpoints import (
    CONTEXT,
    CPU,
    CUDA,
    DELTA_FAMILIES,
    MemorySource,
    Runs,
    Spec,
    build,
    random_ids,
)

QUANTIZED = tuple(
    dataclasses.replace(DELTA_FAMILIES[index], kind=kind)
    for index, kind in (
        *((0, kind) for kind in ("I4_128", "I4_64", "I4_32", "Q4_K", "Q8_0")),
        (1, "I4_128"),
        (1, "Q4_K"),
        (2, "I4_128"),
        (3, "I4_64"),
        (3, "Q4_K"),
        (4, "I4_128"),  # the shared expert apart from the others
    )
)
IDS = random_ids(200, seed=1)


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> float:
    p, q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def exact_logits(spec: Spec, source: MemorySource | None = None) -> torch.Tensor:
    return Runs(build(spec, CPU, torch.float32, source), CPU, torch.float32).prefill(IDS)


def atol(expected: torch.Tensor) -> float:
    """Nine products in a row in each of four layers and the head's, of up to 768 terms, each off by at most half its
    terms times 2^-23, on both sides."""
    return 2 * 37 * 768 / 2 * 2.0**-23 * float(expected.abs().max())


def noise(spec: Spec, expected: torch.Tensor) -> float:
    """The divergence that the fast path's roundings make, from weights that are off at random instead.

    Activations are rounded to int8 with a scale for a few columns, by up to 0.8 % of a deviation, and to bfloat16, by
    0.2 %. A weight that is off by 1 % has the same effect on a sum, and swaps experts of nearly equal logits as well.
    """
    source = MemorySource(spec)
    generator = torch.Generator().manual_seed(0)
    for name, value in source.values.items():
        if len(source.tensors[name].shape) > 1:
            matrix = dequantize(value) if isinstance(value, BlockWeight) else value
            off = 0.01 * (2 * torch.rand(matrix.shape, generator=generator) - 1)
            source.values[name] = (matrix * (1 + off)).view(source.tensors[name].shape)
    return divergence(expected, exact_logits(spec, source))


@pytest.mark.parametrize("spec", DELTA_FAMILIES + QUANTIZED[:1], ids=str)
def test_float32_is_the_cpus(spec: Spec) -> None:
    """Prefill whole and in chunks, decode after it, and decode from the first token on."""
    expected = exact_logits(spec)
    model = build(spec, CUDA, torch.float32)
    whole = Runs(model, CUDA, torch.float32).prefill(IDS)
    torch.testing.assert_close(whole, expected, rtol=0, atol=atol(expected))
    runs = Runs(model, CUDA, torch.float32)
    mixed, start = [], 0
    for size in (65, 1, 3, 64, 33):
        mixed.append(runs.prefill(IDS[start : start + size], start))
        start += size
    mixed += [runs.decode(IDS[at : at + 1], [at], [0]) for at in range(start, len(IDS))]
    torch.testing.assert_close(torch.cat(mixed), expected, rtol=0, atol=atol(expected))
    runs = Runs(model, CUDA, torch.float32)
    stepwise = torch.cat([runs.decode(IDS[at : at + 1], [at], [0]) for at in range(80)])
    torch.testing.assert_close(stepwise, expected[:80], rtol=0, atol=atol(expected))


@pytest.mark.parametrize("spec", DELTA_FAMILIES + QUANTIZED, ids=str)
def test_the_fast_path_is_near(spec: Spec) -> None:
    """KL from the float32 logits, by the prompt's kernels and by the answer's; see ``noise`` for its size.

    Twice its error (four times its divergence) leaves room for activations whose largest is more than two deviations
    and for queries, keys and values in bfloat16.
    """
    expected = exact_logits(spec)
    bound = 4 * noise(spec, expected)
    assert bound < divergence(expected, expected.roll(1, 0)) / 10  # a wrong position would be seen
    model = build(spec, CUDA, torch.bfloat16)
    assert divergence(expected, Runs(model, CUDA, torch.bfloat16).prefill(IDS)) < bound
    runs = Runs(model, CUDA, torch.bfloat16)
    stepwise = torch.cat([runs.decode(IDS[at : at + 1], [at], [0]) for at in range(len(IDS))])
    assert divergence(expected, stepwise) < bound
    runs = Runs(model, CUDA, torch.bfloat16)
    after = torch.cat([runs.prefill(IDS[:129]), *(runs.decode(IDS[i : i + 1], [i], [0]) for i in range(129, 200))])
    assert divergence(expected, after) < bound


@pytest.mark.parametrize("spec", [*QUANTIZED[:5], *QUANTIZED[7:10]], ids=str)
def test_one_row_is_rounded_by_the_layer_before(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers but the first and the output layer take their row from the layer before; logits are as near without."""
    expected = exact_logits(spec)
    real, found, handed = qwen3_5.handed_norm, [], []

    def spied(*arguments: Any) -> Norm | None:
        norm = real(*arguments)
        handed.append(norm is not None)
        return norm

    model = build(spec, CUDA, torch.bfloat16)
    for replacement in (spied, lambda *_: None):
        monkeypatch.setattr(qwen3_5, "handed_norm", replacement)
        runs = Runs(model, CUDA, torch.bfloat16)
        found.append(torch.cat([runs.decode(IDS[at : at + 1], [at], [0]) for at in range(len(IDS))]))
    assert handed == [True] * len(model.kv_specs) * len(IDS)
    bound = 4 * noise(spec, expected)
    assert divergence(expected, found[0]) < bound
    assert divergence(found[1], found[0]) < bound


@pytest.mark.parametrize("spec", [*QUANTIZED[:5], *QUANTIZED[7:10]], ids=str)
def test_the_output_product_does_the_routers_work(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layer and every step of one row; with the router by itself the logits are as near as without."""
    expected = exact_logits(spec)
    model = build(spec, CUDA, torch.bfloat16)
    calls, real = [], Linear.of_routed

    def spied(self: Linear, *arguments: Any) -> Any:
        calls.append(self)
        return real(self, *arguments)

    monkeypatch.setattr(Linear, "of_routed", spied)
    apart = dataclasses.replace(model, layers=tuple(dataclasses.replace(x, routing=None) for x in model.layers))
    found = []
    for each in (model, apart):
        runs = Runs(each, CUDA, torch.bfloat16)
        found.append(torch.cat([runs.decode(IDS[at : at + 1], [at], [0]) for at in range(len(IDS))]))
    assert len(calls) == len(IDS) * len(model.layers)
    folded = [layer.routing.folded for layer in model.layers if layer.routing is not None]
    assert sum(t.nbytes for t in folded) == model.config.made_bytes
    bound = 4 * noise(spec, expected)
    assert divergence(expected, found[0]) < bound
    assert divergence(found[1], found[0]) < bound


@pytest.mark.parametrize("batch", [2, 3, 8, 20])
@pytest.mark.parametrize("spec", [DELTA_FAMILIES[0], QUANTIZED[0], QUANTIZED[3]], ids=str)
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
            torch.testing.assert_close(actual, right, rtol=0, atol=atol(right))
        else:
            assert divergence(right, actual) < 4 * noise(spec, exact_logits(spec))


@contextmanager
def runner_of(model: Model, num_slots: int, *, graphs: bool) -> Iterator[Runner]:
    kv = PagedKV(model.kv_specs, num_slots=num_slots, context=CONTEXT, page_size=64, dtype=torch.bfloat16, device=CUDA)
    runner = Runner(model, kv, num_slots=num_slots, device=CUDA, graphs=graphs, chunk=64)
    try:
        yield runner
    finally:
        runner.close()


def answers(runner: Runner, batch: int, steps: int) -> list[list[int]]:
    """Tokens of ``batch`` slots, each with settings and a prompt of its own, its second chunk after steps of others."""
    texts: list[list[int]] = [[] for _ in range(batch)]

    def take(slots: range) -> None:
        for slot in slots:
            token = runner.wait(slot).token
            assert token is not None
            texts[slot].append(token)

    for slot in range(batch):
        prompt = random_ids(70 + slot, seed=slot)
        params = SamplingParams(temperature=0.4 * slot, seed=slot, max_tokens=150, ignore_eos=True)
        runner.admit(slot, params, prompt, (), CONTEXT)
        runner.prefill(slot, prompt[:64], 0, draw=False, remaining=150)
        if slot:
            runner.launch(slot + 1)  # the row of this slot is idle, and its state must stay
            take(range(slot))
        runner.prefill(slot, prompt[64:], 64, draw=True, remaining=150)
        take(range(slot, slot + 1))
    for _ in range(steps):
        runner.launch(batch)
        take(range(batch))
    return texts


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("spec", [QUANTIZED[0], QUANTIZED[5], DELTA_FAMILIES[0]], ids=str)
def test_a_graph_writes_what_eager_writes(spec: Spec, batch: int) -> None:
    """Graphs of larger buckets are captured while smaller ones' slots hold state, which must be as it was."""
    model = build(spec, CUDA, torch.bfloat16)
    texts = []
    for graphs in (True, False):
        with runner_of(model, batch, graphs=graphs) as runner:
            texts.append(answers(runner, batch, 40))
    assert texts[0] == texts[1]
    assert len({tuple(text[-30:]) for text in texts[0]}) == batch
