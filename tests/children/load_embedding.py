"""Runs the programs that `export_embedding` wrote under each instruction set."""

from __future__ import annotations

import sys

import torch


def main() -> None:
    folder, *writers = sys.argv[1:]
    for writer in writers:
        idx, rows, logits = torch.load(f"{folder}/{writer}.rows.pt")
        for stage in ("whole", "parts"):
            program = torch.export.load(f"{folder}/{writer}.{stage}.pt2").module()
            assert torch.equal(program(idx), rows), (writer, stage)
            assert torch.equal(program(idx.repeat(20, 1)), rows.repeat(20, 1, 1)), (writer, stage)
        y = torch.export.load(f"{folder}/{writer}.model.pt2").module()(idx)
        # where the dense product rounds the weight and the activation to bfloat16, twice in a row
        assert float((y - logits).norm() / logits.norm()) < 2.0**-7, writer


if __name__ == "__main__":
    main()
