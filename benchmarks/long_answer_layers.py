"""4,096 decoded tokens layer by layer: what each layer added while decoding against its prefill of the same rows.

    python benchmarks/long_answer_layers.py [--model MODEL | --random NAME [--layers N]] [--dtype float32]

A whole network amplifies roundings (``long_answer.py``), a layer by itself does not. So the step records the residual
stream before and after every mixer and every MLP, inside the captured graph. Afterwards each of them prefills the rows
that it read, mixers from a fresh slot on and in the chunks of any prompt. What is compared is what it added to the
stream: the distance of a token's two rows over the norm of prefill's, averaged over tokens. What mixers keep for the
next token, states, keys and values, is compared by head or by position.

Allowed is what int8 activations cost. A value x = s q with q = round(x / s), s = max|x| / 127 over a group, errs by up
to s / 2, evenly: by s / sqrt(12) in root mean square, relative to the group's by e = max|x| / rms(x) / (127 sqrt(12)).
In 32 normal values, the widest group of a decoded row, the largest is 2.4 rms: e = 0.55 %. (In any 32 values it is at
most sqrt(32) rms: 1.3 %.) Each product inherits e, since the errors do not depend on the weights, and where P rounded
factors enter a result the squares of their errors add up: a mixer's q, k, v and gate and what its output product reads
(P = 5), an MLP's gate and up and what its down product reads (P = 3), a state's keys and values (P = 2), what stands in
a convolution or a KV cache (P = 1). The slopes of SiLU and softmax, other distributions and the bfloat16 of prefill,
0.2 % a rounding, may double it: 2 e sqrt(P). A KV cache of FP8 has a rounding of its own and is not allowed for.

In float32 a result may be off by 1e-4: K terms in another order give sqrt(K) 2^-24, 3e-6 for 2,048, and the delta rule
has several such sums in a row. One token, head or position may be off by four times what the means may.

Beside it stands what rounding the inputs alone to bfloat16 does to the same prefill. A rounding may decide which expert
is taken; then a token is off by a large part of an expert. Tokens off by over five medians of their layer are counted
by themselves, and may be one in a hundred.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from long_answer import allocated_bytes, arguments, drawn, load, start_answer

from ostinato.engine.loading import Loaded
from ostinato.engine.runner import Runner
from ostinato.kernels.delta.ref import settled_ref
from ostinato.kv.paged import LayerKV, PagedKV
from ostinato.kv.recurrent import RecurrentState
from ostinato.layers.attention import Attention
from ostinato.layers.batch import Batch
from ostinato.layers.delta_net import DeltaNet
from ostinato.layers.linear import Norm, RoundedEights, RoundedRow, RoutedRow
from ostinato.layers.mlp import GatedMLP
from ostinato.layers.moe import MoE
from ostinato.models.llama import LlamaForCausalLM
from ostinato.models.qwen3_5 import Qwen35ForCausalLM

PROMPT_TOKENS = 16
ENDS = (64, 256, 1024)  # of the buckets of positions; the last one takes the rest
INT8_ERROR = 2.4 / (127 * 12**0.5)
FLOAT32_BOUND = 1e-4
FACTORS = {
    "delta mixer": 5,
    "attention mixer": 5,
    "experts": 3,
    "MLP": 3,
    "state": 2,
    "convolution": 1,
    "keys, values": 1,
}
LARGEST = 4  # times the bound of a mean, for one token, head or position
OUTLIER = 5  # medians
MAX_OUTLIERS = 0.01

Mixer = Attention | DeltaNet
MLP = GatedMLP | MoE
Transformer = Qwen35ForCausalLM | LlamaForCausalLM


# -- recording -----------------------------------------------------------------------------------------------------


class Stream:
    """The residual stream of one slot by position, before each part of a model and after the last.

    rows: float32 [2 · layers + 1, T, hidden]. Layer i's mixer reads rows[2 i] and its MLP rows[2 i + 1]. Decode steps
    write it, and prefills while ``prompt`` is set.
    """

    def __init__(self, num_layers: int, length: int, hidden: int, device: torch.device) -> None:
        self.rows = torch.zeros(2 * num_layers + 1, length, hidden, device=device)
        self.prompt = False
        self._positions: torch.Tensor | None = None

    def read_by_mixer(self, index: int, h: torch.Tensor, batch: Batch) -> None:
        """Mixer number ``index`` reads h, float32 [M, hidden]."""
        if index == 0:  # a forward pass begins
            self._positions = batch.positions if batch.decode or self.prompt else None
        self._keep(2 * index, h)

    def passed_mlp(self, index: int, h: torch.Tensor, out: torch.Tensor) -> None:
        """MLP number ``index`` made ``out`` of h."""
        self._keep(2 * index + 1, h)
        if 2 * index + 3 == len(self.rows):
            self._keep(-1, out)

    def _keep(self, part: int, h: torch.Tensor) -> None:
        if self._positions is not None:
            self.rows[part].index_copy_(0, self._positions.long(), h)


@dataclass(frozen=True, eq=False, kw_only=True)
class RecordedDeltaNet(DeltaNet):
    index: int
    stream: Stream

    def mix(
        self,
        h: torch.Tensor,
        batch: Batch,
        state: RecurrentState,
        activation: torch.dtype,
        row: RoundedRow | None = None,
    ) -> torch.Tensor | RoundedRow | RoundedEights:
        self.stream.read_by_mixer(self.index, h, batch)
        return super().mix(h, batch, state, activation, row)


@dataclass(frozen=True, eq=False, kw_only=True)
class RecordedAttention(Attention):
    index: int
    stream: Stream

    def mix(
        self,
        h: torch.Tensor,
        batch: Batch,
        kv: LayerKV,
        activation: torch.dtype,
        row: RoundedRow | None = None,
        routed: bool = False,
    ) -> torch.Tensor | RoundedRow:
        self.stream.read_by_mixer(self.index, h, batch)
        return super().mix(h, batch, kv, activation, row, routed)


@dataclass(frozen=True, eq=False, kw_only=True)
class RecordedMoE(MoE):
    index: int
    stream: Stream

    def __call__(
        self,
        h: torch.Tensor,
        activation: torch.dtype,
        next_norm: Norm | None = None,
        routed: RoutedRow | None = None,
    ) -> tuple[torch.Tensor, RoundedRow | None]:
        out, row = super().__call__(h, activation, next_norm, routed)
        self.stream.passed_mlp(self.index, h, out)
        return out, row


@dataclass(frozen=True, eq=False, kw_only=True)
class RecordedMLP(GatedMLP):
    index: int
    stream: Stream

    def __call__(self, h: torch.Tensor, activation: torch.dtype) -> torch.Tensor:
        out = super().__call__(h, activation)
        self.stream.passed_mlp(self.index, h, out)
        return out


def parts_of(layer: Any) -> tuple[str, Mixer, MLP]:
    """A decoder layer's mixer, after the name that its family calls it by, and its MLP."""
    name = dataclasses.fields(layer)[0].name
    return name, getattr(layer, name), layer.mlp


