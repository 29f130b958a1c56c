"""Print how many KiB 60 threads leave behind that each multiplied 512 rows, 1.5 MiB of them packed."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from tests.numerics import native, packed_in, random_groupwise
from torchao_int4cpu.kernels.selection import int4_mm


def resident_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def main() -> None:
    torch.set_num_threads(1)
    weight = packed_in(random_groupwise(64, 1536, 128), native())
    x = torch.randn(512, 1536, dtype=torch.bfloat16)

    def several(count: int) -> None:
        for _ in range(count):
            thread = threading.Thread(target=int4_mm, args=(x, weight))
            thread.start()
            thread.join()

    several(3)
    before = resident_kib()
    several(60)
    print(resident_kib() - before)


if __name__ == "__main__":
    main()
