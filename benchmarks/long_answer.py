"""4,096 decoded tokens: no NaN, no growth of memory, and the logits of a fresh prefill of the same text.

    python benchmarks/long_answer.py [--model MODEL | --random NAME] [--steps 4096]

Decode multiplies by int8 activations and prefill by bfloat16 ones, so their logits differ by rounding from the first
token on; what must not happen is that the difference grows with the text. Where a rounding decides which expert is
taken, a small difference becomes a large one. How large is shown by a second prefill, in which every weight of a norm
is moved at random by up to half a step of bfloat16: what enters each product then differs by no more than its rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator

import torch

from ostinato.engine.loading import EngineConfig, load_engine
from ostinato.engine.runner import Runner
from ostinato.kv.recurrent import RecurrentState
from ostinato.layers.batch import Batch
from ostinato.layers.linear import Norm
from ostinato.load.random import RandomCheckpoint
from ostinato.load.resolve import resolve
from ostinato.sampling import SamplingParams

PROMPT_TOKENS = 64


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


def moved_logits(runner: Runner, slot: int, text: list[int], room: int) -> torch.Tensor:
    """``prefilled_logits`` with every norm's weights moved by up to half a step of bfloat16."""
    kept = [(norm, norm.weight.clone()) for norm in norms(runner.model)]
    with runner.on_stream():
        for norm, weight in kept:
            norm.weight.mul_(1 + 2**-9 * (2 * torch.rand_like(weight) - 1))
    found = prefilled_logits(runner, slot, text, room)
    with runner.on_stream():
        for norm, weight in kept:
            norm.weight.copy_(weight)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--random")
    parser.add_argument("--steps", type=int, default=4096)
    args = parser.parse_args()
    opened = RandomCheckpoint(args.random) if args.random else resolve(args.model).open()
    room = PROMPT_TOKENS + args.steps + 8
    loaded = load_engine(opened, EngineConfig(device="cuda", context=room, num_slots=2))
    runner = loaded.runner
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(loaded.model.vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
    params = SamplingParams(temperature=0.8, seed=7, max_tokens=args.steps, ignore_eos=True)
    runner.admit(0, params, text, (), room)
    runner.prefill(0, text, 0, draw=True, remaining=args.steps)

    def draw() -> None:
        token = runner.wait(0).token
        assert token is not None
        text.append(token)

    draw()
    held = first = 0.0
    failed = False
    checks = {1, 16, 64, 256, 1024, args.steps - 1}
    for step in range(1, args.steps):
        if step in checks:
            memory = torch.cuda.memory_allocated()
            ours, fresh = next_logits(runner, 0).double(), prefilled_logits(runner, 1, text, room).double()
            moved = moved_logits(runner, 1, text, room).double()
            finite = bool(torch.isfinite(ours).all() and torch.isfinite(fresh).all())
            relative, by_rounding = (float((x - fresh).norm() / fresh.norm()) for x in (ours, moved))
            p, q = fresh.log_softmax(0), ours.log_softmax(0)
            kl = float((p.exp() * (p - q)).sum())
            print(
                f"after {len(text):5d} tokens: finite {finite}, difference of logits {relative:.4f} of their norm"
                f" ({by_rounding:.4f} by rounding alone), KL {kl:.5f}, {memory / 2**20:.1f} MiB"
            )
            del ours, fresh, moved, p, q
            failed |= not finite
            if step == 64:
                held, first = memory, relative
            failed |= step > 64 and (memory > held or relative > 2 * first)
        runner.launch(1)
        draw()
    print("FAILED" if failed else "ok: all finite, no growth of memory or of the difference")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
