"""Nothing in this folder is collected where there is no CUDA device."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["*"]
