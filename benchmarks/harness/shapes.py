"""Links and dtypes that several CPU suites measure."""

from __future__ import annotations

import torch

from recmas_kernels import LinkConfig

DTYPES = (torch.float32, torch.bfloat16)

INNER = LinkConfig("inner", 2048, 2048, 2048, "identity")
NARROW = LinkConfig("inner", 2048, 256, 2048, "identity")
OUTER = LinkConfig("outer", 2048, 3072, 1536, "linear")
SMALL_INNER = LinkConfig("inner", 64, 64, 64, "identity")
SMALL_OUTER = LinkConfig("outer", 64, 96, 48, "linear")
