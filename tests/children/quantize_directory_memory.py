"""Quantize a directory and print: bytes the peak rises by, of the largest tensor, of all tensors."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from torchao_int4cpu import Int4WeightOnlyConfig
from torchao_int4cpu.convert import directory as quantize_directory
from torchao_int4cpu.convert import shards
from torchao_int4cpu.convert.plan import make_plan


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(source: str, out: str) -> None:
    shards.SHARD_BYTES = 1
    plan = make_plan(Path(source), Int4WeightOnlyConfig())
    before = peak()
    quantize_directory.quantize_directory(plan, Path(out), lambda name, done: None)
    sizes = [tensor.source.nbytes for tensor in plan.tensors]
    print(peak() - before, max(sizes), sum(sizes))


if __name__ == "__main__":
    main(*sys.argv[1:])
