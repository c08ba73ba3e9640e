"""Without a GPU kernels run in Triton's interpreter, and Ctrl-C is what it is on a terminal.

Triton reads the switch when it is imported, which many libraries do on the side, so it is set before any test file. A
shell starts what it runs in the background with Ctrl-C ignored, which every child would inherit.
"""

import os
import signal

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)
