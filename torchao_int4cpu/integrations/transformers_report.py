"""One report on a model that transformers quantizes as it loads, by a `quantize_` for each weight."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from torchao.quantization import FqnToConfig

from torchao_int4cpu.integrations.torchao_int4cpu_on_import import when_imported
from torchao_int4cpu.quantize.report import Chosen, Report
from torchao_int4cpu.quantize.run import makes_ours, reported_together

#: Where transformers quantizes a weight that it has read, and where it says that a model is loaded.
CONVERSION_MODULE = "transformers.integrations.torchao"
QUANTIZER_MODULE = "transformers.quantizers.base"

#: By transformers' quantizer of a model that is being loaded.
_reports: WeakKeyDictionary[Any, Report] = WeakKeyDictionary()


def _patch_conversion(module: ModuleType) -> None:
    original = module.TorchAoQuantize.convert
    if hasattr(original, "torchao_int4cpu"):
        return

    @functools.wraps(original)
    def convert(self: Any, *args: Any, **kwargs: Any) -> Any:
        report = _reports.setdefault(self.hf_quantizer, Report())
        layer = (kwargs.get("full_layer_name") or "").rpartition(".")[0]
        with reported_together(report, layer):
            return original(self, *args, **kwargs)

    convert.torchao_int4cpu = True  # type: ignore[attr-defined]
    module.TorchAoQuantize.convert = convert


def _patch_quantizer(module: ModuleType) -> None:
    original = module.HfQuantizer.postprocess_model
    if hasattr(original, "torchao_int4cpu"):
        return

    @functools.wraps(original)
    def postprocess_model(self: Any, model: Any, **kwargs: Any) -> Any:
        result = original(self, model, **kwargs)
        report = _reports.pop(self, Report())
        # transformers calls nothing where it finds nothing to quantize, as in GPT-2.
        config = getattr(self.quantization_config, "quant_type", None)
        if report.is_ours or (makes_ours(config) and not self.pre_quantized):
            named = isinstance(config, FqnToConfig) and "_default" not in config.fqn_to_config
            report.tell(model, Chosen.BY_NAME if named else Chosen.BY_LOADER)
        return result

    postprocess_model.torchao_int4cpu = True  # type: ignore[attr-defined]
    module.HfQuantizer.postprocess_model = postprocess_model


when_imported(CONVERSION_MODULE, _patch_conversion)
when_imported(QUANTIZER_MODULE, _patch_quantizer)
