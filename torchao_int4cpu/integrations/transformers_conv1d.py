"""Of GPT-2's layers, for `torchao_int4cpu.filter_fn`: a ``Conv1D`` keeps its weight ``[K, N]``."""

from __future__ import annotations

from types import ModuleType

from torchao_int4cpu.integrations.torchao_int4cpu_on_import import when_imported
from torchao_int4cpu.quantize.filters import register_input_first

#: Where transformers keeps the class.
MODULE = "transformers.pytorch_utils"


def _register(module: ModuleType) -> None:
    register_input_first(module.Conv1D)


when_imported(MODULE, _register)
