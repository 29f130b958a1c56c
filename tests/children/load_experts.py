"""Loads saved models with experts in a fresh process, and saves their logits."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM

import torchao_int4cpu
from tests.numerics import native
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor


def main() -> None:
    stacks = (torchao_int4cpu.Int4OpaqueTensor, Int4TransposedTensor)
    for folder in sys.argv[1:]:
        model = AutoModelForCausalLM.from_pretrained(folder)
        found = [p for p in model.parameters() if isinstance(p, stacks)]
        opaque = [p.untransposed() if isinstance(p, Int4TransposedTensor) else p for p in found]
        assert {p.qdata_layout for p in opaque} == {native().name}
        results = {}
        for implementation in ("eager", "batched_mm", "grouped_mm"):
            model.set_experts_implementation(implementation)
            with torch.no_grad():
                results[implementation] = model(torch.arange(24).view(2, 12)).logits
        torch.save((results, len(found)), folder + ".logits.pt")


if __name__ == "__main__":
    main()
