"""Calibrate a directory and print: bytes the peak rises by, of the largest block, of all tensors."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from pathlib import Path

import torch

from torchao_int4cpu import Int4WeightOnlyConfig
from torchao_int4cpu.convert.calibrated import calibrate_directory
from torchao_int4cpu.convert.plan import make_plan
from torchao_int4cpu.convert.text import batches_of


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(source: str, out: str) -> None:
    plan = make_plan(Path(source), Int4WeightOnlyConfig())
    batches = batches_of([torch.arange(2 * 64).view(2, 64) % 100], plan.model_config)
    before = peak()
    calibrate_directory(plan, list(batches), Path(out), lambda name, done, total: None)
    blocks: Counter[str] = Counter()
    for tensor in plan.tensors:
        blocks[".".join(tensor.name.split(".")[:3])] += tensor.source.nbytes
    print(peak() - before, max(blocks.values()), sum(blocks.values()))


if __name__ == "__main__":
    main(*sys.argv[1:])
