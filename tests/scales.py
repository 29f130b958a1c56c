"""The dtype of scales and zeros in this test process.

``INT4CPU_TEST_SCALES=float16`` has every weight of a test process made with float16 scales and zeros:
test_float16_scales runs other tests again that way.
"""

from __future__ import annotations

import os

import torch

from torchao_int4cpu import Int4OpaqueTensor

SCALES_VARIABLE = "INT4CPU_TEST_SCALES"

#: The dtype of scales and zeros of all weights that are not asked for in another.
SCALES: torch.dtype = getattr(torch, os.environ.get(SCALES_VARIABLE, "bfloat16"))

for _name in ("from_groupwise", "empty"):
    vars(Int4OpaqueTensor)[_name].__func__.__kwdefaults__["qparams_dtype"] = SCALES
