"""Which checkpoints of other tools `from_pretrained` reads with this package: of 4 bits, for the CPU.

transformers finds the class that loads a checkpoint by the ``quant_method`` of its config. `_Choice`
stands there for the methods of `transformers_quantizers`, and decides at each call.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch

from torchao_int4cpu.integrations.torchao_int4cpu_on_import import when_imported

#: Where transformers keeps its tables, and where it keeps ``from_pretrained``.
TABLES_MODULE = "transformers.quantizers.auto"
MODEL_MODULE = "transformers.modeling_utils"

#: The ``quant_method`` of what is read.
METHODS = ("gptq", "awq", "compressed-tensors", "gguf")

#: By ``quant_method``: the package by which transformers' own quantizer reads what is not read here.
PACKAGES = {"gptq": "gptqmodel", "awq": "gptqmodel", "compressed-tensors": "compressed_tensors"}

_enabled = True
_device_map: ContextVar[object] = ContextVar("device_map of from_pretrained", default=None)


def import_checkpoints(enabled: bool = True) -> None:
    """Whether `from_pretrained` reads GPTQ, AWQ, compressed-tensors and GGUF with this package.

    It does so from the import of this package on, where a model is loaded for the CPU: no accelerator
    is there, or ``device_map="cpu"`` says so. Weights in 4 bits become `Int4OpaqueTensor`, codes
    exact. Otherwise, after ``import_checkpoints(False)``, and where a config says that weights are of
    another kind and the package that reads them is installed, transformers loads these checkpoints as
    it does without this package.
    """
    global _enabled
    _enabled = enabled


def _for_cpu() -> bool:
    wanted = _device_map.get()
    places = list(wanted.values()) if isinstance(wanted, dict) else [wanted]
    if all(isinstance(place, str | torch.device) and str(place) == "cpu" for place in places):
        return True
    return not torch.accelerator.is_available() and "disk" not in places


def _ours(method: str, config: Any, **others: Any) -> Any:
    """The quantizer of this package; None for what is left to an installed package.

    Raises:
        ValueError: the config says what is not read, and no package is there that would.
    """
    from torchao_int4cpu.integrations.transformers_quantizers import QUANTIZERS

    quantizer = QUANTIZERS[method](config, **others)
    try:
        quantizer.check_config()
    except ValueError:
        if importlib.util.find_spec(PACKAGES[method]) is None:
            raise
        return None
    return quantizer


class _Choice:
    """In the place of a quantizer: the one of this package, or transformers' own."""

    def __init__(self, method: str, theirs: Any) -> None:
        self.method, self.theirs = method, theirs

    def __call__(self, config: Any, pre_quantized: bool = True, **others: Any) -> Any:
        if _enabled and _for_cpu():
            if self.method == "gguf" and not config.dequantize:
                from torchao_int4cpu.integrations.transformers_gguf import Gguf

                return Gguf(config, pre_quantized=pre_quantized, **others)
            if self.method != "gguf" and pre_quantized:
                ours = _ours(self.method, config, pre_quantized=True, **others)
                if ours is not None:
                    return ours
        return self.theirs(config, pre_quantized=pre_quantized, **others)


class _ConfigChoice:
    """In the place of compressed-tensors' config, which needs the package of that name to be made."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def from_dict(self, values: dict[str, Any], *args: Any, **others: Any) -> Any:
        if _enabled and _for_cpu():
            from torchao_int4cpu.integrations.transformers_quantizers import CompressedTensorsConfig

            if _ours("compressed-tensors", CompressedTensorsConfig(**values)) is not None:
                return CompressedTensorsConfig.from_dict(values, *args, **others)
        return self.theirs.from_dict(values, *args, **others)


def _patch(tables: ModuleType) -> None:
    """Replace entries of transformers' tables, and have the device map known where they are asked."""
    for method in METHODS:
        theirs = tables.AUTO_QUANTIZER_MAPPING.get(method)  # of GGUF only in newer releases
        if theirs is not None and not isinstance(theirs, _Choice):
            tables.AUTO_QUANTIZER_MAPPING[method] = _Choice(method, theirs)
    configs = tables.AUTO_QUANTIZATION_CONFIG_MAPPING
    if not isinstance(configs["compressed-tensors"], _ConfigChoice):
        configs["compressed-tensors"] = _ConfigChoice(configs["compressed-tensors"])

    original = tables.get_hf_quantizer

    @functools.wraps(original)
    def get_hf_quantizer(
        config: Any, quantization_config: Any, device_map: Any, *args: Any, **others: Any
    ) -> Any:
        token = _device_map.set(device_map)
        try:
            return original(config, quantization_config, device_map, *args, **others)
        finally:
            _device_map.reset(token)

    tables.get_hf_quantizer = get_hf_quantizer  # type: ignore[attr-defined]
    model = sys.modules.get(MODEL_MODULE)
    if getattr(model, "get_hf_quantizer", None) is original:
        model.get_hf_quantizer = get_hf_quantizer  # type: ignore[union-attr]


when_imported(TABLES_MODULE, _patch)
