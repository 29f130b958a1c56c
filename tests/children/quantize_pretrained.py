"""Quantize the model of a folder while transformers loads it, and save it to another."""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, TorchAoConfig

from torchao_int4cpu import Int4WeightOnlyConfig


def main(source: str, out: str) -> None:
    config = TorchAoConfig(Int4WeightOnlyConfig(group_size=32))
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
