"""One row of a step: experts round it for the layer that follows, here with the references of the ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ostinato.engine.loading import open_checkpoint
from ostinato.layers.attention import Attention
from ostinato.layers.batch import Batch
from ostinato.layers.linear import Linear, Norm, RoundedRow, Target, Weight
from ostinato.layers.moe import MoE
from ostinato.load.quantizing import QuantizingCheckpoint
from ostinato.models import qwen3_5
from ostinato.models.qwen3_5 import Qwen35ForCausalLM, norm_and_product
from ostinato.models.registry import family_of
from ostinato.quant.blocks import BlockWeight
from ostinato.quant.plan import Scheme
from tests.unit.models.tiny import CONTEXT, CPU, Runs, random_ids, save_hf
from tests.unit.models.tiny_qwen3_5 import SPECS, reference

IDS = random_ids(12)


class Blocks(Target):
    """Keeps blocks as they are, as a GPU does, with float32 between ops."""

    @property
    def exact(self) -> bool:
        return False

    def place(self, weight: BlockWeight | torch.Tensor) -> Weight:
        return weight


def model_of(name: str, directory: Path) -> Qwen35ForCausalLM:
    spec = next(s for s in SPECS if s.name == name)
    opened = QuantizingCheckpoint(save_hf(reference(spec), directory), Scheme(32, "int8"))
    checkpoint, reader = open_checkpoint(opened, CPU)
    with torch.inference_mode():
        model = family_of(checkpoint).build(checkpoint, Blocks(CPU, torch.float32), CONTEXT)
    reader.finish()
    assert isinstance(model, Qwen35ForCausalLM)
    return model


def steps(model: Qwen35ForCausalLM) -> torch.Tensor:
    runs = Runs(model)
    return torch.cat([runs.decode([token], [at], [0]) for at, token in enumerate(IDS)])


def on_gpu(batch: Batch) -> Any:
    tokens = SimpleNamespace(is_cuda=True, shape=batch.tokens.shape)
    return SimpleNamespace(tokens=tokens, decode=batch.decode)


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[RoundedRow]:
    """Makes the model believe that it runs on a GPU, and lists the rows that were handed on."""
    real, rows = qwen3_5.handed_norm, []

    def spied(product: Callable[..., Any]) -> Callable[..., Any]:
        def seen(self: Linear, row: RoundedRow, *given: Any, **options: Any) -> Any:
            rows.append(row)
            return product(self, row, *given, **options)

        return seen

    monkeypatch.setattr(qwen3_5, "handed_norm", lambda mlp, following, batch: real(mlp, following, on_gpu(batch)))
    for name in ("of_rounded", "of_rounded_beside"):
        monkeypatch.setattr(Linear, name, spied(getattr(Linear, name)))
    return rows


def apart(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Deviation of the logits' error over theirs, in the better rows: a rounding may swap two of a few experts."""
    return float((actual - expected).std(-1).quantile(0.25) / expected.std())


@pytest.mark.parametrize("name", ["moe", "next", "qwen3-moe"])
def test_handed_rows_change_the_logits_by_their_rounding(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handed: list[RoundedRow]
) -> None:
    """The largest of 16 normal numbers is about two deviations, so int8 errs by 2/127/sqrt(12), 0.5 % of a deviation.

    Each of three layers hands a row on, the last one to the output layer, and every layer behind a row can double its
    error: four, two and one times 0.5 %. A wrong norm is seen, before a layer or before the output layer.
    """
    model = model_of(name, tmp_path)
    found = steps(model)
    assert len(handed) == 3 * len(IDS)
    assert all(row.x.dtype == torch.int8 and row.scale.shape == (1, 4) for row in handed)
    with monkeypatch.context() as patch:
        patch.setattr(qwen3_5, "handed_norm", lambda *_: None)
        expected = steps(model)
    assert len(handed) == 3 * len(IDS)
    bound = (4 + 2 + 1) * 0.005
    assert 0 < apart(found, expected) < bound
    norms = {id(layer.mlp): layer.mixer.norm for layer in model.layers}  # the layer's own, not that which follows
    for at_the_end in (False, True):

        def wrong(mlp: MoE, following: tuple[Norm, Linear], _: Batch, at_the_end: bool = at_the_end) -> Norm:
            return norms[id(mlp)] if (following[1] is model.head) == at_the_end else following[0]

        with monkeypatch.context() as patch:
            patch.setattr(qwen3_5, "handed_norm", wrong)
            assert apart(steps(model), expected) > 2 * bound


def test_who_hands_a_row_on(tmp_path: Path) -> None:
    model = model_of("moe", tmp_path / "moe")
    first, second, last = model.layers
    assert isinstance(first.mlp, MoE)
    assert isinstance(last.mlp, MoE)

    def norm_for(
        mlp: MoE, following: tuple[Norm, Linear], rows: int = 1, *, decode: bool = True, is_cuda: bool = True
    ) -> Norm | None:
        tokens = SimpleNamespace(is_cuda=is_cuda, shape=(rows,))
        return qwen3_5.handed_norm(mlp, following, SimpleNamespace(tokens=tokens, decode=decode))  # type: ignore[arg-type]  # a stand-in

    behind = norm_and_product(second)
    assert norm_for(first.mlp, behind) is second.mixer.norm
    assert norm_for(second.mlp, norm_and_product(last)) is last.mixer.norm
    assert norm_for(last.mlp, (model.norm, model.head)) is model.norm
    assert norm_for(last.mlp, (model.norm, Linear((torch.zeros(model.head.parts[0].shape),)))) is None
    assert norm_for(first.mlp, behind, 2) is None
    assert norm_for(first.mlp, behind, decode=False) is None
    assert norm_for(first.mlp, behind, is_cuda=False) is None
    assert isinstance(second.mixer, Attention)
    qkv = second.mixer.qkv
    dense = replace(second.mixer, qkv=Linear((torch.zeros(qkv.parts[0].shape),)))
    assert norm_for(first.mlp, norm_and_product(replace(second, mixer=dense))) is None
    biased = replace(second.mixer, qkv=Linear(qkv.parts, torch.zeros(qkv.parts[0].shape[0])))
    assert norm_for(first.mlp, norm_and_product(replace(second, mixer=biased))) is None
    apart_from_others = model_of("moe-wide-shared", tmp_path / "wide").layers[0].mlp
    assert isinstance(apart_from_others, MoE)
    assert norm_for(apart_from_others, behind) is None


def test_a_dense_layer_between_hands_nothing_on(tmp_path: Path, handed: list[RoundedRow]) -> None:
    """Of next-some-dense's three layers the second has no experts; the third hands its row to the output layer."""
    steps(model_of("next-some-dense", tmp_path))
    assert len(handed) == 2 * len(IDS)
