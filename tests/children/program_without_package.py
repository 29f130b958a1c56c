"""Runs exported programs where this package cannot be imported."""

from __future__ import annotations

import sys


def main() -> None:
    sys.stderr = sys.stdout  # torch logs there what it could not load
    for name in ("torchao_int4cpu", "torchao"):  # as if they were not installed
        sys.modules[name] = None  # type: ignore[assignment]
    import torch

    samples, aten, other = sys.argv[1:]
    x, exact, bound = torch.load(samples)[0]
    with torch.no_grad():
        y = torch.export.load(aten).module()(x)
    assert bool(((y.double() - exact).abs() <= bound).all())
    try:
        torch.export.load(other)
    except Exception as error:
        print(error)


if __name__ == "__main__":
    main()
