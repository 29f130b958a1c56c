"""A patch of vLLM: it has weights allocated by quantizing memory that it has not written yet.

vLLM 0.32: ``TorchAOLinearMethod.create_weights`` gives ``torch.empty`` to `quantize_`, to copy the
weights of a 4-bit checkpoint into what comes back. With real numbers `quantize_` is called by
``process_weights_after_loading``, where a NaN is an error as everywhere else.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from torchao_int4cpu.integrations.torchao_int4cpu_on_import import when_imported
from torchao_int4cpu.quantize.run import uninitialized_weights

MODULE = "vllm.model_executor.layers.quantization.torchao"


def _patch(module: ModuleType) -> None:
    method = getattr(module, "TorchAOLinearMethod", None)
    if method is None or hasattr(method.create_weights, "torchao_int4cpu"):
        return  # another vLLM: uninitialized memory is then refused for its NaNs
    original = method.create_weights

    @functools.wraps(original)
    def create_weights(*args: Any, **kwargs: Any) -> Any:
        with uninitialized_weights():
            return original(*args, **kwargs)

    create_weights.torchao_int4cpu = True  # type: ignore[attr-defined]
    method.create_weights = create_weights


when_imported(MODULE, _patch)
