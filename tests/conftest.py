"""Without a GPU kernels run in Triton's interpreter.

Triton reads the switch when it is imported, which many libraries do on the side, so it is set before any test file.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
