"""What vLLM lacks for 4-bit weights, as patches of its torchao support (vLLM 0.32).

- ``TorchAOLinearMethod.create_weights`` quantizes memory that it has not written yet, to copy the
  weights of a 4-bit checkpoint into what comes back. With real numbers `quantize_` is called by
  ``process_weights_after_loading``, where a NaN is an error as everywhere else.
- ``TorchAOConfig.get_quant_method`` knows linear layers alone, and of a config by name neither the
  names of parameters nor the layers that vLLM joins. `vllm_layers` answers in its place.
- ``TorchAOConfig.from_config`` drops what says whether the head is 4-bit.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from torchao_int4cpu.integrations import vllm_configs
from torchao_int4cpu.integrations.torchao_int4cpu_on_import import when_imported
from torchao_int4cpu.quantize.run import uninitialized_weights

MODULE = "vllm.model_executor.layers.quantization.torchao"


def register() -> None:
    """Make vLLM load, run and serve 4-bit weights: the entry point that it calls in each process.

    Importing this package has done it already, so it may be called as often as anybody likes.
    """


def _patch(module: ModuleType) -> None:
    method = getattr(module, "TorchAOLinearMethod", None)
    if method is not None and not hasattr(method.create_weights, "torchao_int4cpu"):
        method.create_weights = _allocating(method.create_weights)
    # Another vLLM may lack either: uninitialized memory is then refused for its NaNs.
    config = getattr(module, "TorchAOConfig", None)
    if config is not None and not hasattr(config.get_quant_method, "torchao_int4cpu"):
        config.get_quant_method = _choosing(config.get_quant_method)
        config.from_config = classmethod(_remembering(config.from_config.__func__))


def _allocating(original: Any) -> Any:
    @functools.wraps(original)
    def create_weights(*args: Any, **kwargs: Any) -> Any:
        with uninitialized_weights():
            return original(*args, **kwargs)

    create_weights.torchao_int4cpu = True  # type: ignore[attr-defined]
    return create_weights


def _choosing(original: Any) -> Any:
    @functools.wraps(original)
    def get_quant_method(self: Any, layer: Any, prefix: str) -> Any:
        if not vllm_configs.is_ours(self):
            return original(self, layer, prefix)
        from torchao_int4cpu.integrations import vllm_layers  # imports vLLM

        return vllm_layers.method_of(self, layer, prefix)

    get_quant_method.torchao_int4cpu = True  # type: ignore[attr-defined]
    return get_quant_method


def _remembering(original: Any) -> Any:
    @functools.wraps(original)
    def from_config(cls: Any, config: dict[str, Any]) -> Any:
        made = original(cls, config)
        made.has_quantized_head = (
            bool(config.get("include_input_output_embeddings"))
            or config.get("modules_to_not_convert") is not None
        )
        return made

    return from_config


when_imported(MODULE, _patch)
