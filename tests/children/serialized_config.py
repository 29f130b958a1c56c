"""Serializes and reads back a config, under whatever PYTHONHASHSEED it runs."""

from __future__ import annotations

import json

import torch
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import quantize_

import torchao_int4cpu


def main() -> None:
    config = torchao_int4cpu.Int4WeightOnlyConfig(group_size=32, int4_choose_qparams_algorithm="mse")
    back = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    layer = torch.nn.Linear(70, 40)
    quantize_(layer, back)
    print(type(back).__module__, back.int4_packing_format, type(layer.weight).__name__)


if __name__ == "__main__":
    main()
