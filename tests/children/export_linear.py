"""Exports a 4-bit model in each of the ways there are, and saves what it gives."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torchao.quantization import quantize_

from tests.numerics import assert_int4, native, product_bound
from torchao_int4cpu import Int4WeightOnlyConfig, set_kernel
from torchao_int4cpu.format.packed import int4_mm_reference


def main() -> None:
    folder, capability = sys.argv[1:]
    assert native().name == capability
    torch.manual_seed(0)
    linear = nn.Linear(150, 100, bias=False)
    quantize_(linear, Int4WeightOnlyConfig(group_size=32))
    packed = assert_int4(linear.weight, (100, 150), 32).packed()
    samples = []
    for m in (1, 2, 300):
        x = torch.randn(m, 150)
        samples.append((x, int4_mm_reference(x, packed), product_bound(x, packed, x.dtype)))
    torch.save(samples, f"{folder}/{capability}.samples.pt")
    shapes = ({0: torch.export.Dim("m", min=1, max=4096)},)
    program = torch.export.export(linear, (torch.randn(5, 150),), dynamic_shapes=shapes)
    torch.export.save(program, f"{folder}/{capability}.whole.pt2")
    torch.export.save(program.run_decompositions(), f"{folder}/{capability}.parts.pt2")
    set_kernel("aten")
    program = torch.export.export(linear, (torch.randn(1, 150),)).run_decompositions()
    torch.export.save(program, f"{folder}/{capability}.aten.pt2")


if __name__ == "__main__":
    main()
