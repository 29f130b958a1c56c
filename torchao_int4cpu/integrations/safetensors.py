"""Patches of functions of safetensors and accelerate that read a weight's memory; 4-bit ones have none.

``save``, ``save_file`` and ``save_model`` write a 4-bit weight as torchao and transformers do: parts,
and JSON in the file's metadata. ``load_model`` puts the weights together again, in a dense model too,
and so does accelerate when it loads a checkpoint into a 4-bit model. ``load_file`` gives the parts,
which torchao's ``unflatten_tensor_state_dict`` expects of it.

Where that can be, what the public functions call is wrapped, because a program may have imported the
public ones before this package.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from torchao_int4cpu.checkpoint.safetensors import TYPE_NAME, metadata_of, part_key
from torchao_int4cpu.integrations.torchao_int4cpu_on_import import when_imported
from torchao_int4cpu.tensor.module_repr import ExtraRepr
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor, Int4Weight, weight_of

#: What torchao's metadata calls a dense tensor.
_DENSE = json.dumps({"_type": "Tensor"})


#: The model that ``load_model`` loads, if it does.
_loading: ContextVar[nn.Module | None] = ContextVar("loading", default=None)


class _Flattened(dict[str, Any]):
    """What safetensors serializes of tensors with 4-bit weights among them, and their metadata."""

    metadata: dict[str, str]


def flattened(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The parts of 4-bit weights and the other tensors, and torchao's metadata; no copies.

    Raises:
        ValueError: a 4-bit weight has a name without a dot.
    """
    state: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Int4Weight):
            metadata[name] = json.dumps(metadata_of(tensor))
            state |= {part_key(name, key): part.contiguous() for key, part in tensor.parts().items()}
        else:
            state[name] = tensor
            if "." in name:  # which torchao's naming needs
                metadata[name] = _DENSE
    return state, metadata | {"tensor_names": json.dumps(list(metadata))}


def unflattened(state: dict[str, Tensor], filename: Any) -> dict[str, Tensor]:
    """What a file holds, with its 4-bit weights whole; ``state`` itself if it has none."""
    from safetensors import safe_open
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    with safe_open(filename, framework="pt") as file:
        metadata = file.metadata() or {}
    if not any(TYPE_NAME in said for name, said in metadata.items() if name != "tensor_names"):
        return state
    whole, rest = unflatten_tensor_state_dict(state, metadata)
    together: dict[str, Tensor] = whole | rest
    return together


def _patch_safetensors(module: Any) -> None:
    """Wrap what ``safetensors.torch`` calls to look at tensors and to write them, once."""
    if hasattr(module._flatten_as_ptr, "torchao_int4cpu"):
        return
    flatten, load_file, load_model = module._flatten_as_ptr, module.load_file, module.load_model
    remove_duplicates = module._remove_duplicate_names

    @functools.wraps(flatten)
    def flatten_int4(tensors: Any, *args: Any) -> Any:
        if not (isinstance(tensors, Mapping) and any(_int4(tensors))):
            return flatten(tensors, *args)
        state, metadata = flattened(tensors)
        done = _Flattened(flatten(state, *args))
        done.metadata = metadata
        return done

    def with_metadata(serialize: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(serialize)
        def serialize_int4(tensors: Any, *args: Any, metadata: Any = None) -> Any:
            if isinstance(tensors, _Flattened):
                tensors, metadata = dict(tensors), tensors.metadata | (metadata or {})
            return serialize(tensors, *args, metadata=metadata)

        return serialize_int4

    @functools.wraps(remove_duplicates)
    def duplicates(state: Any, *args: Any, **kwargs: Any) -> Any:
        dense = {name: tensor for name, tensor in state.items() if not isinstance(tensor, Int4Weight)}
        found = remove_duplicates(dense, *args, **kwargs)
        found.update(_shared_names(dict(_int4(state)), set(kwargs.get("preferred_names") or ())))
        return found

    @functools.wraps(load_model)
    def load_int4_model(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        token = _loading.set(model)
        try:
            return load_model(model, *args, **kwargs)
        finally:
            _loading.reset(token)

    @functools.wraps(load_file)
    def load_file_for_a_model(filename: Any, *args: Any, **kwargs: Any) -> Any:
        state = load_file(filename, *args, **kwargs)
        model = _loading.get()
        if model is not None:
            state = unflattened(state, filename)
            _take_in(model, dict(_int4(state)))
        return state

    flatten_int4.torchao_int4cpu = True  # type: ignore[attr-defined]
    module._flatten_as_ptr = flatten_int4
    module.serialize = with_metadata(module.serialize)
    module.serialize_file = with_metadata(module.serialize_file)
    module._remove_duplicate_names = duplicates
    module.load_file, module.load_model = load_file_for_a_model, load_int4_model


def _int4(tensors: Mapping[str, Any]) -> Iterator[tuple[str, Int4Weight]]:
    return ((name, tensor) for name, tensor in tensors.items() if isinstance(tensor, Int4Weight))


def _take_in(model: nn.Module, weights: dict[str, Int4Weight]) -> None:
    """Make dense parameters of a model 4-bit, as those of a file are; of the same shape only."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in weights.items():
        dense = parameters.get(name)
        if type(dense) is not nn.Parameter or dense.shape != weight.shape:
            continue  # it is 4-bit already, or load_state_dict says what does not fit
        parameter = nn.Parameter(weight, requires_grad=False)
        for tied in [other for other, p in parameters.items() if p is dense]:
            owner, _, attribute = tied.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, attribute, parameter)
            module.extra_repr = ExtraRepr(module)  # type: ignore[method-assign]


def _same_weight(t: Int4Weight) -> tuple[Any, ...]:
    """Equal for two tensors of one 4-bit weight, as ``state_dict`` gives them for tied modules."""
    places = (part.data_ptr() for part in t.parts().values())
    return isinstance(t, Int4TransposedTensor), tuple(t.shape), *places


def _shared_names(weights: dict[str, Int4Weight], preferred: set[str]) -> dict[str, list[str]]:
    """The name to keep of each 4-bit weight that has several, and the others."""
    by_weight: dict[tuple[Any, ...], list[str]] = {}
    for name in sorted(weights, key=lambda name: (name not in preferred, name)):
        by_weight.setdefault(_same_weight(weights[name]), []).append(name)
    return {names[0]: names[1:] for names in by_weight.values() if len(names) > 1}


def _patch_accelerate_saving(module: Any) -> None:
    """Have ``accelerate.utils.other`` tell 4-bit weights apart by their parts."""
    original = module.id_tensor_storage

    @functools.wraps(original)
    def id_tensor_storage(tensor: Any) -> Any:
        if isinstance(tensor, Int4Weight):
            return tensor.device, weight_of(tensor).qdata.data_ptr(), _same_weight(tensor)
        return original(tensor)

    module.id_tensor_storage = id_tensor_storage


def _patch_accelerate_loading(module: Any) -> None:
    """Have ``accelerate.utils.modeling`` read 4-bit weights whole."""
    original = module.load_state_dict

    @functools.wraps(original)
    def load_state_dict(checkpoint_file: Any, *args: Any, **kwargs: Any) -> Any:
        state = original(checkpoint_file, *args, **kwargs)
        return (
            unflattened(state, checkpoint_file)
            if str(checkpoint_file).endswith(".safetensors")
            else state
        )

    module.load_state_dict = load_state_dict


when_imported("safetensors.torch", _patch_safetensors)
when_imported("accelerate.utils.other", _patch_accelerate_saving)
when_imported("accelerate.utils.modeling", _patch_accelerate_loading)
