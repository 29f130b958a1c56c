"""Runs the programs that `export_linear` wrote, under another instruction set."""

from __future__ import annotations

import sys
from typing import Any

import torch

from tests.numerics import native


def load(folder: str, writer: str, name: str) -> Any:
    program: Any = torch.export.load(f"{folder}/{writer}.{name}.pt2").module()
    return program


def check(program: Any, samples: list[Any]) -> int:
    """The number of samples, if all are within their bounds."""
    for x, exact, bound in samples:
        assert bool(((program(x).double() - exact).abs() <= bound).all()), x.shape
    return len(samples)


def main() -> None:
    folder, capability, *writers = sys.argv[1:]
    assert native().name == capability
    torch.set_grad_enabled(False)
    done = 0
    for writer in writers:
        samples = torch.load(f"{folder}/{writer}.samples.pt")
        whole = load(folder, writer, "whole")
        assert whole.weight.qdata_layout == capability  # repacked, so it is fast
        done += check(whole, samples)
        done += check(load(folder, writer, "parts"), samples)
        program: Any = torch.export.load(f"{folder}/{writer}.whole.pt2").run_decompositions()
        done += check(program.module(), samples)
        aten = load(folder, writer, "aten")
        if writer == capability:
            done += check(aten, samples[:1])
            continue
        try:
            aten(samples[0][0])
        except RuntimeError as error:
            done += f"packed for '{writer}'" in str(error) and "export it again" in str(error)
    print(done)


if __name__ == "__main__":
    main()
