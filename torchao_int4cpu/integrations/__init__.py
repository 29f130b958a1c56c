"""Patches of other libraries, and plugins for them; each registers itself when this is imported."""

from torchao_int4cpu.integrations import (
    dlpack,
    onnx,
    safetensors,
    sizes,
    torchscript,
    transformers,
    transformers_conv1d,
    transformers_imports,
    transformers_report,
    transformers_saving,
    vllm,
)

__all__ = [
    "dlpack",
    "onnx",
    "safetensors",
    "sizes",
    "torchscript",
    "transformers",
    "transformers_conv1d",
    "transformers_imports",
    "transformers_report",
    "transformers_saving",
    "vllm",
]
