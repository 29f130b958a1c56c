"""Exports views and products of 4-bit weights."""

from __future__ import annotations

import sys

import torch

from tests.numerics import native
from tests.test_export import Forms


def main() -> None:
    folder, capability = sys.argv[1:]
    assert native().name == capability
    torch.manual_seed(0)
    model, inputs = Forms(), (torch.randn(4, 128), torch.tensor([[0, 5], [100, 7]]))
    with torch.no_grad():
        torch.save((inputs, model(*inputs)), f"{folder}/{capability}.forms.samples")
    program = torch.export.export(model, inputs)
    torch.export.save(program, f"{folder}/{capability}.forms.whole.pt2")
    torch.export.save(program.run_decompositions(), f"{folder}/{capability}.forms.parts.pt2")


if __name__ == "__main__":
    main()