def recorded(model: Transformer, stream: Stream) -> Transformer:
    """The same model, whose mixers and MLPs write ``stream``."""
    layers: list[Any] = []
    for index, layer in enumerate(model.layers):
        name, mixer, mlp = parts_of(layer)
        kind: Any = RecordedDeltaNet if isinstance(mixer, DeltaNet) else RecordedAttention
        last: Any = RecordedMoE if isinstance(mlp, MoE) else RecordedMLP
        watched = {name: kind(**vars(mixer), index=index, stream=stream)}
        watched["mlp"] = last(**vars(mlp), index=index, stream=stream)
        plain: Any = layer
        layers.append(dataclasses.replace(plain, **watched))
    changed: Any = {"layers": tuple(layers)}
    return dataclasses.replace(model, **changed)


class RecordedKV(PagedKV):
    """What a recorded model's layers keep. A step writes the stream as well, which its capture must know."""

    stream: Stream

    def written_by_verification(self, num_rows: int) -> list[torch.Tensor]:
        # Verification runs at positions of the first page.
        return [*super().written_by_verification(num_rows), *self.stream.rows[:, : self.page_size]]


def recording_runner(loaded: Loaded, model: Transformer, length: int) -> tuple[Runner, Stream]:
    """A runner of ``model`` as it was loaded, and the stream that its steps write, with room for ``length`` tokens."""
    budget, plain = loaded.budget, loaded.runner
    stream = Stream(len(model.layers), length, model.norm.weight.shape[0], loaded.device)
    kv = RecordedKV(
        model.kv_specs,
        num_slots=budget.num_slots,
        context=budget.context,
        page_size=budget.page_size,
        dtype=plain.kv.dtype,
        device=loaded.device,
        state_dtype=loaded.state_dtype,
    )
    kv.stream = stream
    runner = Runner(
        recorded(model, stream),
        kv,
        num_slots=budget.num_slots,
        device=loaded.device,
        graphs=plain.uses_graphs,
        chunk=plain.chunk,
    )
    return runner, stream


