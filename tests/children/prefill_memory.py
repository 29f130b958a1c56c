"""Print how many KiB a large product, or the gradient of one, takes beyond its result."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.numerics import native, packed_in, random_groupwise
from torchao_int4cpu.kernels.portable import prefill as prefill_module
from torchao_int4cpu.kernels.portable.prefill import prefill, prefill_transposed

M, N, K = 6000, 8192, 4096


def peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def main(kernel: str, dtype: str) -> None:
    weight = packed_in(random_groupwise(N, K, 128), native())
    product, width, columns = {
        "prefill": (prefill, K, N),
        "prefill_transposed": (prefill_transposed, N, K),
    }[kernel]
    x = torch.randn(M, width).to(getattr(torch, dtype))
    product(x[:256], weight)  # oneDNN keeps what it needs once
    prefill_module._scratch = prefill_module._Scratch()  # and we our scratch memory, which is to count
    out = M * columns * x.element_size() // 1024
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kib()
    product(x, weight)
    print(peak_kib() - before - out)


if __name__ == "__main__":
    main(*sys.argv[1:])
