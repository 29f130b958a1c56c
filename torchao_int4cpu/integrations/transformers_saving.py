"""``save_pretrained`` of models that were quantized in memory, or loaded in 4 bits and are saved again.

transformers saves torchao's weights by the quantizer that it loaded them with. A model that `quantize_`
changed later has none, and gets one for the time it is saved, with the config that would give the same.
A model that was loaded in 4 bits has one, with a step of loading that transformers 5.23 cannot reverse;
it need not, because torchao's ``flatten_tensor_state_dict`` has done so already.

The metadata of the file names every tensor, by the names that the model has. transformers writes some
under other names, and a stack of experts as a tensor for each: they are named as well, because vLLM
reads what is named, and leaves memory that nobody has written where a tensor is not.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torchao.quantization import FqnToConfig

from torchao_int4cpu.integrations.torchao_int4cpu_on_import import when_imported
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig
from torchao_int4cpu.tensor.transposed import Int4Weight, weight_of

#: Where transformers keeps ``PreTrainedModel``.
MODEL_MODULE = "transformers.modeling_utils"


def _patch(module: Any) -> None:
    """Wrap ``PreTrainedModel.save_pretrained``, once."""
    original = module.PreTrainedModel.save_pretrained
    if hasattr(original, "torchao_int4cpu"):
        return

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _savable(self, kwargs.get("save_original_format", True)):
            return original(self, *args, **kwargs)

    save_pretrained.torchao_int4cpu = True  # type: ignore[attr-defined]
    module.PreTrainedModel.save_pretrained = save_pretrained


@contextlib.contextmanager
def _savable(model: Any, renames: bool) -> Iterator[None]:
    """Give a model with 4-bit weights what transformers needs to save it, and take that away again.

    Args:
        model: the model.
        renames: whether transformers writes tensors under the names of the original checkpoint.
    """
    adapters = getattr(model, "_hf_peft_config_loaded", False)  # they are saved without the model
    if adapters or not int4_groups(model):
        yield
        return
    with contextlib.ExitStack() as undo:
        if getattr(model, "hf_quantizer", None) is None:
            from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

            config = config_of(model)
            undo.enter_context(_attribute(model, "hf_quantizer", TorchAoHfQuantizer(config)))
            undo.enter_context(_attribute(model.config, "quantization_config", config))
        conversions = getattr(model, "_weight_conversions", None)
        if conversions:
            kept = [each for each in conversions if not _deserializes(each)]
            undo.enter_context(_attribute(model, "_weight_conversions", kept))
        if renames:
            quantizer = model.hf_quantizer
            flatten = functools.partial(_flattened, quantizer.get_state_dict_and_metadata)
            undo.enter_context(_attribute(quantizer, "get_state_dict_and_metadata", flatten))
        yield


def _flattened(flatten: Any, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A model as plain tensors, and metadata that has their names in the file, too."""
    from transformers.core_model_loading import revert_weight_conversion

    state, metadata = flatten(model)
    entries = {name: metadata[name] for name in json.loads(metadata.get("tensor_names", "[]"))}
    endings: dict[str, tuple[str, str]] = {}  # of the keys of a 4-bit weight's parts
    for name, entry in entries.items():
        module, _, parameter = name.rpartition(".")
        for part in json.loads(entry).get("_tensor_data_names", ()):
            endings[f"{module}._{parameter}_{part}"] = (name, f"_{parameter}_{part}")
    probes = {key: tensor.to("meta") for key, tensor in state.items()}
    keys = {id(probe): key for key, probe in probes.items()}
    for written, probe in revert_weight_conversion(model, dict(probes)).items():
        key = keys.get(id(probe), "")  # nothing where a tensor was taken apart
        if key in endings:
            name, ending = endings[key]
            named = written.removesuffix(ending) + name.rpartition(".")[2]
            entries.setdefault(named, entries[name])
        else:
            entries.setdefault(written, json.dumps({"_type": "Tensor"}))
    if entries:
        metadata |= entries | {"tensor_names": json.dumps(list(entries))}
    return state, metadata


def _deserializes(conversion: Any) -> bool:
    from transformers.integrations.torchao import TorchAoDeserialize

    return any(isinstance(each, TorchAoDeserialize) for each in getattr(conversion, "operations", ()))


@contextlib.contextmanager
def _attribute(owner: Any, name: str, value: object) -> Iterator[None]:
    """Set an attribute for a while."""
    there = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if there:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def int4_groups(model: nn.Module) -> dict[str, int]:
    """The group sizes of a model's 4-bit parameters, by all their names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: weight_of(p).group_size for name, p in parameters if isinstance(p, Int4Weight)}


def config_of(model: Any) -> Any:
    """The ``TorchAoConfig`` that has ``from_pretrained`` quantize what is 4-bit in a model.

    Loading a saved model goes by the metadata of its files; vLLM and readers of ``config.json`` go by
    this. The algorithm is not known any more, and is given as the default.
    """
    from transformers import TorchAoConfig
    from transformers.quantizers.base import get_keys_to_not_convert

    groups = int4_groups(model)
    sizes = set(groups.values())
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    ends = _ends(model)
    has_ends = any(
        f"{name}.weight" in groups for name, module in model.named_modules() if module in ends
    )
    if len(sizes) > 1 or not set(groups) <= linear:
        by_name = {key: Int4WeightOnlyConfig(group_size=size) for key, size in entries(model, groups)}
        return TorchAoConfig(FqnToConfig(by_name), include_input_output_embeddings=has_ends)
    kept = dense_matrices(model, set(groups))
    default = kept <= set(get_keys_to_not_convert(model))
    return TorchAoConfig(
        Int4WeightOnlyConfig(group_size=sizes.pop()),
        modules_to_not_convert=None if default else sorted(kept),
        include_input_output_embeddings=has_ends,
    )


def dense_matrices(model: nn.Module, quantized: set[str]) -> set[str]:
    """The modules, but for embeddings, whose weight is a matrix and is not among these by its name.

    Routers of experts are among them: transformers has them in modules of their own, and vLLM in linear
    layers, which are 4-bit there unless ``modules_to_not_convert`` says that they are not.
    """
    four_bit = [name.removesuffix("weight") for name in quantized]
    found = set()
    for name, module in model.named_modules():
        weight = vars(module).get("_parameters", {}).get("weight")
        if weight is None or weight.ndim != 2 or isinstance(module, nn.Embedding):
            continue
        # transformers reads a name as the beginning of others, too
        begins = not isinstance(module, nn.Linear) and any(each.startswith(name) for each in four_bit)
        if f"{name}.weight" not in quantized and not begins:
            found.add(name)
    return found


def _ends(model: Any) -> list[nn.Module]:
    """The input embedding and the output head, as far as the model has them and can tell."""
    try:
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    except NotImplementedError:
        return []
    return [end for end in ends if end is not None]


def entries(model: nn.Module, groups: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Keys of an ``FqnToConfig`` for parameters of these group sizes, and the size of each.

    A key is a name, or a pattern for all names that differ in numbers alone.
    """
    alike: dict[str, list[str]] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        alike.setdefault(re.sub(r"\d+", r"\\d+", re.escape(name)), []).append(name)
    for pattern, names in alike.items():
        sizes = {groups.get(name) for name in names}
        size = sizes.pop()
        if not sizes and size is not None and len(names) > 1:
            yield f"re:{pattern}", size
        else:
            yield from ((name, groups[name]) for name in names if name in groups)


when_imported(MODEL_MODULE, _patch)
