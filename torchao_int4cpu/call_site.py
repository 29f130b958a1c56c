"""What the calling frames tell a `quantize_` handler: where in the model it is, and who asks.

torchao gives a handler the module but not its name, and vLLM gives it memory that it has not filled
yet. Both are looked up when they are needed; where the frames look different one day, a message
falls back, and uninitialised memory is refused for its NaNs.
"""

from __future__ import annotations

import sys
import types
from typing import Any, NamedTuple

import torchao.quantization.quant_api as quant_api
from torch import nn
from torchao.quantization import FqnToConfig, fqn_matches_fqn_config

from torchao_int4cpu.transposed import Int4Weight

#: vLLM 0.32: ``TorchAOLinearMethod.create_weights`` calls this function of this module on
#: ``torch.empty``, to copy the weights of a 4-bit checkpoint into what comes back. With real numbers
#: it is called by ``process_weights_after_loading``.
VLLM_MODULE = "vllm.model_executor.layers.quantization.torchao"
VLLM_FUNCTION = "torchao_quantize_param_data"
VLLM_ALLOCATING_CALLER = "create_weights"


def in_vllm_allocation() -> bool:
    """Whether vLLM asks for the shape of a weight only, on memory that it has not written."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if (
            frame.f_code.co_name == VLLM_FUNCTION
            and frame.f_globals.get("__name__") == VLLM_MODULE
            and frame.f_back is not None
        ):
            return frame.f_back.f_code.co_name == VLLM_ALLOCATING_CALLER
        frame = frame.f_back
    return False


def name_of(module: nn.Module, parameter_name: str) -> str:
    """The name of the parameter in the model that is being quantized, or a description of it."""
    frames = _frames_of_torchao()
    fqn = ""
    if "_replace_with_custom_fn_if_matches_filter" in frames:
        found = frames["_replace_with_custom_fn_if_matches_filter"].f_locals.get("cur_fqn", "")
        fqn = found.removesuffix(".")
    elif "_fqn_to_config_handler" in frames:
        fqn = frames["_fqn_to_config_handler"].f_locals.get("fqn", "")
    if fqn:
        return f"{fqn}.{parameter_name}"
    return f"{parameter_name} of {type(module).__name__}({type(module).extra_repr(module)})"


def model_to_quantize() -> nn.Module | None:
    """What `quantize_` was called with."""
    frames = _frames_of_torchao()
    model = frames["quantize_"].f_locals.get("model") if "quantize_" in frames else None
    return model if isinstance(model, nn.Module) else None


def progress() -> str:
    """A sentence on what of the model has been quantized so far."""
    root = model_to_quantize()
    if root is None:
        return "This layer is unchanged"
    done = [name for name, parameter in root.named_parameters() if isinstance(parameter, Int4Weight)]
    if not done:
        return "Nothing has been changed"
    return f"4-bit already: {', '.join(done)}; every other layer is unchanged"


class _Holder(NamedTuple):
    """A module that holds a parameter, its name in the model, and the parameter's name in it."""

    module: nn.Module
    fqn: str
    parameter: str


#: Under this name the frame of `quantize_` keeps what `_shared_parameters` found, as long as it runs.
_SHARED = "parameters that torchao_int4cpu found shared"


def left_behind(module: nn.Module, parameter_name: str) -> list[str]:
    """Names under which a parameter will stay as it is in other modules, when `quantize_` is done.

    Asked before the parameter is replaced in ``module``. The model is searched once a `quantize_`.
    """
    variables = _variables_of_quantize()
    root = variables.get("model")
    if not isinstance(root, nn.Module):
        return []
    if _SHARED not in variables:
        variables[_SHARED] = _shared_parameters(root)
    weight = getattr(module, parameter_name)
    holders: list[_Holder] = variables[_SHARED].get(id(weight), [])
    others = []
    passed = True
    for holder in holders:
        if holder.module is module and holder.parameter == parameter_name:
            passed = False  # what comes after this is still to be visited
        elif getattr(holder.module, holder.parameter) is weight and (
            passed or not _is_chosen(holder, variables)
        ):
            others.append(f"{holder.fqn}.{holder.parameter}")
    return others


def _shared_parameters(root: nn.Module) -> dict[int, list[_Holder]]:
    """Who holds each parameter that has several holders, by its id, in the order of visits."""
    holders: dict[int, list[_Holder]] = {}
    for fqn, module in root.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(id(parameter), []).append(_Holder(module, fqn, name))
    return {key: found for key, found in holders.items() if len(found) > 1}


def _is_chosen(holder: _Holder, variables: dict[str, Any]) -> bool:
    """Whether `quantize_` will come to a module that it has not visited yet."""
    config, filter_fn = variables.get("config"), variables.get("filter_fn")
    if isinstance(config, FqnToConfig):
        names = (holder.fqn, f"{holder.fqn}.{holder.parameter}")
        return any(fqn_matches_fqn_config(name, config) for name in names) or (
            "_default" in config.fqn_to_config and isinstance(holder.module, nn.Linear)
        )
    return filter_fn is None or bool(filter_fn(holder.module, holder.fqn))


def _variables_of_quantize() -> dict[str, Any]:
    frames = _frames_of_torchao()
    return frames["quantize_"].f_locals if "quantize_" in frames else {}


def _frames_of_torchao() -> dict[str, types.FrameType]:
    frames: dict[str, types.FrameType] = {}
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == quant_api.__file__:
            frames.setdefault(frame.f_code.co_name, frame)
        frame = frame.f_back
    return frames
