"""Saves a 4-bit model in every way, under one instruction set."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch
from torch import nn
from torchao.quantization import quantize_

from tests.numerics import assert_int4, native
from torchao_int4cpu import Int4WeightOnlyConfig


def main() -> None:
    folder, capability = sys.argv[1:]
    assert native().name == capability
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(150, 100), nn.ReLU(), nn.Linear(100, 33, bias=False))
    quantize_(model, Int4WeightOnlyConfig(group_size=32))
    assert_int4(model[0].weight, (100, 150), 32)
    torch.save(model[0].weight, f"{folder}/{capability}.tensor.pt")
    torch.save(model.state_dict(), f"{folder}/{capability}.state.pt")
    torch.save(model, f"{folder}/{capability}.module.pt")
    Path(folder, f"{capability}.pickle").write_bytes(pickle.dumps(model))
    dense = nn.Sequential(nn.Linear(150, 100), nn.ReLU(), nn.Linear(100, 33, bias=False))
    state = model.state_dict()
    dense.load_state_dict({name: v.dequantize() if v.ndim == 2 else v for name, v in state.items()})
    torch.save(dense.state_dict(), f"{folder}/{capability}.dense.pt")


if __name__ == "__main__":
    main()
