"""Give torchao's own loader the file of a saved model, without an import of this package."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors import safe_open
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict


def main(folder: str) -> None:
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.offset_keys()}
        unflatten_tensor_state_dict(tensors, file.metadata())


if __name__ == "__main__":
    main(*sys.argv[1:])
