"""Count the pools and threads that a product makes, and multiply again in a forked child."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from tests.numerics import native, packed_in, random_groupwise
from torchao_int4cpu.kernels import selection as choice
from torchao_int4cpu.kernels.native.library import Unavailable
from torchao_int4cpu.kernels.selection import int4_mm


def main() -> None:
    library = choice.LIBRARY
    assert not isinstance(library, Unavailable)
    weight = packed_in(random_groupwise(2000, 2000, 32), native())
    x = torch.randn(7, 2000)
    torch.set_num_threads(4)
    torch.sin(torch.randn(10**6))  # torch makes its pool
    before = len(os.listdir("/proc/self/task"))
    expected = int4_mm(x, weight)
    more = len(os.listdir("/proc/self/task")) - before
    mapped = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    pools = {path for path in mapped if "omp" in Path(path).name}
    child = os.fork()
    if child == 0:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            same = all(torch.equal(int4_mm(x, weight), expected) for _ in range(3))
        said = [str(w.message) for w in caught if "os.fork" in str(w.message)]
        os._exit(0 if same and len(said) == 1 and library.threads() == 1 else 3)
    _, status = os.waitpid(child, 0)
    assert torch.equal(int4_mm(x, weight), expected)  # the parent has its threads still
    print(len(pools), more, before, os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
