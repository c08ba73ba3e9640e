"""Fault 1: the graph is captured on a device that is not the current one, and replays zeros.

ostinato check examples/capture_faults/01_wrong_device.py planted
ostinato check examples/capture_faults/01_wrong_device.py remedied
"""

import contextlib
import sys

import torch

is_planted = sys.argv[1:] == ["planted"]
device = torch.device("cuda", 1)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 8)).to(device)
x = torch.zeros(2, 8, device=device)
graph = torch.cuda.CUDAGraph()

# The capture records a stream of the current device. Without this, that is device 0, and device 1 runs beside it.
on_its_device = contextlib.nullcontext() if is_planted else torch.cuda.device(x.device)
with torch.no_grad(), on_its_device, torch.cuda.graph(graph):
    y = model(x)

for _ in range(3):
    x.copy_(torch.randn(2, 8))
    graph.replay()
