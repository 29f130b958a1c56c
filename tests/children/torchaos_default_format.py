"""Quantizes as torchao does by default, without this package, and prints what that raises."""

from __future__ import annotations

import sys

import torch
import torchao.quantization as ao


def main() -> None:
    layer = torch.nn.Linear(128, 64).bfloat16()
    try:
        ao.quantize_(layer, ao.Int4WeightOnlyConfig(group_size=128))
    except Exception as error:
        print(type(error).__name__, str(error))
    assert "torchao_int4cpu" not in sys.modules


if __name__ == "__main__":
    main()
