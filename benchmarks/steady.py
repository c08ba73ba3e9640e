"""512 steps of decode on a GPU: one graph launch per token, no synchronizing call, flat memory, the tokens of eager.

    python benchmarks/steady.py [--model MODEL | --random NAME] [--steps 512] [--context 2048]

Prints one line per claim and exits with 1 if one does not hold.
"""

from __future__ import annotations

import argparse
import sys

import torch

from ostinato.engine.loading import EngineConfig, Loaded, load_engine
from ostinato.engine.measure import eager_twin
from ostinato.engine.request import Request
from ostinato.engine.runner import Runner
from ostinato.engine.scheduler import Scheduler
from ostinato.load.random import RandomCheckpoint
from ostinato.load.resolve import resolve
from ostinato.sampling import SamplingParams

PROMPT_TOKENS = 64


def tokens_of(runner: Runner, context: int, steps: int, temperature: float) -> list[int]:
    """The answer to a fixed prompt, all ``steps`` tokens of it."""
    scheduler = Scheduler(runner, context)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(runner.model.vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
    params = SamplingParams(temperature=temperature, max_tokens=steps, seed=7, ignore_eos=True)
    sequence = scheduler.add(Request(tuple(prompt), params, frozenset()))
    while scheduler.has_work:
        scheduler.step()
    return sequence.tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--random")
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--context", type=int, default=2048)
    args = parser.parse_args()
    opened = RandomCheckpoint(args.random) if args.random else resolve(args.model).open()
    loaded: Loaded = load_engine(opened, EngineConfig(device="cuda", context=args.context))
    runner, device = loaded.runner, loaded.device
    runner.capture_all()
    tokens_of(runner, args.context, 8, 0.8)  # every kernel is compiled and every pool filled
    torch.cuda.synchronize()

    held, replays = torch.cuda.memory_reserved(device), runner.num_replays
    torch.cuda.set_sync_debug_mode("error")
    graph = tokens_of(runner, args.context, args.steps, 0.8)
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    grown, launches = torch.cuda.memory_reserved(device) - held, runner.num_replays - replays

    eager = tokens_of(eager_twin(loaded), args.context, args.steps, 0.8)
    equal = sum(a == b for a, b in zip(graph, eager, strict=True))
    claims = {
        f"{launches} graph launches for {len(graph)} tokens (the first one comes from the prompt)": launches
        == len(graph) - 1,
        f"no synchronizing call in {len(graph)} steps": True,  # one would have raised
        f"memory grew by {grown} bytes": grown == 0,
        f"{equal} of {len(graph)} sampled tokens equal eager's": equal == len(graph),
    }
    for claim, holds in claims.items():
        print(f"{'ok  ' if holds else 'FAIL'} {claim}")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
