"""Loads what `save_model` wrote in every way, under another instruction set."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchao.quantization import quantize_

from tests.numerics import assert_int4, native
from torchao_int4cpu import Int4WeightOnlyConfig


def main() -> None:
    folder, capability, *writers = sys.argv[1:]
    assert native().name == capability

    def fresh() -> nn.Sequential:
        return nn.Sequential(nn.Linear(150, 100), nn.ReLU(), nn.Linear(100, 33, bias=False))

    def fresh_quantized() -> nn.Sequential:
        model = fresh()
        quantize_(model, Int4WeightOnlyConfig(group_size=32))
        return model

    ways = 0
    for writer in writers:
        dense: Any = fresh()
        dense.load_state_dict(torch.load(f"{folder}/{writer}.dense.pt", weights_only=True))
        loaded: dict[str, Any] = {}
        state = torch.load(f"{folder}/{writer}.state.pt", weights_only=True)
        loaded["state dict"] = fresh_quantized()
        loaded["state dict"].load_state_dict(state)
        loaded["state dict, assign"] = fresh()
        loaded["state dict, assign"].load_state_dict(state, assign=True)
        mapped = torch.load(f"{folder}/{writer}.state.pt", weights_only=True, mmap=True)
        loaded["state dict, mmap, from meta"] = fresh_quantized().to("meta")
        loaded["state dict, mmap, from meta"].load_state_dict(mapped, assign=True)
        loaded["state dict, to_empty"] = fresh_quantized().to("meta").to_empty(device="cpu")
        loaded["state dict, to_empty"].load_state_dict(state)
        loaded["module"] = torch.load(f"{folder}/{writer}.module.pt", weights_only=False)
        with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.ReLU]):
            loaded["module, weights only"] = torch.load(
                f"{folder}/{writer}.module.pt", weights_only=True
            )
        loaded["pickle"] = pickle.loads(Path(folder, f"{writer}.pickle").read_bytes())
        loaded["pickle, deep copy"] = copy.deepcopy(loaded["pickle"])
        loaded["tensor"] = fresh()
        loaded["tensor"].load_state_dict(state, assign=True)
        tensor = torch.load(f"{folder}/{writer}.tensor.pt", weights_only=True)
        loaded["tensor"][0].weight = nn.Parameter(tensor, requires_grad=False)
        for way, model in loaded.items():
            for layer, shape in ((model[0], (100, 150)), (model[2], (33, 100))):
                w = assert_int4(layer.weight, shape, 32)
                assert w.qdata_layout == capability, (writer, way)
                assert torch.equal(w.dequantize(), dense[0 if shape[0] == 100 else 2].weight), (
                    writer,
                    way,
                )
            for rows in (1, 2000):
                x = torch.linspace(-1, 1, rows * 150).view(rows, 150)
                with torch.no_grad():
                    y, expected = model(x), dense(x)
                # two layers, each with x and W rounded to bfloat16; a mixed-up layout is 100% off
                error = float((y - expected).norm() / expected.norm())
                assert 0 < error < 2.0**-7, (writer, way, rows, error)
            ways += 1
    print(ways)


if __name__ == "__main__":
    main()