# -- comparison ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """Relative differences of one layer: ``found`` between decode and prefill, ``rounded`` by bfloat16 inputs.

    what: a key of FACTORS. Float64, by position from the end of the prompt on if ``by_position``, else by head or tap.
    """

    what: str
    found: torch.Tensor
    rounded: torch.Tensor
    by_position: bool = True


def distances(x: torch.Tensor, y: torch.Tensor, base: torch.Tensor | float = 0.0) -> torch.Tensor:
    """|x - y| / |y - base| by row, float64."""
    relative: torch.Tensor = (x.double() - y.double()).norm(dim=1) / (y.double() - base).norm(dim=1).clamp_min(1e-300)
    return relative


@dataclass(frozen=True)
class Prefill:
    """A layer's own prefill of rows [n, hidden]. chunk: tokens that run at once."""

    chunk: int
    activation: torch.dtype

    def mixer(self, mixer: Mixer, cache: LayerKV | RecurrentState, rows: torch.Tensor) -> torch.Tensor:
        """As a prompt of slot 1."""
        out = torch.empty_like(rows)
        for start, part in self._parts(rows):
            positions = torch.arange(start, start + len(part), dtype=torch.int32, device=rows.device)
            batch = Batch(torch.zeros_like(positions), positions, torch.ones_like(positions), decode=False)
            if isinstance(mixer, DeltaNet):
                assert isinstance(cache, RecurrentState)
                out[start : start + len(part)] = mixer(part, batch, cache, self.activation)
            else:
                assert isinstance(cache, LayerKV)
                out[start : start + len(part)] = mixer(part, batch, cache, self.activation)
        return out

    def mlp(self, mlp: MLP, rows: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(rows)
        for start, part in self._parts(rows):
            found = mlp(part, self.activation)
            out[start : start + len(part)] = found[0] if isinstance(found, tuple) else found
        return out

    def _parts(self, rows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        return ((start, rows[start : start + self.chunk]) for start in range(0, len(rows), self.chunk))


def kept(cache: LayerKV | RecurrentState, slot: int, length: int) -> list[torch.Tensor]:
    """Copies of what ``slot`` keeps after ``length`` tokens, as the next one reads it.

    State by head and convolution by tap, or K and V by position from the end of the prompt on.
    """
    if isinstance(cache, RecurrentState):
        # A decode step leaves its change beside the state.
        return [settled_ref(cache.state[slot], cache.pending[slot], length).flatten(1), cache.conv[slot].clone()]
    pages = cache.page_table[slot].long()
    found = []
    for values, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        paged = values[pages].float() * (1.0 if scales is None else scales[pages][..., None])
        found.append(paged.transpose(1, 2).flatten(0, 1).flatten(1)[PROMPT_TOKENS:length])
    return found


def compare_mixer(
    prefill: Prefill, mixer: Mixer, cache: LayerKV | RecurrentState, rows: torch.Tensor, out: torch.Tensor
) -> Iterator[Finding]:
    """rows, out: what the mixer read and gave in slot 0."""
    length, later = len(rows), slice(PROMPT_TOKENS, None)
    by_decode = kept(cache, 0, length)
    coarse = rows.bfloat16().float()
    by_rounding = prefill.mixer(mixer, cache, coarse) - coarse + rows
    left_by_rounding = kept(cache, 1, length)
    wanted = prefill.mixer(mixer, cache, rows)
    left = kept(cache, 1, length)
    recurrent = isinstance(mixer, DeltaNet)
    yield Finding(
        "delta mixer" if recurrent else "attention mixer",
        distances(out, wanted, rows)[later],
        distances(by_rounding, wanted, rows)[later],
    )
    names = ("state", "convolution") if recurrent else ("keys, values", "keys, values")
    for name, found, rounded, base in zip(names, by_decode, left_by_rounding, left, strict=True):
        yield Finding(name, distances(found, base), distances(rounded, base), not recurrent)


def compare_mlp(prefill: Prefill, mlp: MLP, rows: torch.Tensor, out: torch.Tensor) -> Finding:
    """rows, out: what the MLP read and gave in slot 0."""
    wanted, coarse, later = prefill.mlp(mlp, rows), rows.bfloat16().float(), slice(PROMPT_TOKENS, None)
    by_rounding = prefill.mlp(mlp, coarse) - coarse + rows
    return Finding(
        "experts" if isinstance(mlp, MoE) else "MLP",
        distances(out, wanted, rows)[later],
        distances(by_rounding, wanted, rows)[later],
    )


def compare(runner: Runner, model: Transformer, rows: torch.Tensor) -> Iterator[Finding]:
    """All parts of ``model``; rows: the stream of slot 0, float32 [parts + 1, n, hidden]."""
    prefill = Prefill(runner.chunk, model.activation)
    for index, (layer, cache) in enumerate(zip(model.layers, runner.kv.layers, strict=True)):
        _, mixer, mlp = parts_of(layer)
        before, between, after = rows[2 * index : 2 * index + 3]
        yield from compare_mixer(prefill, mixer, cache, before, between)
        yield compare_mlp(prefill, mlp, between, after)


# -- verdict -------------------------------------------------------------------------------------------------------


def ordinary(values: torch.Tensor) -> torch.Tensor:
    """Which tokens of a layer of experts are not off by a large part of an expert."""
    return values <= OUTLIER * values.median()


def bucket_means(findings: Sequence[torch.Tensor], ends: Sequence[int]) -> torch.Tensor:
    """Means over tokens by layer and bucket, [layers, buckets]; NaN stands for tokens left out."""
    starts = (0, *ends[:-1])
    return torch.stack([torch.stack([x[a:b].nanmean() for a, b in zip(starts, ends, strict=True)]) for x in findings])


def report(what: str, findings: Sequence[Finding], bound: float, ends: Sequence[int]) -> bool:
    """Print all layers' findings of one kind; whether they are as they should be.

    ends: of the buckets, by token after the prompt.
    """
    found, rounded = [each.found for each in findings], [each.rounded for each in findings]
    finite = all(bool(torch.isfinite(x).all()) for x in (*found, *rounded))
    outliers = [0.0, 0.0]
    if what == "experts":
        for side, values in enumerate((found, rounded)):
            usual = [ordinary(x) for x in values]
            outliers[side] = 1 - float(torch.cat(usual).double().mean())
            values[:] = [x.where(usual_of_x, math.nan) for x, usual_of_x in zip(values, usual, strict=True)]
    used = ends if findings[0].by_position else [len(found[0])]
    by_layer = bucket_means(found, used)
    mean, worst_layer, by_rounding = by_layer.mean(0), by_layer.amax(0), bucket_means(rounded, used).mean(0)
    largest = max(float(x.nan_to_num(0.0).max()) for x in found)
    # Below a tenth of the bound there is nothing that could have grown.
    grown = bool(((mean > 2 * mean[0]) & (mean > bound / 10)).any())
    failures = {
        "not finite": not finite,
        "over the bound": bool((mean > bound).any()),
        "growing with the text": grown,
        "one far off": largest > LARGEST * bound,
        "too many outliers": outliers[0] > MAX_OUTLIERS,
    }
    wrong = [name for name, failed in failures.items() if failed]

    def line(name: str, values: torch.Tensor, rest: str = "") -> None:
        print(f"{name:34s}" + "".join(f"{float(value):11.2e}" for value in values) + rest)

    line(f"{what} × {len(findings)}", mean, f"   allowed {bound:.1e}" + "".join(f", FAILED: {each}" for each in wrong))
    line("  the worst layer's", worst_layer, f"   largest of one {largest:.1e}")
    line("  by bfloat16 inputs", by_rounding)
    if what == "experts":
        print(f"  other experts: {outliers[0]:.4%} of tokens, {outliers[1]:.4%} by bfloat16 inputs; left out above")
    return not wrong


def main() -> int:
    args = arguments(__doc__)
    room = PROMPT_TOKENS + args.steps + 8
    loaded = load(args, room)
    model, device = loaded.model, loaded.device
    assert isinstance(model, Transformer), "all families of models are one of these"
    runner, stream = recording_runner(loaded, model, room)
    del loaded
    stream.prompt = True
    start_answer(runner, PROMPT_TOKENS, args.steps, room)
    stream.prompt = False
    drawn(runner)
    memory = []
    for step in range(1, args.steps):
        if step in (64, args.steps - 1):
            memory.append(allocated_bytes(device))
        runner.launch(1)
        drawn(runner)
    grew = memory[-1] > memory[0]
    length = PROMPT_TOKENS + args.steps - 1
    with runner.on_stream():
        rows = stream.rows[:, :length]
        finite = bool(torch.isfinite(rows).all())
        runner.kv.reserve(1, length)
        findings = list(compare(runner, model, rows))

    ends = [end for end in ENDS if end < length] + [length]
    starts = [PROMPT_TOKENS, *ends[:-1]]
    at_64, at_end = (each / 2**20 for each in (memory[0], memory[-1]))
    print(f"{args.steps} tokens decoded, finite: {finite}; memory {at_64:.1f} MiB, at the end {at_end:.1f} MiB")
    buckets = [f"{a}-{b - 1}" for a, b in zip(starts, ends, strict=True)]
    print(f"{'relative difference at positions':34s}" + "".join(f"{bucket:>11s}" for bucket in buckets))
    good = finite and not grew
    for what, factors in FACTORS.items():
        of_kind = [each for each in findings if each.what == what]
        if of_kind:
            bound = FLOAT32_BOUND if args.dtype == "float32" else 2 * INT8_ERROR * factors**0.5
            good &= report(what, of_kind, bound, [end - PROMPT_TOKENS for end in ends])
    if not good:
        print("FAILED")
        return 1
    print("ok: all finite, no growth of memory or of a difference, every layer as its prefill but for rounding")
    return 0


if __name__ == "__main__":
    sys.exit(main())
