"""Load the models of folders and save the logits and the number of 4-bit weights beside each."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM

import torchao_int4cpu


def main(*folders: str) -> None:
    layout = torchao_int4cpu.native_layout()
    assert layout is not None
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder)
        weights = [p for p in model.parameters() if isinstance(p, torchao_int4cpu.Int4OpaqueTensor)]
        assert {p.qdata_layout for p in weights} == {layout.name}
        with torch.no_grad():
            logits = model(torch.arange(24).view(2, 12)).logits
        torch.save((logits, len(weights)), folder + ".logits.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
