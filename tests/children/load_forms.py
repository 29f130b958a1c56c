"""Runs the programs that `export_forms` wrote."""

from __future__ import annotations

import sys
from typing import Any

import torch

from tests.numerics import native


def main() -> None:
    folder, capability, *writers = sys.argv[1:]
    assert native().name == capability
    torch.set_grad_enabled(False)
    done = 0
    for writer in writers:
        inputs, expected = torch.load(f"{folder}/{writer}.forms.samples")
        whole = torch.export.load(f"{folder}/{writer}.forms.whole.pt2")
        parts = torch.export.load(f"{folder}/{writer}.forms.parts.pt2")
        weight: Any = whole.module().weight
        assert weight.qdata_layout == capability
        for program in (whole, whole.run_decompositions(), parts):
            for number, (y, wanted) in enumerate(zip(program.module()(*inputs), expected)):
                # x rounded to bfloat16 or not, other kernels: a mixed-up layout is 100 % off
                error = float((y - wanted).norm() / wanted.norm())
                assert error < 2.0**-6, (writer, number, error)
                done += 1
    print(done)


if __name__ == "__main__":
    main()
