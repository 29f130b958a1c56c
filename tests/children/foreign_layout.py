"""Compiles a product with a weight in the layout of another instruction set."""

from __future__ import annotations

import sys
import warnings

import torch
from torch import nn

from tests.numerics import native, packed_in, random_groupwise
from torchao_int4cpu import Int4OpaqueTensor
from torchao_int4cpu.format.layout import LAYOUTS


def main() -> None:
    layout = sys.argv[1]
    value = random_groupwise(128, 128, 32)
    qdata = packed_in(value, LAYOUTS[layout]).qdata
    scale_and_zero = Int4OpaqueTensor.from_groupwise(value).scale_and_zero
    w = Int4OpaqueTensor(qdata, scale_and_zero, [1, 32], (128, 128), layout, torch.bfloat16)
    linear = nn.Linear(128, 128, bias=False)
    linear.weight = nn.Parameter(w, requires_grad=False)
    x = torch.linspace(-1, 1, 128).view(1, 128).bfloat16()
    expected = x.float() @ value.dequantize().t()
    warnings.simplefilter("ignore")
    with torch.no_grad():
        for model in (linear, torch.compile(linear, fullgraph=True)):
            error = float((model(x).float() - expected).norm() / expected.norm())
            assert 0 < error < 2.0**-6, error
    print(native().name)


if __name__ == "__main__":
    main()
