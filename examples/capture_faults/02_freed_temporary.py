"""Fault 2: a tensor made just before the capture is freed by Python, and its memory is used again.

ostinato check examples/capture_faults/02_freed_temporary.py planted
ostinato check examples/capture_faults/02_freed_temporary.py remedied
"""

import sys

import torch

is_planted = sys.argv[1:] == ["planted"]
norm_weight = torch.ones(8, dtype=torch.float16, device="cuda")
x = torch.zeros(2, 8, device="cuda")
kept = []


def capture():
    """The norm in float32: its weight is converted once, outside of the graph."""
    weight = norm_weight.to(torch.float32)
    if not is_planted:
        kept.append(weight)  # lives as long as the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    return graph, y


graph, y = capture()
for _ in range(3):
    x.copy_(torch.randn(2, 8))
    graph.replay()
