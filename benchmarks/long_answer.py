"""4,096 decoded tokens: no NaN, no growth of memory, and the logits of a fresh prefill of the same text.

    python benchmarks/long_answer.py [--model MODEL | --random NAME [--layers N]] [--dtype float32] [--steps 4096]

Decode multiplies by int8 activations and prefill by bfloat16 ones, so their logits differ by rounding from the first
token on; what must not happen is that the difference grows with the text. Where a rounding decides which expert is
taken, a small difference becomes a large one. How large is shown by a second prefill, in which every weight of a norm
is moved at random by up to half a step of bfloat16: what enters each product then differs by no more than its rounding.
``long_answer_layers.py`` compares each layer by itself, where nothing is amplified.

With ``--dtype float32`` both paths compute in float32 on the dequantized weights. Its roundings are 2**-16 of those of
bfloat16, and a network that makes 0.3 of the latter makes some 1e-5 of them, so the logits must agree to a thousandth
of their norm. The second prefill then moves the norms by up to a step of float32. --layers: the first N layers of a
preset, where float32 weights of all do not fit the GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator

import torch

from ostinato.engine.loading import EngineConfig, Loaded, load_engine
from ostinato.engine.runner import Runner
from ostinato.kv.recurrent import RecurrentState
from ostinato.layers.batch import Batch
from ostinato.layers.linear import Norm
from ostinato.load.random import RandomCheckpoint
from ostinato.load.resolve import resolve
from ostinato.sampling import SamplingParams

PROMPT_TOKENS = 64
MAX_DIFFERENCE_FLOAT32 = 1e-3  # of the norm of the logits


def arguments(doc: str | None) -> argparse.Namespace:
    """The options of both scripts of long answers."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model")
    source.add_argument("--random")
    parser.add_argument("--layers", type=int, help="with --random: the model's first layers alone")
    parser.add_argument("--steps", type=int, default=4096, help="tokens to decode")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="auto", help="float32: weights dequantized exactly, all else in float32")
    args = parser.parse_args()
    if args.model and args.layers is not None:
        parser.error("--layers cuts a random model short, not a trained one; use it with --random")
    if args.steps < 2:
        parser.error(f"--steps {args.steps} decodes nothing after the prompt's token; use at least 2")
    return args


def load(args: argparse.Namespace, context: int) -> Loaded:
    """The model of ``args`` with two slots: one that answers, one for what it is compared with."""
    opened = RandomCheckpoint(args.random, num_layers=args.layers) if args.random else resolve(args.model).open()
    return load_engine(opened, EngineConfig(device=args.device, dtype=args.dtype, context=context, num_slots=2))


def start_answer(runner: Runner, prompt_tokens: int, steps: int, room: int) -> list[int]:
    """Prefill a random prompt into slot 0, whose answer of ``steps`` tokens then begins; the prompt's tokens."""
    generator = torch.Generator().manual_seed(0)
    text: list[int] = torch.randint(runner.model.vocab_size, (prompt_tokens,), generator=generator).tolist()
    params = SamplingParams(temperature=0.8, seed=7, max_tokens=steps, ignore_eos=True)
    runner.admit(0, params, text, (), room)
    runner.prefill(0, text, 0, draw=True, remaining=steps)
    return text


def drawn(runner: Runner) -> int:
    """The next token of slot 0."""
    token = runner.wait(0).token
    assert token is not None
    return token


def allocated_bytes(device: torch.device) -> int:
    """Bytes of tensors on a GPU; 0 on the CPU, where nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def next_logits(runner: Runner, slot: int) -> torch.Tensor:
    """Logits of the step that ``slot`` would run next, float32 [vocab], by the decode path; nothing is drawn."""
    b = runner.buffers
    rows = slice(slot, slot + 1)
    with runner.on_stream():
        states = [t[slot] for c in runner.kv.layers if isinstance(c, RecurrentState) for t in c.tensors()]
        kept = [state.clone() for state in states]
        batch = Batch(b.tokens[rows], b.positions[rows], b.slots[rows], True, torch.ones_like(b.active[rows]))
        logits = runner.model.forward(batch, runner.kv.layers)[0]
        for state, value in zip(states, kept, strict=True):
            state.copy_(value)
        return logits


def prefilled_logits(runner: Runner, slot: int, text: list[int], room: int) -> torch.Tensor:
    """Logits after ``text`` by a fresh prefill into ``slot``."""
    runner.release(slot)
    runner.admit(slot, SamplingParams(temperature=0.0), text, (), room)
    for start in range(0, len(text) - 1, runner.chunk):
        stop = min(start + runner.chunk, len(text) - 1)
        runner.prefill(slot, text[start:stop], start, draw=False, remaining=0)
    return runner.logits(slot, text[-1:], len(text) - 1)[0]


def norms(part: object) -> Iterator[Norm]:
    """All norms of a model or of a part of it."""
    if isinstance(part, Norm):
        yield part
    elif isinstance(part, tuple):
        for each in part:
            yield from norms(each)
    elif dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            yield from norms(getattr(part, field.name))


def moved_logits(runner: Runner, slot: int, text: list[int], room: int, step: float) -> torch.Tensor:
    """``prefilled_logits`` with every norm's weights moved by up to ``step`` of themselves."""
    kept = [(norm, norm.weight.clone()) for norm in norms(runner.model)]
    with runner.on_stream():
        for norm, weight in kept:
            norm.weight.mul_(1 + step * (2 * torch.rand_like(weight) - 1))
    found = prefilled_logits(runner, slot, text, room)
    with runner.on_stream():
        for norm, weight in kept:
            norm.weight.copy_(weight)
    return found


def main() -> int:
    args = arguments(__doc__)
    room = PROMPT_TOKENS + args.steps + 8
    loaded = load(args, room)
    runner, exact = loaded.runner, args.dtype == "float32"
    rounding = 2**-23 if exact else 2**-9
    text = start_answer(runner, PROMPT_TOKENS, args.steps, room)
    text.append(drawn(runner))
    held = first = 0.0
    failed = False
    checks = {1, 16, 64, 256, 1024, args.steps - 1}
    for step in range(1, args.steps):
        if step in checks:
            memory = allocated_bytes(loaded.device)
            ours, fresh = next_logits(runner, 0).double(), prefilled_logits(runner, 1, text, room).double()
            moved = moved_logits(runner, 1, text, room, rounding).double()
            finite = bool(torch.isfinite(ours).all() and torch.isfinite(fresh).all())
            relative, by_rounding = (float((x - fresh).norm() / fresh.norm()) for x in (ours, moved))
            p, q = fresh.log_softmax(0), ours.log_softmax(0)
            kl = float((p.exp() * (p - q)).sum())
            print(
                f"after {len(text):5d} tokens: finite {finite}, difference of logits {relative:.3g} of their norm"
                f" ({by_rounding:.3g} by rounding alone), KL {kl:.3g}, {memory / 2**20:.1f} MiB",
                flush=True,
            )
            del ours, fresh, moved, p, q
            failed |= not finite
            if step == 64:
                held, first = memory, relative
            failed |= step > 64 and memory > held
            failed |= relative > MAX_DIFFERENCE_FLOAT32 if exact else step > 64 and relative > 2 * first
        runner.launch(1)
        text.append(drawn(runner))
    what = f"no difference over {MAX_DIFFERENCE_FLOAT32:g}" if exact else "no growth of the difference"
    print("FAILED" if failed else f"ok: all finite, no growth of memory, {what}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
