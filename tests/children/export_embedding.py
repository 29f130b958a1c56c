"""Exports a 4-bit embedding and a tied model, and saves what they give."""

from __future__ import annotations

import sys

import torch

from tests.embedding_models import indices, tied


def main() -> None:
    folder, capability = sys.argv[1:]
    torch.manual_seed(0)
    model, idx = tied(), indices(2, 3)
    shapes = ({0: torch.export.Dim("batch", max=50)},)
    program = torch.export.export(model.embed, (idx,), dynamic_shapes=shapes)
    ops = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert ops == ["aten.embedding.default"], ops
    torch.export.save(program, f"{folder}/{capability}.whole.pt2")
    torch.export.save(program.run_decompositions(), f"{folder}/{capability}.parts.pt2")
    program = torch.export.export(model, (idx,))
    torch.export.save(program, f"{folder}/{capability}.model.pt2")
    with torch.no_grad():
        torch.save((idx, model.embed(idx), model(idx)), f"{folder}/{capability}.rows.pt")


if __name__ == "__main__":
    main()
