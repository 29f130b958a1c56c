"""Print how many pages are mapped anew by products of many rows between other work of a model."""

from __future__ import annotations

import resource

import torch
import torch.nn.functional as F

from tests.numerics import native, packed_in, random_groupwise
from torchao_int4cpu.kernels.selection import int4_mm

ROWS, WIDE, NARROW, TIMES = 512, 1536, 384, 20


def main() -> None:
    torch.set_num_threads(2)
    up = packed_in(random_groupwise(WIDE, NARROW, 128), native())
    down = packed_in(random_groupwise(NARROW, WIDE, 128), native())
    x = torch.randn(ROWS, NARROW, dtype=torch.bfloat16)

    def layers() -> None:
        y = x
        for _ in range(6):
            y = F.layer_norm(y + int4_mm(F.gelu(int4_mm(y, up)), down), (NARROW,))

    for _ in range(5):
        layers()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(TIMES):
        layers()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // TIMES)


if __name__ == "__main__":
    main()
