"""Patches of how transformers 5 loads and saves torchao's weights, two of which 4-bit embeddings need.

- It looks for parts of weights by a list of names, which lacks act_order.

- It marks a module as initialized as soon as its weight is quantized or read, so that a buffer that no
  file holds, as the scale of Gemma's embedding, stays uninitialized memory.
- It writes a 4-bit weight that an embedding and a head share twice, because it looks for shared memory
  only after torchao has cloned the parts.
- It sets a bound method at each linear layer that it loads, to show its weight; with that a layer can
  be neither pickled nor saved whole. `ExtraRepr` stands there instead, as after `quantize_`.

Models without a 4-bit weight of this package are left to transformers' own code.
"""

from __future__ import annotations

import functools
import json
import sys
from types import MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from torchao_int4cpu.integrations.torchao_int4cpu_on_import import when_imported
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.module_repr import ExtraRepr
from torchao_int4cpu.tensor.transposed import Int4Weight
from torchao_int4cpu.version import warn_of_old_transformers

#: Where transformers keeps the class that loads and saves torchao's weights.
QUANTIZER_MODULE = "transformers.quantizers.quantizer_torchao"


def _patch(module: ModuleType) -> None:
    """Wrap methods and a property of ``TorchAoHfQuantizer``, once."""
    quantizer = module.TorchAoHfQuantizer
    after_loading = quantizer._process_model_after_weight_loading
    before_saving = quantizer.get_state_dict_and_metadata
    if hasattr(after_loading, "torchao_int4cpu"):
        return

    @functools.wraps(after_loading)
    def load(self: Any, model: Any, **kwargs: Any) -> Any:
        if any(isinstance(parameter, Int4Weight) for parameter in model.parameters()):
            # Not when transformers is imported: most who import it have no 4-bit weights.
            warn_of_old_transformers(str(sys.modules["transformers"].__version__))
            _initialize_buffers(model)
            _make_picklable(model)
        return after_loading(self, model, **kwargs)

    @functools.wraps(before_saving)
    def save(self: Any, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        state, metadata = before_saving(self, model)
        _drop_second_copies(model, state, metadata)
        return state, metadata

    load.torchao_int4cpu = True  # type: ignore[attr-defined]
    quantizer._process_model_after_weight_loading = load
    quantizer.get_state_dict_and_metadata = save
    if hasattr(quantizer, "serialized_names"):
        _name_the_order(quantizer)
    else:
        _name_the_order_in_conversions(quantizer)


def _name_the_order(quantizer: Any) -> None:
    """Add the part to the list of transformers 5.24."""
    names_of_parts = quantizer.serialized_names.fget

    @functools.wraps(names_of_parts)
    def serialized_names(self: Any) -> dict[str, list[str]]:
        found = names_of_parts(self)
        return {name: [*parts, f"_{name}_act_order"] for name, parts in found.items()}

    quantizer.serialized_names = property(serialized_names)


def _name_the_order_in_conversions(quantizer: Any) -> None:
    """Add it to those of transformers 5.16, which are in the conversions themselves."""
    conversions = quantizer.get_weight_conversions

    @functools.wraps(conversions)
    def get_weight_conversions(self: Any) -> list[Any]:
        return [
            type(each)(
                source_patterns=[*each.source_patterns, f"_{each.target_patterns[0]}_act_order"],
                target_patterns=each.target_patterns,
                operations=each.operations,
            )
            for each in conversions(self)
        ]

    quantizer.get_weight_conversions = get_weight_conversions


def _initialize_buffers(model: Any) -> None:
    """Give buffers that no file holds the values that transformers gives them.

    Whole parameters carry transformers' mark themselves, so they are not initialized again.
    """
    marked = [module for module in model.modules() if _is_loaded_with_unsaved_buffers(module)]
    for module in marked:
        module._is_hf_initialized = False
    if marked:
        model.initialize_weights()


def _make_picklable(model: nn.Module) -> None:
    for module in model.modules():
        bound = isinstance(vars(module).get("extra_repr"), MethodType)
        if bound and any(isinstance(weight, Int4Weight) for weight in module.parameters(recurse=False)):
            module.extra_repr = ExtraRepr(module)  # type: ignore[method-assign]


def _is_loaded_with_unsaved_buffers(module: nn.Module) -> bool:
    parameters = list(module.parameters(recurse=False))
    return (
        bool(parameters)
        and bool(module._non_persistent_buffers_set)
        and all(getattr(parameter, "_is_hf_initialized", False) for parameter in parameters)
    )


def _drop_second_copies(model: Any, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Leave out what transformers ties again when it loads, as it does for dense weights.

    Args:
        model: the model that is saved.
        state: what is saved: plain tensors by their keys, in torchao's naming.
        metadata: of the file, JSON by the names of the weights.
    """
    # The config is asked and not the model as it was loaded: it is what the loading side will read.
    for name, kept in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        weight = model.get_parameter_or_buffer(name)
        if not isinstance(weight, Int4OpaqueTensor) or name not in metadata or kept not in metadata:
            continue
        if weight is not model.get_parameter_or_buffer(kept):
            continue
        module, _, parameter = name.rpartition(".")
        for part in json.loads(metadata.pop(name))["_tensor_data_names"]:
            del state[f"{module}._{parameter}_{part}"]
        names = json.loads(metadata["tensor_names"])
        metadata["tensor_names"] = json.dumps([other for other in names if other != name])


when_imported(QUANTIZER_MODULE, _patch)
