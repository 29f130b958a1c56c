"""Why a parameter is left as it was: sentences for a message, each with the rule and what to do."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from torchao_int4cpu.format.groupwise import FLOAT_DTYPES
from torchao_int4cpu.format.packed import packed_bytes
from torchao_int4cpu.quantize import report
from torchao_int4cpu.quantize.filters import OTHER_MEANING, is_input_first
from torchao_int4cpu.quantize.run import Run
from torchao_int4cpu.tensor.transposed import Int4Weight, weight_of


def is_4_bit(weight: Tensor) -> bool:
    """Whether it is one of our tensors."""
    return isinstance(weight, Int4Weight)


def group_size_of(weight: Tensor) -> int:
    """Of a 4-bit weight."""
    assert isinstance(weight, Int4Weight)
    return weight_of(weight).group_size


def of_the_weight(module: nn.Module, parameter_name: str, weight: Tensor) -> str | None:
    """Why a weight, or a process's piece of one, cannot be quantized at all."""
    if is_4_bit(weight):
        return f"it is 4-bit already, in groups of {group_size_of(weight)}"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"it is a {type(weight).__name__} already"
    if weight.dtype not in FLOAT_DTYPES:
        return f"it is {weight.dtype}, and only bfloat16, float16 and float32 can be quantized"
    if weight.ndim not in (2, 3) or weight.numel() == 0:
        return (
            f"its shape is {list(weight.shape)}, and only [N, K] or a stack [E, N, K] can be quantized"
        )
    if parameter_name.endswith("bias"):  # those of experts are [E, N], and a pattern finds them, too
        return "it is a bias by its name, which is added and not multiplied with"
    if isinstance(module, OTHER_MEANING):
        return (
            f"{type(module).__name__} has no 4-bit implementation, only products with [N, K] and "
            "embeddings have"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return (
            "an embedding with max_norm rescales its rows as it is used, and a 4-bit weight is frozen"
        )
    return None


def of_size(module: nn.Module, weight: Tensor, group_size: int) -> str | None:
    """Why a weight is better left: padding makes it larger. Of a DTensor the whole weight counts."""
    shape = list(weight.shape)
    unfit = len(shape) not in (2, 3) or not math.prod(shape) or weight.dtype not in FLOAT_DTYPES
    if unfit or report.is_4_bit(weight):  # also as the piece of a DTensor
        return None
    stored = [*shape[:-2], shape[-1], shape[-2]] if is_input_first(module, weight) else shape
    before, after = math.prod(shape) * weight.dtype.itemsize, packed_bytes(stored, group_size)
    if after <= before:
        return None
    return (
        f"its shape is {shape}, which takes {before} bytes in {weight.dtype} and would take {after} in "
        f"4 bits, where rows are padded to a multiple of 16 and columns to one of {group_size}"
    )


def of_training(run: Run, weight: Tensor) -> str | None:
    """Why a weight is better left: it is an adapter, or being trained, and a 4-bit weight is frozen."""
    obstacle = _of_adapters(run)
    if obstacle is not None or not weight.requires_grad or run.frozen_weight is None:
        return obstacle
    return (
        f"it is trainable while other weights are frozen (as {run.frozen_weight} is), so it is being "
        "trained, and a 4-bit weight is always frozen; call requires_grad_(False) on it first if not"
    )


def _of_adapters(run: Run) -> str | None:
    """Why the visited module is better left: it is an adapter of PEFT, or PEFT adds some to it."""
    # Adapters that are frozen (inference_mode, the inactive of several) are recognized by this alone:
    # a layer of PEFT lists its attributes that hold adapters.
    module, names = run.model, run.fqn.split(".")
    for name in names:
        adapters = getattr(module, "adapter_layer_names", None)
        module = getattr(module, name, None)
        if not isinstance(adapters, (tuple, list)):
            continue
        if name in adapters:
            return (
                "it is an adapter of PEFT, which is trained, saved and merged as it is; call "
                "merge_and_unload() first for one 4-bit weight of both"
            )
        if isinstance(module, nn.MultiheadAttention):
            return (
                "PEFT adds adapters to the weights of a MultiheadAttention in each forward, and 4-bit "
                "weights cannot be added to; call merge_and_unload() first, or leave it out of "
                "target_modules"
            )
    return None


# --- weights that are computed --------------------------------------------------------------------

#: Hooks of torch that compute a weight before each forward, and what takes them out again.
_HOOKS: tuple[tuple[type, str, str, str], ...] = (
    (WeightNorm, "name", "weight_norm", "torch.nn.utils.remove_weight_norm"),
    (SpectralNorm, "name", "spectral_norm", "torch.nn.utils.remove_spectral_norm"),
    (BasePruningMethod, "_tensor_name", "prune", "torch.nn.utils.prune.remove"),
)


def of_computed(module: nn.Module, parameter_name: str) -> str | None:
    """Why a weight cannot be replaced: it is computed, or another one is computed from it."""
    # Not read here: reading a parametrized weight computes it, which may change what it is made from.
    if parametrize.is_parametrized(module, parameter_name):
        steps = getattr(module.parametrizations, parameter_name)
        names = ", ".join(type(step).__name__.lstrip("_") for step in steps)
        return (
            f"it is computed by a parametrization ({names}) whenever it is used; call "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {parameter_name!r}) first"
        )
    if isinstance(module, parametrize.ParametrizationList):
        return (
            "a weight is computed from it by a parametrization; call "
            "torch.nn.utils.parametrize.remove_parametrizations on the module first"
        )
    for hook in module._forward_pre_hooks.values():
        for hook_class, attribute, name, cure in _HOOKS:
            computed = getattr(hook, attribute, None) if isinstance(hook, hook_class) else None
            if computed is None or not f"{parameter_name}_".startswith(f"{computed}_"):
                continue
            what = "it is computed" if computed == parameter_name else f"{computed} is computed from it"
            call = f"{cure}(module, {computed!r})"
            return f"{what} by torch.nn.utils.{name} before each use; call {call} first"
    return None


def of_no_parameter(module: nn.Module, parameter_name: str, alone: bool) -> str | None:
    """Why a tensor of a module cannot be replaced: whoever put it there will do so again.

    Args:
        module: that has it.
        parameter_name: of the tensor.
        alone: whether `quantize_` was called for this module and not for a model around it. Then a
            plain attribute is no obstacle: algorithms of torchao, and PEFT as it merges, hand over
            weights that way.
    """
    if parameter_name in module._parameters:
        return None
    if parameter_name in module._buffers:
        kind = "a buffer"
    elif parameter_name in vars(module):
        if alone:
            return None
        kind = "a plain attribute"
    else:
        return (
            "it is a property, which the module computes whenever it is used; "
            "leave the module out, for example with filter_fn"
        )
    return (
        f"it is {kind} of the module and no parameter, so it may be computed anew; if it is not, write "
        f"module.{parameter_name} = torch.nn.Parameter(module.{parameter_name}, False) first"
    )
