"""Runs a package of AOTInductor where this package cannot be imported."""

from __future__ import annotations

import sys

import torch


def main() -> None:
    package, samples, *packages = sys.argv[1:]
    for name in packages:
        __import__(name)
    try:
        program = torch._inductor.aoti_load_package(package)
        for xs, expected, bounds in torch.load(samples):
            ys = program(xs)
            assert len(ys) == len(expected)
            for y, wanted, bound in zip(ys, expected, bounds):
                assert (y.dtype, y.shape) == (wanted.dtype, wanted.shape)
                assert bool(((y - wanted).abs() <= bound).all()), (y - wanted).abs().max()
            print("right", end=" ")
    except RuntimeError as error:
        print(error)
    assert packages or not {"torchao", "torchao_int4cpu"} & set(sys.modules)


if __name__ == "__main__":
    main()
