"""Use 4-bit weights by transformers, in a process that never says ``torchao_int4cpu``.

``load FOLDER`` loads a 4-bit directory; ``quantize FOLDER`` a dense one, with torchao's own config. The
logits and the number of 4-bit weights are saved beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(what: str, folder: str) -> None:
    from transformers import AutoModelForCausalLM

    options = {}
    if what == "quantize":
        from torchao.quantization import Int4WeightOnlyConfig
        from transformers import TorchAoConfig

        config = Int4WeightOnlyConfig(
            group_size=32, int4_packing_format="opaque", set_inductor_config=False
        )
        options["quantization_config"] = TorchAoConfig(config)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)

    import torch

    with torch.no_grad():
        logits = model(torch.arange(24).view(2, 12)).logits
    names = [n for n, p in model.named_parameters() if type(p).__name__ == "Int4OpaqueTensor"]
    torch.save((logits, len(names)), Path(f"{folder}.{what}.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
