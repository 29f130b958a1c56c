"""Import modules in an order, and print what of this package is there then, as JSON.

Run by its path, not as a module of ``tests``: so the first place that Python looks at is not the clone.
"""

from __future__ import annotations

import importlib
import json
import sys


def main(*modules: str) -> None:
    for name in modules:
        importlib.import_module(name)
    package = sys.modules.get("torchao_int4cpu")
    quantizer = sys.modules.get("transformers.quantizers.quantizer_torchao")
    print(
        json.dumps(
            {
                "hook": "torchao_int4cpu_on_import" in sys.modules,
                "package": hasattr(package, "Int4OpaqueTensor"),
                "patched": quantizer is not None
                and hasattr(
                    quantizer.TorchAoHfQuantizer._process_model_after_weight_loading, "torchao_int4cpu"
                ),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
