"""Quantizes a large weight, and prints how much memory that took, in sizes of the weight."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from torchao_int4cpu import Int4OpaqueTensor


def peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def main() -> None:
    algorithm = sys.argv[1]
    w = torch.randn(16384, 4096).bfloat16()
    Int4OpaqueTensor.from_hp(w[:512], [1, 128], algorithm)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kib()
    Int4OpaqueTensor.from_hp(w, [1, 128], algorithm)
    print((peak_kib() - before) * 1024 / w.nbytes)


if __name__ == "__main__":
    main()
